"""LoKr as diffusers' save_lora_adapter writes it, the configuration in the metadata (FORMATS §5.4)."""

from __future__ import annotations

from collections.abc import Mapping

from krona_hub.formats.known.format import Rules, verbs
from krona_hub.formats.parsing.adapter_file import AdapterFile
from krona_hub.formats.parsing.scales import ScaleConfig, metadata_configs

NAME = "diffusers-lokr"
TRAINERS = ("diffusion_model.", "transformer.")  # ai-toolkit and the authors of FLUX: LyCORIS under dotted names


def configs(file: AdapterFile) -> Mapping[str, ScaleConfig]:
    return metadata_configs(file.metadata)


def notes(file: AdapterFile) -> tuple[str, ...]:
    if configs(file) or any("alpha" in m.parts for m in file.keys.modules):
        return ()
    return ("no lora_adapter_metadata and no alpha: the scale is taken to be 1",)


RULES = Rules(
    scale="alpha / r of lora_adapter_metadata; without it alpha / rank where alpha is stored, else 1",
    kinds={"lokr": "peft-lokr"},
    configs=configs,
    notes=notes,
)
read, describe, write = verbs(NAME)


def recognises(file: AdapterFile) -> bool:
    """LoKr with diffusers' configuration, or under dotted names without any alpha."""
    if "lokr" not in file.keys.kinds:
        return False
    if any(c.kind == "lokr" for c in configs(file).values()):
        return True
    return file.dotted and not file.starts(*TRAINERS) and not any("alpha" in m.parts for m in file.keys.modules)
