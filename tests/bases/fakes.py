"""Checkpoint files of any size that hold only a header: the data are a hole in the file."""

import json
from math import prod
from pathlib import Path


def sparse_checkpoint(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A sound safetensors file of F16 zeros that takes no room on the disk."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path
