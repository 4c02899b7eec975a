"""PEFT's LoRA (FORMATS §7) and LoKr (FORMATS §4): a folder with adapter_config.json beside the tensors. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

from krona_hub.checkpoints.file_names import PEFT_CONFIG
from krona_hub.errors import IncompleteError, UnsupportedError
from krona_hub.formats.forms.limits import PEFT_LOKR_LIMITS, no_input_dora, no_lora
from krona_hub.formats.known.format import Format, Storage
from krona_hub.formats.parsing.adapter_file import AdapterFile
from krona_hub.formats.parsing.scales import ScaleConfig, config_of

TYPES = ("LOKR", "LORA")
UNLIKE = ("use_qalora", "use_bdlora", "alora_invocation_tokens", "velora_config", "kasa_config")  # other products


def peft_type(file: AdapterFile) -> str | None:
    """The `peft_type` of the configuration, None without one."""
    return None if file.config is None else str(file.config.get("peft_type", "")).rpartition(".")[2].upper()


def has_type(file: AdapterFile, name: str) -> bool:
    """Whether the file is a PEFT adapter of that type. Raises UnsupportedError for a type that is not ours."""
    found = peft_type(file)
    if found is not None and found not in TYPES:
        raise UnsupportedError(
            f"{PEFT_CONFIG} says peft_type {found or 'nothing'}, which is no Kronecker or low-rank product.",
            fix=f"krona reads {' and '.join(TYPES)}; merge the others with PEFT (merge_and_unload).",
        )
    return found == name


def configuration(file: AdapterFile) -> Mapping[str, ScaleConfig]:
    """The configuration of a PEFT folder. Raises IncompleteError where there is none."""
    if file.config is None:
        raise IncompleteError(
            f"there is no {PEFT_CONFIG} beside the tensors, so their scale is unknown.",
            fix="Put it beside the file, or read with --from diffusers-lora or diffusers-lokr, which take scale 1.",
        )
    odd = next((name for name in UNLIKE if file.config.get(name)), None)
    if odd:
        raise UnsupportedError(
            f"{PEFT_CONFIG} sets {odd}, which is more than up·down.", fix="Merge it with PEFT (merge_and_unload)."
        )
    return {"": config_of(file.config)}


def config_notes(file: AdapterFile) -> tuple[str, ...]:
    config = file.config or {}
    notes = []
    if config.get("fan_in_fan_out"):
        notes.append("fan_in_fan_out is set: the base stores these weights as (in, out)")
    if config.get("modules_to_save"):
        notes.append("modules_to_save: whole weights ride along and are no part of the adapter")
    return tuple(notes)


def is_lokr(file: AdapterFile) -> bool:
    return has_type(file, "LOKR")


def is_lora(file: AdapterFile) -> bool:
    return has_type(file, "LORA")


PEFT_LOKR = Format(
    name="peft-lokr",
    summary="PEFT's LoKr: a folder with adapter_config.json",
    recognizes=is_lokr,
    scale="alpha / r of adapter_config.json, also where both factors are full",
    storage=Storage(
        kind="kronecker", layout="peft-lokr", dialect="peft", limits=PEFT_LOKR_LIMITS, one_factor=True, folder=True
    ),
    kinds={"lokr": "peft-lokr"},
    configs=configuration,
    notes=config_notes,
)
PEFT_LORA = Format(
    name="peft-lora",
    summary="PEFT's LoRA, with patterns, rank-stabilised scales and DoRA: a folder with adapter_config.json",
    recognizes=is_lora,
    scale="lora_alpha / r of adapter_config.json, or lora_alpha / √r with use_rslora",
    storage=Storage(
        kind="low-rank",
        layout="peft-lora",
        dialect="peft",
        limits=(no_input_dora, no_lora),
        lora_keys=("lora_B.weight", "lora_A.weight"),
        magnitude_key="lora_magnitude_vector",
        folder=True,
    ),
    configs=configuration,
    notes=config_notes,
)
