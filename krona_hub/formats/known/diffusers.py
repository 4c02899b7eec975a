"""LoRA of diffusers, in the keys of every era, mixed or not (FORMATS §5)."""

from __future__ import annotations

from collections.abc import Mapping

from krona_hub.formats.known.format import Rules, verbs
from krona_hub.formats.parsing.adapter_file import AdapterFile
from krona_hub.formats.parsing.scales import ScaleConfig, metadata_configs

NAME = "diffusers-lora"


def configs(file: AdapterFile) -> Mapping[str, ScaleConfig]:
    return metadata_configs(file.metadata)


def notes(file: AdapterFile) -> tuple[str, ...]:
    notes = []
    if not configs(file) and not any("alpha" in m.parts for m in file.keys.modules):
        notes.append("no lora_adapter_metadata: the scale is taken to be 1, as diffusers does")
    if len(file.keys.grammars & {"peft", "diffusers", "processor"}) > 1:
        notes.append("keys of several eras are mixed; diffusers looks at the first only and may lose modules")
    return tuple(notes)


RULES = Rules(
    scale="lora_alpha / r of lora_adapter_metadata; without it alpha / rank where alpha is stored, else 1",
    configs=configs,
    notes=notes,
)
read, describe, write = verbs(NAME)


def recognises(file: AdapterFile) -> bool:
    return bool({"peft", "diffusers", "processor"} & file.keys.grammars)
