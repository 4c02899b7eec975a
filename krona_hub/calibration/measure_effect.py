"""Measure on recorded calls what a smaller adapter keeps of the effect of its source, and fit its strength."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.adapters.adapter import Adapter
from krona_hub.calibration.denoiser_calls import DenoiserCall, RepeatedCall, outputs_of
from krona_hub.errors import NonFiniteError
from krona_hub.layers import attach, detach, set_scales
from krona_hub.pipelines.randomness import generator

SOURCE, RESULT = "krona-calibration-source", "krona-calibration-result"  # names of attached adapters
RESAMPLES = 1000  # of the prompts, for a 95 % range
GAINS = (0.9, 1.5)  # range of the fitted gain
GAIN_STEPS = 8  # of a golden-section search: the gain is known to 0.02
GOLDEN = (5**0.5 - 1) / 2
Groups = Sequence[Sequence[DenoiserCall]]  # recorded calls by prompt


class Squares(NamedTuple):
    """Sums of squares over the outputs of one prompt."""

    effect: float  # ‖source − base‖²
    lost: float  # ‖result − source‖²
    change: float  # ‖result − base‖²
    along: float  # ⟨result − base, source − base⟩


@dataclass(frozen=True)
class EffectSums:
    """What is kept over the outputs of several prompts."""

    squares: tuple[Squares, ...]

    @property
    def effect(self) -> float:
        return _ratio(self.squares, lambda s: s.lost, complement=True)

    @property
    def drift(self) -> float:
        return _ratio(self.squares, lambda s: s.change)

    @property
    def strength(self) -> float:
        return _ratio(self.squares, lambda s: s.along)

    def effect_range(self, seed: int) -> tuple[float, float]:
        """Return the 2.5 and 97.5 percentiles of the effect over prompts sampled with replacement."""
        source = generator(seed, "calibrate resampling")
        picks = torch.randint(len(self.squares), (RESAMPLES, len(self.squares)), generator=source)
        lost, whole = (torch.tensor([getattr(s, name) for s in self.squares]) for name in ("lost", "effect"))
        kept = 1 - lost[picks].sum(1) / whole[picks].sum(1)
        low, high = torch.quantile(kept.double(), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return low, high


def _ratio(squares: Sequence[Squares], part: Callable[[Squares], float], *, complement: bool = False) -> float:
    whole = sum(s.effect for s in squares)
    share = sum(map(part, squares)) / whole if whole else 0.0
    return 1 - share if complement else share


class References(NamedTuple):
    """Outputs of the base model and with the source adapter, by prompt, each (calls, …) on the CPU."""

    groups: Groups
    base: list[Tensor]
    source: list[Tensor]

    @property
    def effects(self) -> float:
        """Return the mean square of source − base per value."""
        squares = sum(float((s - b).double().square().sum()) for s, b in zip(self.source, self.base, strict=True))
        return squares / max(1, sum(b.numel() for b in self.base))


def references(how: RepeatedCall, groups: Groups, tick: Callable[[int], None] = lambda _done: None) -> References:
    """Compute the outputs without and with the source adapter, which must be attached as SOURCE.

    Raises NonFiniteError if an output is NaN or infinite.
    """
    base, source = [], []
    for calls in groups:
        set_scales(how.pipe, {SOURCE: 0.0})
        base.append(_outputs(how, calls, "the base model"))
        set_scales(how.pipe, {SOURCE: 1.0})
        source.append(_outputs(how, calls, "the base model with the adapter"))
        tick(len(calls))
    return References(groups, base, source)


def measured(how: RepeatedCall, known: References, result: Adapter, gain: float = 1.0) -> EffectSums:
    """Return what a result keeps on the calls of `known`, at a strength of `gain`."""
    with attached_result(how, result, gain):
        outputs = [_outputs(how, calls, "the base model with the result") for calls in known.groups]
    return EffectSums(tuple(map(_squares, known.base, known.source, outputs)))


@contextmanager
def attached_result(how: RepeatedCall, result: Adapter, gain: float) -> Iterator[None]:
    """Let the pipeline compute with the result instead of the source within the block."""
    set_scales(how.pipe, {SOURCE: 0.0})
    if result.layers or result.vectors:
        attach(how.pipe, result, RESULT, gain)
    try:
        yield
    finally:
        if result.layers or result.vectors:
            detach(how.pipe, RESULT)
        set_scales(how.pipe, {SOURCE: 1.0})


def fitted_gain(how: RepeatedCall, kinds: Sequence[References], result: Adapter) -> float:
    """Return the strength at which a result keeps most of the effect, to 0.02, by golden-section search.

    A least-squares cut is quieter than its source: the parts that were left out are missing from the strength, too.
    Every kind of prompts counts alike: pooled, those with the subject, which change most, would alone decide, and the
    others would drift.
    """
    seen: dict[float, float] = {}

    def effect(gain: float) -> float:
        if gain not in seen:
            seen[gain] = sum(measured(how, known, result, gain).effect for known in kinds) / len(kinds)
        return seen[gain]

    low, high = GAINS
    for _ in range(GAIN_STEPS):
        left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
        low, high = (low, right) if effect(left) >= effect(right) else (left, high)
    effect(1.0)
    best, _ = max(seen.items(), key=lambda item: (item[1], item[0] == 1.0))
    return round(best, 3)


@torch.no_grad()
def _outputs(how: RepeatedCall, calls: Sequence[DenoiserCall], what: str) -> Tensor:
    out = torch.cat([y.flatten(0, -1)[None] for y in outputs_of(how, calls)]).float().cpu()
    if not bool(out.isfinite().all()):
        raise NonFiniteError(
            f"The output of {what} is NaN or infinite.", fix="Use --dtype float32 or bfloat16, or check the adapter."
        )
    return out


def _squares(base: Tensor, source: Tensor, result: Tensor) -> Squares:
    effect, change = (source - base).double(), (result - base).double()
    return Squares(
        float(effect.square().sum()),
        float((change - effect).square().sum()),
        float(change.square().sum()),
        float((change * effect).sum()),
    )
