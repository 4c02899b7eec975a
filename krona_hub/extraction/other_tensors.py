"""Changed norms, biases and embeddings: listed in the report; all but embeddings can become vectors of the adapter.

A vector is added to a parameter. Embeddings are stored in the extras, which nothing is added to; buffers of integers
and tensors without a canonical name, such as those of a VAE, are not stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.bases.base import Base
from krona_hub.bases.weight_files import TABLES, read
from krona_hub.extraction.report import OtherChange
from krona_hub.extraction.tensor_pairs import LayerPair
from krona_hub.kron.rounding_noise import StorageNoise


class ChangedTensor(NamedTuple):
    """A tensor that differs by more than rounding."""

    report: OtherChange
    difference: Tensor


def changes(pairs: Sequence[LayerPair], model: Base) -> Iterator[ChangedTensor]:
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
        kind = _kind(pair)
        known = model.parameter(pair.name) == tuple(base.shape)
        if kind == "embedding":
            known = pair.name.partition(".")[0] in model.components
        storable = known and base.is_floating_point() and base.ndim > 0
        yield ChangedTensor(OtherChange(pair.name, kind, tuple(base.shape), moved, storable), difference)


def _kind(pair: LayerPair) -> str:
    """Classify by the last parts of the name and the number of dimensions."""
    module, _, part = pair.name.rpartition(".")
    if module.rpartition(".")[2] in TABLES or part in TABLES:
        return "embedding"
    if "norm" in module.rpartition(".")[2] or (part == "weight" and len(pair.shape) == 1):
        return "norm"
    return "bias" if part.endswith("bias") else "other"


def vectors_of(found: Sequence[ChangedTensor]) -> dict[str, Tensor]:
    """Return the differences of biases, norms and bare parameters, by parameter."""
    return {c.report.name: c.difference for c in found if c.report.storable and c.report.kind != "embedding"}


def extras_of(found: Sequence[ChangedTensor]) -> dict[str, Tensor]:
    """Return the differences of embeddings, named as in LyCORIS: `<module>.diff`."""
    embeddings = [c for c in found if c.report.storable and c.report.kind == "embedding"]
    return {f"{c.report.name.removesuffix('.weight')}.diff": c.difference for c in embeddings}
