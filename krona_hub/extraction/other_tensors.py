"""Changed norms, biases and embeddings: listed in the report and optionally stored in the extras."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.bases.weight_files import TABLES, read
from krona_hub.extraction.report import OtherChange
from krona_hub.extraction.tensor_pairs import LayerPair
from krona_hub.kron.rounding_noise import StorageNoise

ENDINGS = {".weight": ".diff", ".bias": ".diff_b"}  # suffix of a tensor -> suffix of its difference, as in LyCORIS


class ChangedTensor(NamedTuple):
    """A tensor that differs by more than rounding."""

    report: OtherChange
    extra: str  # name of the difference in extras
    difference: Tensor


def changes(pairs: Sequence[LayerPair]) -> Iterator[ChangedTensor]:
    """Yield the pairs that differ by more than rounding; integer tensors (positions) whenever they differ."""
    for pair in pairs:
        base, tuned = read(pair.base), read(pair.tuned)
        if base.shape != tuned.shape or torch.equal(base.double(), tuned.double()):
            continue
        difference = tuned.float() - base.float()
        if base.is_floating_point() and StorageNoise(tuned.reshape(-1, 1), base.reshape(-1, 1)).explains(
            difference.reshape(-1, 1)
        ):
            continue
        norm = float(torch.linalg.vector_norm(base.float()))
        moved = float(torch.linalg.vector_norm(difference)) / norm if norm else float("inf")
        yield ChangedTensor(
            OtherChange(pair.name, _kind(pair), tuple(base.shape), moved), _extra(pair.name), difference
        )


def _kind(pair: LayerPair) -> str:
    """Classify by the last parts of the name and the number of dimensions."""
    module, _, part = pair.name.rpartition(".")
    if module.rpartition(".")[2] in TABLES or part in TABLES:
        return "embedding"
    if "norm" in module.rpartition(".")[2] or (part == "weight" and len(pair.shape) == 1):
        return "norm"
    return "bias" if part.endswith("bias") else "other"


def _extra(name: str) -> str:
    ending = next((e for e in ENDINGS if name.endswith(e)), "")
    return name.removesuffix(ending) + ENDINGS.get(ending, ".diff")
