"""Bases on disk, and changes that need no adapter: numbers multiplied by a factor, tile by tile."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from krona_hub.checkpoints.header import read_header
from krona_hub.checkpoints.rewrite import TensorChange
from krona_hub.checkpoints.writer import write_tensors
from krona_hub.merging.output.write_model import MergedFile

NUMPY = {"F16": np.float16, "F32": np.float32}
TILE = 64  # numbers per tile: several in every tensor


def tensors(seed: int = 0, names: str = "abcdef") -> dict[str, torch.Tensor]:
    """fp16 matrices of odd and even sizes, and what else lies in checkpoints: one number, none, integers."""
    generator = torch.Generator().manual_seed(seed)
    found = {f"{n}.weight": torch.randn(5 + i, 31, generator=generator).half() for i, n in enumerate(names)}
    return found | {"scale": torch.tensor(2.0), "empty": torch.zeros(0, 3), "positions": torch.arange(7)}


def times(factor: float, old: str = "F16", new: str = "F16") -> TensorChange:
    """The change that multiplies a tensor of dtype `old` and stores it as `new`."""

    def produce(data, sink) -> None:
        numbers = np.frombuffer(data, NUMPY[old])
        for start in range(0, len(numbers), TILE):
            tile = (numbers[start : start + TILE] * np.float32(factor)).astype(NUMPY[new])
            sink(start * tile.itemsize, memoryview(tile))

    return TensorChange(new, produce)


def merged_file(path: Path, *names: str, factor: float = 3.0, new: str = "F16") -> MergedFile:
    return MergedFile(
        read_header(path), {f"{n}.weight": times(factor, "F16", new) for n in names}, {"krona.merge": "x"}
    )


def write_base(path: Path, seed: int = 0, names: str = "abcdef") -> Path:
    write_tensors(path, tensors(seed, names), {"format": "pt", "title": "base"})
    return path


def write_pipeline(folder: Path) -> Path:
    """A diffusers folder: a U-Net in two shards with index, a text encoder with a pickle twin, a VAE, texts."""
    for name in ("unet", "text_encoder", "vae", "tokenizer/deep"):
        (folder / name).mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    (folder / "tokenizer/deep/vocab.txt").write_text("words")
    shards = {"model-1-of-2.safetensors": "abc", "model-2-of-2.safetensors": "de"}
    places, total = {}, 0
    for i, (name, letters) in enumerate(shards.items()):
        header = read_header(write_base(folder / "unet" / name, i, letters))
        places |= dict.fromkeys(header.tensors, name)
        total += sum(info.nbytes for info in header.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "unet/model.safetensors.index.json").write_text(json.dumps(index))
    write_base(folder / "text_encoder/model.safetensors")
    (folder / "text_encoder/pytorch_model.bin").write_bytes(b"pickle")
    write_base(folder / "vae/vae.safetensors", 5)
    (folder / "vae/vae.bin").write_bytes(b"pickle of an untouched component")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Relative path -> bytes of every file."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
