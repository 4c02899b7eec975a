"""PEFT LoRA (FORMATS §7), LoKr (§4) and LoHa: a folder with adapter_config.json beside the tensors. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping

from krona_hub.checkpoints.file_names import PEFT_CONFIG
from krona_hub.errors import IncompleteError, UnsupportedError, abbreviated
from krona_hub.formats.forms.limits import PEFT_LOKR_LIMITS, no_input_dora, no_lora
from krona_hub.formats.forms.vector_kinds import LORA_BIAS
from krona_hub.formats.known.format import Format, Storage
from krona_hub.formats.parsing.adapter_file import AdapterFile
from krona_hub.formats.parsing.peft_fields import OTHER_PRODUCTS, unknown_fields
from krona_hub.formats.parsing.scales import ScaleConfig, config_of

TYPES = ("LOHA", "LOKR", "LORA")


def peft_type(file: AdapterFile) -> str | None:
    """The `peft_type` of the configuration; None without a configuration."""
    return None if file.config is None else str(file.config.get("peft_type", "")).rpartition(".")[2].upper()


def has_type(file: AdapterFile, name: str) -> bool:
    """Whether the file is a PEFT adapter of that type. Raises UnsupportedError for an unsupported type."""
    found = peft_type(file)
    if found is not None and found not in TYPES:
        raise UnsupportedError(
            f"Unsupported peft_type {found!r} in {PEFT_CONFIG}: not a Kronecker or low-rank product.",
            fix=f"krona reads {', '.join(TYPES)}; merge other types with PEFT (merge_and_unload).",
        )
    return found == name


def configuration(file: AdapterFile) -> Mapping[str, ScaleConfig]:
    """The configuration of a PEFT folder. Raises IncompleteError without one."""
    if file.config is None:
        raise IncompleteError(
            f"Missing {PEFT_CONFIG} beside the tensors: the scale is unknown.",
            fix="Put it beside the file, or use --from diffusers-lora or diffusers-lokr, which assume scale 1.",
        )
    odd = next((name for name in OTHER_PRODUCTS if file.config.get(name)), None)
    if odd:
        raise UnsupportedError(
            f"{PEFT_CONFIG} sets {odd}, so the delta is not a plain product up·down: {OTHER_PRODUCTS[odd]}.",
            fix="Merge the adapter with PEFT (merge_and_unload).",
        )
    return {"": config_of(file.config)}


def config_notes(file: AdapterFile) -> tuple[str, ...]:
    config = file.config or {}
    notes = []
    if config.get("fan_in_fan_out"):
        notes.append("fan_in_fan_out is set: the base model stores these weights as (in, out)")
    if unknown := unknown_fields(config):
        notes.append(f"{PEFT_CONFIG} sets fields unknown to krona, which may change the deltas: {abbreviated(unknown)}")
    return tuple(notes)


def is_lokr(file: AdapterFile) -> bool:
    return has_type(file, "LOKR")


def is_lora(file: AdapterFile) -> bool:
    return has_type(file, "LORA")


def is_loha(file: AdapterFile) -> bool:
    return has_type(file, "LOHA")


PEFT_LOHA = Format(
    name="peft-loha",
    summary="PEFT LoHa: a folder with adapter_config.json",
    recognizes=is_loha,
    scale="alpha / r from adapter_config.json",
    storage=None,
    configs=configuration,
    notes=config_notes,
)
PEFT_LOKR = Format(
    name="peft-lokr",
    summary="PEFT LoKr: a folder with adapter_config.json",
    recognizes=is_lokr,
    scale="alpha / r from adapter_config.json, also if both factors are full",
    storage=Storage(
        kind="kronecker", layout="peft-lokr", dialect="peft", limits=PEFT_LOKR_LIMITS, one_factor=True, folder=True
    ),
    kinds={"lokr": "peft-lokr"},
    configs=configuration,
    notes=config_notes,
)
PEFT_LORA = Format(
    name="peft-lora",
    summary="PEFT LoRA, with rank patterns, rsLoRA scales and DoRA: a folder with adapter_config.json",
    recognizes=is_lora,
    scale="lora_alpha / r from adapter_config.json, or lora_alpha / √r with use_rslora",
    storage=Storage(
        kind="low-rank",
        layout="peft-lora",
        dialect="peft",
        limits=(no_input_dora, no_lora),
        lora_keys=("lora_B.weight", "lora_A.weight"),
        magnitude_key="lora_magnitude_vector",
        vectors=LORA_BIAS,
        folder=True,
    ),
    configs=configuration,
    notes=config_notes,
)
