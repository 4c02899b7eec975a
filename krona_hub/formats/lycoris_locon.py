"""LoCon of LyCORIS: LoRA with convolutions, Tucker cores, DoRA or whole matrices (FORMATS §6)."""

from __future__ import annotations

from krona_hub.formats.known.format import Rules, verbs
from krona_hub.formats.parsing.adapter_file import AdapterFile

NAME = "lycoris-locon"
RULES = Rules(scale="alpha / rank; 1 without alpha")
PARTS = {"mid", "dora_scale", "diff"}  # that sd-scripts itself never writes
read, describe, write = verbs(NAME)


def recognises(file: AdapterFile) -> bool:
    """`lycoris_` names, or parts that plain kohya LoRA does not have."""
    if not {"kohya", "dense"} & file.keys.grammars:
        return False
    own = any(m.name.startswith("lycoris_") or PARTS & set(m.parts) for m in file.keys.modules)
    return own or "lycoris" in file.metadata.get("ss_network_module", "")
