"""Split the delta of a layer by rows, and stack the deltas of its rows: exact, also for DoRA with a norm per row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.errors import UnsupportedError
from krona_hub.kron.norms import relative_difference
from krona_hub.kron.rows import Range, at_rows, nonzero_terms, take_rows
from krona_hub.kron.terms import KronTerms, LowRank, dense_factor

EQUAL = 1e-6  # relative difference up to which two deltas count as equal: float32 computes them in any order


def delta_rows(delta: LayerDelta, ranges: Sequence[Range]) -> LayerDelta:
    """Return the delta of the rows of `ranges`, in that order, without sums that are zero there.

    Raises UnsupportedError for a DoRA with a norm per input, which depends on all rows.

    >>> delta = LayerDelta((KronTerms(torch.rand(1, 4, 2), torch.rand(1, 3, 2)),), (12, 4))
    >>> torch.equal(delta_rows(delta, [(6, 12)]).dense(), delta.dense()[6:])
    True
    """
    _check_axis([delta])
    sums = (nonzero_terms(take_rows(s, ranges)) for s in delta.sums)
    magnitude = delta.magnitude
    if magnitude is not None:
        magnitude = torch.cat([magnitude[start:stop] for start, stop in ranges])
    shape = (sum(stop - start for start, stop in ranges), *delta.weight_shape[1:])
    return replace(delta, sums=tuple(s for s in sums if s.terms), weight_shape=shape, magnitude=magnitude)


def stacked_deltas(parts: Sequence[tuple[Range, LayerDelta]], weight_shape: tuple[int, ...]) -> LayerDelta:
    """Return the delta of a layer from those of ranges of its rows; other rows do not change.

    The inverse of `delta_rows`. Raises UnsupportedError for DoRA unless every row of the layer has a magnitude.

    >>> parts = [((0, 2), LayerDelta((KronTerms(torch.ones(1, 2, 1), torch.ones(1, 1, 3)),), (2, 3)))]
    >>> stacked_deltas(parts, (4, 3)).dense()[:, 0]
    tensor([1., 1., 0., 0.])
    """
    height = weight_shape[0]
    parts = sorted(parts, key=lambda part: part[0])
    dense = [_dense(delta) for _, delta in parts]
    known = [matrix for matrix in dense if matrix is not None]
    sums = tuple(at_rows(s, start, height) for (start, _), delta in parts for s in delta.sums)
    if len(known) == len(dense):
        sums = (_dense_rows(known, [rows for rows, _ in parts], (height, prod(weight_shape[1:]))),)
    return LayerDelta(sums, weight_shape, _stacked_magnitudes(parts, height))


def equal_deltas(one: LayerDelta, other: LayerDelta) -> bool:
    """Whether two layers change in the same way, up to the rounding of float32."""
    if one.matrix_shape != other.matrix_shape or (one.magnitude is None) != (other.magnitude is None):
        return False
    if one.magnitude is not None and other.magnitude is not None:
        alike = one.magnitude_axis == other.magnitude_axis and torch.allclose(
            one.magnitude.double(), other.magnitude.double(), rtol=EQUAL, atol=0.0
        )
        if not alike:
            return False
    return relative_difference(one.sums, other.sums) <= EQUAL


def _check_axis(deltas: Sequence[LayerDelta]) -> None:
    if any(delta.magnitude is not None and delta.magnitude_axis == "in" for delta in deltas):
        raise UnsupportedError(
            "A DoRA with a norm per input cannot be split by rows.",
            fix="Merge it into its base model with the application that trained it.",
        )


def _stacked_magnitudes(parts: Sequence[tuple[Range, LayerDelta]], height: int) -> Tensor | None:
    found = [delta.magnitude for _, delta in parts if delta.magnitude is not None]
    if not found:
        return None
    _check_axis([delta for _, delta in parts])
    if sum(map(len, found)) < height:
        raise UnsupportedError(
            "A DoRA of only some rows of a layer is not a DoRA of the layer.",
            fix="Merge it into its base model with the application that trained it.",
        )
    return torch.cat(found)


def _dense(delta: LayerDelta) -> Tensor | None:
    """The matrix of a delta that is stored as one; None for any other."""
    if len(delta.sums) != 1:
        return None
    only = delta.sums[0]
    if only.terms != 1 or only.shape[:2] != (1, 1) or isinstance(only.right, LowRank):
        return None
    scale = dense_factor(only.left).flatten()
    return only.right[0] if bool(scale == 1) else only.right[0] * scale


def _dense_rows(matrices: Sequence[Tensor], rows: Sequence[Range], size: tuple[int, int]) -> KronTerms:
    wide = matrices[0].dtype
    for matrix in matrices:
        wide = torch.promote_types(wide, matrix.dtype)
    whole = matrices[0].new_zeros(size, dtype=wide)
    for matrix, (start, stop) in zip(matrices, rows, strict=True):
        whole[start:stop] = matrix
    return KronTerms(whole.new_ones(1, 1, 1), whole[None])
