"""LoRA of kohya's sd-scripts, under diffusers, ldm or BFL names (FORMATS §6)."""

from __future__ import annotations

import json

from krona_hub.formats.known.format import Rules, verbs
from krona_hub.formats.parsing.adapter_file import AdapterFile

NAME = "kohya-lora"


def notes(file: AdapterFile) -> tuple[str, ...]:
    """sd-scripts joins separately trained q, k and v without adapting alpha."""
    try:
        arguments = json.loads(file.metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        arguments = {}
    split = arguments.get("split_qkv") if isinstance(arguments, dict) else None
    if str(split).lower() != "true":
        return ()
    return (
        "trained with split_qkv: q, k and v were joined with alpha unchanged, so the file means a third (a quarter with"
        " mlp) of the strength it was trained at; its meaning is kept",
    )


RULES = Rules(scale="alpha / rank; 1 without alpha", notes=notes)
read, describe, write = verbs(NAME)


def recognises(file: AdapterFile) -> bool:
    return "kohya" in file.keys.grammars
