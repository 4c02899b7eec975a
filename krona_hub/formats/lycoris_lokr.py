"""LoKr of LyCORIS, also as OneTrainer, ai-toolkit, SimpleTuner and musubi-tuner write it (FORMATS §3)."""

from __future__ import annotations

from krona_hub.formats.known.format import Rules, verbs
from krona_hub.formats.parsing.adapter_file import AdapterFile

NAME = "lycoris-lokr"
RULES = Rules(scale="alpha / rank of the tensors; 1 where both factors are full, whatever alpha says")
read, describe, write = verbs(NAME)


def recognises(file: AdapterFile) -> bool:
    """Any LoKr that the formats before this one leave, and the CDKA sums of a LyCORIS fork."""
    return bool({"lokr", "cdka"} & file.keys.kinds)
