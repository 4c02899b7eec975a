"""One tensor of a merged checkpoint against what it should be, and what happened to it where it is not that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import torch
from torch import Tensor

from krona_hub.errors import NonFiniteError
from krona_hub.merging.arithmetic.patches import Patch
from krona_hub.merging.arithmetic.rounding import NEAREST, Rounding
from krona_hub.merging.arithmetic.tiles import merge_tensor
from krona_hub.verification.merge_strengths import (
    WeightSample,
    as_asked,
    found_strengths,
    in_words,
    sample,
    unexplained,
)
from krona_hub.verification.report import State, TensorCheck
from krona_hub.verification.ulps import Apart

TRUE = Rounding(exact=True)  # float64 sums; a merge makes float32 ones, NEAREST: one unit from either will do
RARE = 1e-4  # share of numbers that another order of float32 sums may round the other way
MANY = 0.01  # share of unequal numbers from which it was another arithmetic, and no single numbers that changed

Patches = Sequence[Sequence[Patch]]  # of each adapter, at the strengths that were asked for


@dataclass(frozen=True, eq=False)
class TensorOutcome:
    """A check, and for a tensor with other strengths what they were estimated from."""

    check: TensorCheck
    numbers: WeightSample | None = None


def check_touched(
    start: TensorCheck, weight: Tensor, merged: Tensor, patches: Patches, weights: Sequence[float], exact: bool
) -> TensorOutcome:
    """Whether `merged` is round(W + Σ w·ΔW) to one unit in the last place (bit for bit with `exact`).

    `weights` are those of the adapters; those of the patches are multiples of them where blocks have weights too.

    One unit is much where a delta is small: so where more than a few numbers are not equal bit for bit, the change as a
    whole must be that of the adapters at the strengths that were asked for.
    """
    every = [patch for own in patches for patch in own]
    apart = _apart(weight, merged, every, NEAREST)
    if _near(apart, exact) and apart.unequal <= RARE * apart.elements:
        return TensorOutcome(_told(start, apart))
    at_one = [[replace(p, weight=p.weight / w) for p in own] for own, w in zip(patches, weights, strict=True)]
    numbers = sample(weight, merged, at_one)
    right = as_asked(numbers, torch.tensor(weights, dtype=torch.float64))
    if right and not _near(apart, exact):
        apart = min(apart, _apart(weight, merged, every, TRUE), key=lambda x: (x.worst, x.unequal))
    check = _told(start, apart)
    return TensorOutcome(check) if right and _near(apart, exact) else _diagnosed(check, numbers, right)


def _near(apart: Apart, exact: bool) -> bool:
    return apart.worst <= 1 and not (exact and apart.unequal)


def _told(check: TensorCheck, apart: Apart) -> TensorCheck:
    return replace(check, unequal=apart.unequal, worst_units=apart.worst)


def _apart(weight: Tensor, merged: Tensor, patches: Sequence[Patch], rounding: Rounding) -> Apart:
    apart, flat = Apart(), merged.reshape(-1)
    try:
        merge_tensor(
            weight,
            patches,
            lambda first, tile: apart.add(tile, flat[first : first + len(tile)]),
            out_dtype=merged.dtype,
            rounding=rounding,
        )
    except NonFiniteError:  # the sum does not fit the type, whatever is there
        return Apart(merged.numel(), merged.numel(), inf)
    return apart


def _diagnosed(check: TensorCheck, numbers: WeightSample, right: bool) -> TensorOutcome:
    strengths = found_strengths(numbers)
    state: State = "differs"
    if not bool(numbers.change.any()):
        state = "not merged"
    elif numbers.explains(strengths) and not right:
        state = "other strength"
    elif numbers.explains(strengths) and check.unequal >= MANY * check.elements:
        state = "rounded otherwise"
    told = replace(
        check, state=state, strengths=in_words(numbers, strengths), unexplained=unexplained(numbers, strengths)
    )
    return TensorOutcome(told, numbers)


def check_untouched(start: TensorCheck, weight: Tensor, merged: Tensor, exact: bool) -> TensorOutcome:
    """Whether a tensor that no adapter is for has the base's bytes, or in another type its numbers to one unit."""
    apart = Apart()
    apart.add((weight if weight.dtype == merged.dtype else weight.to(merged.dtype)).reshape(-1), merged.reshape(-1))
    allowed = 1 if weight.dtype != merged.dtype and not exact else 0
    same = not apart.unequal or (allowed and apart.worst <= allowed)
    state: State = "same" if same else "touched"
    return TensorOutcome(replace(start, state=state, unequal=apart.unequal, worst_units=apart.worst))
