"""Select promising Kronecker shapes: by the factors of a low-rank LoRA, or by products with random vectors."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from math import ceil, exp, floor, inf, log, sqrt
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.extraction.error_curves import Allowed, ErrorCurve, cost, price_of_a_number
from krona_hub.extraction.fit_plan import FitPlan
from krona_hub.extraction.layer_difference import LayerDifference, lora_shape
from krona_hub.extraction.tensor_pairs import LayerPair
from krona_hub.kron.candidates import Factorization, is_lora, realize
from krona_hub.kron.factorization_search import smallest_within
from krona_hub.kron.parallel import in_parallel
from krona_hub.kron.shapes import KronShape
from krona_hub.kron.shapes import choices as shapes_of
from krona_hub.kron.terms import KronTerms

SCREENED = 3  # layers of each size that are screened for all shapes
LIKELY = 12  # shapes per screened layer that are evaluated in detail
KEPT = 4  # shapes that are evaluated on all layers of that size
PROMISE = 0.8  # of the size of the LoRA
BUCKET = 1.05  # errors allowed within this factor of each other are searched together


def best_shapes(pairs: Sequence[LayerPair], plan: FitPlan) -> dict[tuple[int, int], list[KronShape]]:
    """Return, per matrix size, the shapes that concentrate the energy of the screened layers."""
    by_size: dict[tuple[int, int], list[LayerPair]] = defaultdict(list)
    for pair in pairs:
        by_size[pair.size].append(pair)
    some = [pair for members in by_size.values() for pair in members[:SCREENED]]
    best: dict[tuple[int, int], Counter[KronShape]] = {size: Counter() for size in by_size}
    for pair, shapes in in_parallel(partial(_screened, plan), some, plan.threads):
        best[pair.size].update(shapes)
    return {size: [shape for shape, _ in found.most_common(KEPT)] for size, found in best.items()}


def _screened(plan: FitPlan, pair: LayerPair) -> list[KronShape]:
    """Return the shapes by estimated size: the terms that the energy is spread over, times the parameters per term.

    Only shapes with an estimate below that of the LoRA remain; for an unstructured delta, the LoRA's is as low as any.
    """
    difference, allowed = LayerDifference.of(pair), plan.allowed(pair.shape)
    if difference is None:
        return []

    def size(shape: KronShape) -> float:
        return difference.rearranged(shape).concentration() * shape.parameters

    limit = PROMISE * size(lora_shape(difference.size))
    possible = (s for s in shapes_of(*difference.size) if not is_lora(s, None) and s.parameters < limit)
    sizes = {shape: size(shape) for shape in possible if allowed(shape, 1, None)}
    likely = sorted((s for s in sizes if sizes[s] < limit), key=lambda s: (sizes[s], s))[:LIKELY]
    curves = {shape: difference.curve_to_noise(shape, plan.request.max_error) for shape in likely}
    price = price_of_a_number(difference.noise.energy, difference.size)
    return sorted(likely, key=lambda s: (_cost(curves[s], plan.request.max_error, price), s))[:KEPT]


def _cost(curve: ErrorCurve, max_error: float | None, price: float) -> float:
    """Return the parameters within `max_error`, or without one the `cost` of all terms above the noise."""
    if max_error is not None:
        terms = curve.needed(max_error)
        return inf if terms is None else terms * curve.shape.parameters
    return cost(curve.form(curve.above), curve.left[0], price) if curve.above else inf


class Thin(NamedTuple):
    """A layer whose LoRA above the noise is known."""

    pair: LayerPair
    curve: ErrorCurve
    lora: KronTerms
    chosen: Factorization  # a LoRA too; alternatives must be smaller


def smaller_than_lora(plan: FitPlan, layers: Sequence[Thin]) -> dict[LayerPair, KronTerms]:
    """Return the layers that a Kronecker sum represents as well as the LoRA, with fewer parameters."""
    groups: dict[tuple[tuple[int, ...], float], list[Thin]] = defaultdict(list)
    for layer in layers:
        error = _allowed_error(plan, layer.curve)
        if error > 0:
            groups[layer.pair.shape, _bucket(plan, error)].append(layer)
    return {
        pair: sums
        for (weight, error), members in groups.items()
        for pair, sums in _smaller(plan, weight, error, members)
    }


def _allowed_error(plan: FitPlan, curve: ErrorCurve) -> float:
    """Return the allowed relative error against the LoRA above the noise; 0.0 allows none.

    Down to the noise, a factorization need not reproduce the noise in the LoRA, and may lose a term at its edge.
    """
    kept, rest = curve.left[0] - curve.left[curve.above], curve.left[curve.above]
    if plan.request.max_error is not None:
        return sqrt(max(0.0, plan.request.max_error**2 * curve.left[0] - rest) / kept)
    out, in_ = curve.shape.full
    of_one_number = curve.floor**2 / (sqrt(out) + sqrt(in_)) ** 2
    return min(0.5, sqrt((curve.above * (out + in_) * of_one_number + curve.floor**2) / kept))


def _bucket(plan: FitPlan, error: float) -> float:
    """Round the error to a power of BUCKET (down if the user set it), so that layers of one limit share a search."""
    step = log(error) / log(BUCKET)
    return exp((ceil(step) if plan.request.max_error is None else floor(step)) * log(BUCKET))


def _smaller(
    plan: FitPlan, weight: tuple[int, ...], error: float, members: Sequence[Thin]
) -> Iterator[tuple[LayerPair, KronTerms]]:
    loras = [_factors(layer.lora) for layer in members]
    choices = smallest_within(loras, error, allowed=_capped(plan, weight), others_within=1.0)
    for layer, (up, down), choice in zip(members, loras, choices, strict=True):
        if not choice.form.is_lora and choice.form.parameters < layer.chosen.parameters:
            yield layer.pair, realize(up, down, choice.form).terms.to(torch.float32)


def _factors(lora: KronTerms) -> tuple[Tensor, Tensor]:
    _, up, down = lora.tensors
    return up[0], down[0]


def _capped(plan: FitPlan, weight: tuple[int, ...]) -> Allowed:
    """Return the predicate of the target, limited to the requested number of terms."""
    allowed, most = plan.allowed(weight), plan.request.terms

    def capped(shape: KronShape, terms: int, right_rank: int | None) -> bool:
        return (most is None or terms <= most) and allowed(shape, terms, right_rank)

    return capped
