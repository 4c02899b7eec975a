"""krona_hub's own format, schema 1.x: any sum of Kronecker products, no alpha."""

from __future__ import annotations

from krona_hub.formats.known.format import Format, Storage
from krona_hub.formats.parsing.adapter_file import AdapterFile
from krona_hub.schema.tensor_layout import is_native


def recognizes(file: AdapterFile) -> bool:
    return is_native(file.metadata)


KRONA = Format(
    name="krona",
    summary="krona_hub's own format, schema 1.x: any sum of Kronecker products, no alpha",
    recognizes=recognizes,
    scale="none: the strength is in the numbers",
    storage=Storage(kind="any", layout="krona"),
)
