"""What the fields of a PEFT configuration mean for ΔW: most nothing, some a scale, a few another product. Torch-free.

The fields are those of LoraConfig and LoKrConfig of peft 0.21. `scales.py` and `known/peft.py` use the tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from krona_hub.errors import UnsupportedError

PLAIN_LORA = (
    "Save the adapter as a plain LoRA with PEFT: save_pretrained(folder, path_initial_model_for_weight_conversion=…)."
)
PLAIN_INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")  # ΔW is zero at the start
SUBTRACTED = ("pissa", "olora")  # first factors, functions of the base weight, were subtracted from it

HONORED = {  # they say what the tensors are, how they are scaled, or how they were trained
    "alpha", "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "decompose_both",
    "decompose_factor", "ensure_weight_tying", "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode",
    "init_lora_weights", "init_weights", "layers_pattern", "layers_to_transform", "loftq_config", "lora_alpha",
    "lora_bias", "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "module_dropout",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_dropout", "rank_dropout_scale",
    "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "trainable_token_indices", "use_dora",
    "use_effective_conv2d", "use_rslora", "velora_config",
}  # fmt: skip
OTHER_PRODUCTS: Mapping[str, str] = {  # field -> why ΔW is not up·down
    "alora_invocation_tokens": "the adapter acts only on tokens from the invocation on",
    "arrow_config": "a router combines several adapters",
    "kasa_config": "KaSA truncates the base weights and scales between the factors",
    "layer_replication": "the layers of the base model are stacked anew",
    "monteclora_config": "Monte Carlo sampling is added to the factors",
    "target_parameters": "parameters outside of layers are adapted",
    "use_bdlora": "the factors are block diagonal",
    "use_qalora": "the inputs are pooled in groups",
}


def initialization(value: Any) -> str:
    """Return `pissa` or `olora` for an adapter whose ΔW needs the base weights, "" for a plain LoRA.

    PiSSA (Meng et al., 2024) and OLoRA (Büyükakyüz, 2024) subtract their first factors B₀A₀ from the base weights, so
    that ΔW = s·(BA − B₀A₀). Raises UnsupportedError for initializations whose B₀A₀ is not a function of the base
    weights alone, and for unknown ones.

    >>> initialization("pissa"), initialization("gaussian"), initialization(True)
    ('pissa', '', '')
    """
    if value in PLAIN_INITIALIZATIONS:
        return ""
    if value in SUBTRACTED:
        return str(value)
    raise UnsupportedError(
        f"Unsupported init_lora_weights {value!r}: the adapter may belong to changed base weights.", fix=PLAIN_LORA
    )


def unknown_fields(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the fields that krona does not know and that have a value: they may change ΔW."""
    known = HONORED | OTHER_PRODUCTS.keys()
    return tuple(sorted(name for name, value in config.items() if value and name not in known))
