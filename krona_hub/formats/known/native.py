"""The native format of krona_hub, schemas 1.x and 2.x: any sum of Kronecker products, no alpha."""

from __future__ import annotations

from krona_hub.formats.forms.vector_kinds import ALL
from krona_hub.formats.known.format import Format, Storage
from krona_hub.formats.parsing.adapter_file import AdapterFile
from krona_hub.schema.tensor_layout import is_native


def recognizes(file: AdapterFile) -> bool:
    return is_native(file.metadata)


KRONA = Format(
    name="krona",
    summary="Native format of krona_hub, schemas 1.x and 2.x: any sum of Kronecker products, no alpha",
    recognizes=recognizes,
    scale="1 (alpha already folded into the weights)",
    storage=Storage(kind="any", layout="krona", vectors=ALL, embeddings=True),
)
