"""Files built byte by byte, which no library would write."""

import json
from pathlib import Path

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def entry(start=0, end=8, shape=(2,), dtype="F32", **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end], **more}


def forged(header: dict | bytes, data: bytes = b"\0" * 8, length: int | None = None) -> bytes:
    """Build size, header and data; `length` overrides the declared size."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def put(folder: Path, content: bytes, name: str = "x.safetensors") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path
