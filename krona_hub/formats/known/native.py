"""krona_hub's own format, schema 1.x: any sum of Kronecker products, no alpha."""

from __future__ import annotations

from krona_hub.formats.known.format import Rules, verbs
from krona_hub.formats.parsing.adapter_file import AdapterFile
from krona_hub.schema.tensor_layout import is_native

NAME = "krona"
RULES = Rules(scale="none: the strength is in the numbers")
read, describe, write = verbs(NAME)


def recognises(file: AdapterFile) -> bool:
    return is_native(file.metadata)
