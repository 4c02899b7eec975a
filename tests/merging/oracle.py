"""Merging done slowly and obviously: dense, in float64, rounded by a table of all numbers of a type."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch
from torch import Tensor

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.kron.terms import Factor, KronTerms, LowRank
from krona_hub.merging.arithmetic.patches import Patch
from krona_hub.merging.arithmetic.rounding import Rounding, Survival
from krona_hub.merging.arithmetic.tiles import merge_tensor

HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def merged(
    weight: Tensor,
    patches: Sequence[Patch],
    out_dtype: torch.dtype | None = None,
    rounding: Rounding = Rounding(),  # noqa: B008
    name: str = "w",
) -> tuple[Tensor, Survival]:
    """What `merge_tensor` sends, put together; every number must come just once, in order."""
    dtype = out_dtype or weight.dtype
    out, at = torch.empty(weight.numel(), dtype=dtype), 0

    def sink(first: int, tile: Tensor) -> None:
        nonlocal at
        assert first == at and tile.dtype == dtype and tile.ndim == 1 and tile.is_contiguous()
        at += tile.numel()
        out[first:at] = tile

    survival = merge_tensor(weight, patches, sink, out_dtype=dtype, rounding=rounding, name=name)
    assert at == weight.numel()
    return out.reshape(weight.shape), survival


def summed(weight: Tensor, patches: Sequence[Patch]) -> Tensor:
    """W + Σ w·ΔW in float64, in the shape of the stored tensor."""
    rows = weight.double().reshape(len(weight), -1)
    total = rows.clone()
    for patch in patches:
        start, stop = patch.placement.rows or (0, len(rows))
        total[start:stop] += patch.weight * stored_delta(patch, rows[start:stop])
    return total.reshape(weight.shape)


def stored_delta(patch: Patch, stored: Tensor) -> Tensor:
    """ΔW as the file lays it out. `read` of bases.weights is what it undoes: rows, then transpose, then halves."""
    place, delta = patch.placement, in_double(patch.delta)
    base = stored.mT if place.transpose else stored
    base = torch.cat(base.chunk(2)[::-1]) if place.swap_halves else base
    dense = delta.dense(base.reshape(delta.weight_shape)).reshape(delta.matrix_shape)
    dense = torch.cat(dense.chunk(2)[::-1]) if place.swap_halves else dense
    return dense.mT if place.transpose else dense


def in_double(delta: LayerDelta) -> LayerDelta:
    def wide(factor: Factor) -> Factor:
        return LowRank(factor.up.double(), factor.down.double()) if isinstance(factor, LowRank) else factor.double()

    sums = tuple(KronTerms(wide(s.left), wide(s.right), s.rows) for s in delta.sums)
    return replace(delta, sums=sums, magnitude=None if delta.magnitude is None else delta.magnitude.double())


@cache
def all_numbers(dtype: torch.dtype) -> Tensor:
    """Every finite number of a type of one or two bytes, ascending, in float64; zero once."""
    size = torch.finfo(dtype).bits
    bits = torch.arange(1 << size, dtype=torch.int32).to(torch.uint8 if size == 8 else torch.uint16)
    numbers = bits.view(dtype).float().double()
    return numbers[numbers.isfinite()].unique()


def rounded(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """To the nearest number of a type, ties to the even one."""
    if dtype in (SINGLE, DOUBLE):
        return numbers.to(dtype)
    table = all_numbers(dtype)
    above = torch.searchsorted(table, numbers).clamp(1, len(table) - 1)
    low, high = table[above - 1], table[above]
    zero = int(torch.searchsorted(table, torch.tensor(0.0, dtype=DOUBLE)))
    high_is_even = (above - zero) % 2 == 0  # numbers of one sign are spelled 0, 1, 2, … in order
    up = (high - numbers < numbers - low) | ((high - numbers == numbers - low) & high_is_even)
    return torch.where(up, high, low).to(SINGLE).to(dtype)


def ulps_apart(a: Tensor, b: Tensor) -> Tensor:
    """How many numbers of their type apart, per element; both finite."""
    if a.dtype in (SINGLE, DOUBLE):
        kind = torch.int32 if a.dtype == SINGLE else torch.int64
        spelled = [torch.where(x >= 0, x.view(kind), torch.iinfo(kind).min - x.view(kind)) for x in (a, b)]
        return (spelled[0].long() - spelled[1].long()).abs()
    table = all_numbers(a.dtype)
    places = [torch.searchsorted(table, x.float().double()) for x in (a, b)]
    return (places[0] - places[1]).abs()
