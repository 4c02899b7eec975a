"""diffusers LoRA, in the key names of every version, also mixed (FORMATS §5), and LoKr with a configuration (§5.4)."""

from __future__ import annotations

from collections.abc import Mapping

from krona_hub.formats.forms.limits import PEFT_LOKR_LIMITS, no_input_dora, no_lora
from krona_hub.formats.forms.vector_kinds import LORA_BIAS
from krona_hub.formats.known.format import Format, Storage
from krona_hub.formats.parsing.adapter_file import AdapterFile
from krona_hub.formats.parsing.scales import ScaleConfig, metadata_configs

ERAS = frozenset({"peft", "diffusers", "processor"})  # grammars of keys
TRAINERS = ("diffusion_model.", "transformer.")  # ai-toolkit and BFL: LyCORIS with dotted names
SCALE = "from lora_adapter_metadata; without it, alpha / rank if alpha is stored, else 1"


def configs(file: AdapterFile) -> Mapping[str, ScaleConfig]:
    return metadata_configs(file.metadata)


def is_scaled(file: AdapterFile) -> bool:
    """Whether the file states its scale, in a configuration or by an alpha."""
    return bool(configs(file)) or any("alpha" in m.parts for m in file.keys.modules)


def is_lora(file: AdapterFile) -> bool:
    return bool(ERAS & file.keys.grammars)


def is_lokr(file: AdapterFile) -> bool:
    """Whether the file is a LoKr with diffusers' configuration, or with dotted names and without any alpha."""
    if "lokr" not in file.keys.kinds:
        return False
    if any(c.kind == "lokr" for c in configs(file).values()):
        return True
    return file.dotted and not file.starts(*TRAINERS) and not any("alpha" in m.parts for m in file.keys.modules)


def lora_notes(file: AdapterFile) -> tuple[str, ...]:
    notes = []
    if not is_scaled(file):
        notes.append("no lora_adapter_metadata: assuming scale 1, as diffusers does")
    if len(file.keys.grammars & ERAS) > 1:
        notes.append(
            "mixed keys of several diffusers versions; diffusers checks only the first key and may drop modules"
        )
    return tuple(notes)


def lokr_notes(file: AdapterFile) -> tuple[str, ...]:
    return () if is_scaled(file) else ("no lora_adapter_metadata and no alpha: assuming scale 1",)


DIFFUSERS_LORA = Format(
    name="diffusers-lora",
    summary="diffusers LoRA, in the key names of every diffusers version, also mixed",
    recognizes=is_lora,
    scale=f"lora_alpha / r {SCALE}",
    storage=Storage(
        kind="low-rank",
        layout="diffusers-lora",
        dialect="diffusers",
        limits=(no_input_dora, no_lora),
        lora_keys=("lora_B.weight", "lora_A.weight"),
        magnitude_key="lora_magnitude_vector",
        vectors=LORA_BIAS,
    ),
    configs=configs,
    notes=lora_notes,
)
DIFFUSERS_LOKR = Format(
    name="diffusers-lokr",
    summary="diffusers LoKr, as written by save_lora_adapter, with its configuration in the metadata",
    recognizes=is_lokr,
    scale=f"alpha / r {SCALE}",
    storage=Storage(
        kind="kronecker", layout="diffusers-lokr", dialect="peft", limits=PEFT_LOKR_LIMITS, one_factor=True
    ),
    kinds={"lokr": "peft-lokr"},
    configs=configs,
    notes=lokr_notes,
)
