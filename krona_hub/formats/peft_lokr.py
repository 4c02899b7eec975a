"""PEFT's LoKr: a folder with adapter_config.json (FORMATS §4)."""

from __future__ import annotations

from krona_hub.formats.known.format import Rules, verbs
from krona_hub.formats.known.peft import config_notes, configuration, has_type
from krona_hub.formats.parsing.adapter_file import AdapterFile

NAME = "peft-lokr"
RULES = Rules(
    scale="alpha / r of adapter_config.json, also where both factors are full",
    kinds={"lokr": "peft-lokr"},
    configs=configuration,
    notes=config_notes,
)
read, describe, write = verbs(NAME)


def recognises(file: AdapterFile) -> bool:
    return has_type(file, "LOKR")
