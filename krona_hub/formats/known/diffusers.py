"""LoRA of diffusers, in the keys of every era, mixed or not (FORMATS §5), and LoKr with its configuration (§5.4)."""

from __future__ import annotations

from collections.abc import Mapping

from krona_hub.formats.forms.limits import PEFT_LOKR_LIMITS, no_input_dora, no_lora
from krona_hub.formats.known.format import Format, Storage
from krona_hub.formats.parsing.adapter_file import AdapterFile
from krona_hub.formats.parsing.scales import ScaleConfig, metadata_configs

ERAS = frozenset({"peft", "diffusers", "processor"})  # grammars of keys
TRAINERS = ("diffusion_model.", "transformer.")  # ai-toolkit and the authors of FLUX: LyCORIS under dotted names
SCALE = "of lora_adapter_metadata; without it alpha / rank where alpha is stored, else 1"


def configs(file: AdapterFile) -> Mapping[str, ScaleConfig]:
    return metadata_configs(file.metadata)


def is_scaled(file: AdapterFile) -> bool:
    """Whether the file says anything of its scale."""
    return bool(configs(file)) or any("alpha" in m.parts for m in file.keys.modules)


def is_lora(file: AdapterFile) -> bool:
    return bool(ERAS & file.keys.grammars)


def is_lokr(file: AdapterFile) -> bool:
    """LoKr with diffusers' configuration, or under dotted names without any alpha."""
    if "lokr" not in file.keys.kinds:
        return False
    if any(c.kind == "lokr" for c in configs(file).values()):
        return True
    return file.dotted and not file.starts(*TRAINERS) and not any("alpha" in m.parts for m in file.keys.modules)


def lora_notes(file: AdapterFile) -> tuple[str, ...]:
    notes = []
    if not is_scaled(file):
        notes.append("no lora_adapter_metadata: the scale is taken to be 1, as diffusers does")
    if len(file.keys.grammars & ERAS) > 1:
        notes.append("keys of several eras are mixed; diffusers looks at the first only and may lose modules")
    return tuple(notes)


def lokr_notes(file: AdapterFile) -> tuple[str, ...]:
    return () if is_scaled(file) else ("no lora_adapter_metadata and no alpha: the scale is taken to be 1",)


DIFFUSERS_LORA = Format(
    name="diffusers-lora",
    summary="LoRA of diffusers, in the keys of every era, mixed or not",
    recognizes=is_lora,
    scale=f"lora_alpha / r {SCALE}",
    storage=Storage(
        kind="low-rank",
        layout="diffusers-lora",
        dialect="diffusers",
        limits=(no_input_dora, no_lora),
        lora_keys=("lora_B.weight", "lora_A.weight"),
        magnitude_key="lora_magnitude_vector",
    ),
    configs=configs,
    notes=lora_notes,
)
DIFFUSERS_LOKR = Format(
    name="diffusers-lokr",
    summary="LoKr as diffusers' save_lora_adapter writes it, the configuration in the metadata",
    recognizes=is_lokr,
    scale=f"alpha / r {SCALE}",
    storage=Storage(
        kind="kronecker", layout="diffusers-lokr", dialect="peft", limits=PEFT_LOKR_LIMITS, one_factor=True
    ),
    kinds={"lokr": "peft-lokr"},
    configs=configs,
    notes=lokr_notes,
)
