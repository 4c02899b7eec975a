"""PEFT's LoRA, with patterns, rank-stabilised scales and DoRA: a folder with adapter_config.json (FORMATS §7)."""

from __future__ import annotations

from krona_hub.formats.known.format import Rules, verbs
from krona_hub.formats.known.peft import config_notes, configuration, has_type
from krona_hub.formats.parsing.adapter_file import AdapterFile

NAME = "peft-lora"
RULES = Rules(
    scale="lora_alpha / r of adapter_config.json, or lora_alpha / √r with use_rslora",
    configs=configuration,
    notes=config_notes,
)
read, describe, write = verbs(NAME)


def recognises(file: AdapterFile) -> bool:
    return has_type(file, "LORA")
