"""Select the layers to train and their factorizations, and create the initial adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.bases.base import Base
from krona_hub.bases.module_spec import ModuleSpec
from krona_hub.bases.target_sets import choose
from krona_hub.errors import BaseMismatchError, ShapeError, UsageError
from krona_hub.kron.shapes import KronShape, choices, parse_shape, smallest_split, split
from krona_hub.kron.terms import KronTerms, LowRank, nearest_kron, stored_rank
from krona_hub.pipelines.randomness import generator
from krona_hub.training.settings import TrainingSettings

NONE = "none"  # value of --text-encoders
DEFAULT_FACTOR = 2.0  # default budget of `auto`, in multiples of the smallest factorization
MARGIN = 3  # maximum number of names in an error message


@dataclass(frozen=True)
class TrainedLayer:
    """A layer to train, and the factorization of its delta."""

    layer: str  # canonical name
    module: ModuleSpec
    shape: KronShape
    terms: int
    rank: int | None  # of B

    @property
    def parameters(self) -> int:
        """Number of parameters: terms · (a1·a2 + b1·b2), or terms · (a1·a2 + r·(b1 + b2)) if B has rank r."""
        s = self.shape
        b = s.b1 * s.b2 if self.rank is None else self.rank * (s.b1 + s.b2)
        return self.terms * (s.a1 * s.a2 + b)


def plan_targets(base: Base, settings: TrainingSettings) -> tuple[TrainedLayer, ...]:
    """Return the layers to train, in the order of the base model.

    Raises UsageError if a pattern matches no layer, and ShapeError if shapes do not divide layers (the error counts
    them) or no shapes fit within the budget.
    """
    layers = picked_layers(base, settings)
    own = _own_shapes(layers, settings)
    free = {layer: m for layer, m in layers.items() if own.get(layer, settings.shape) == "auto"}
    automatic = _automatic(free, settings, _spent(layers, own, settings))
    problems: dict[str, ShapeError] = {}
    found = []
    for layer, module in layers.items():
        try:
            shape = automatic.get(layer) or split(module.matrix, *parse_shape(own.get(layer, settings.shape)))
            found.append(_target(layer, module, shape, settings))
        except ShapeError as error:
            problems[layer] = error
    if problems:
        first, why = next(iter(problems.items()))
        raise ShapeError(f"{len(problems)} of {len(layers)} layers do not fit; {first}: {why.cause}", fix=why.fix)
    return tuple(found)


def picked_layers(base: Base, settings: TrainingSettings) -> dict[str, ModuleSpec]:
    """Return the modules of the denoiser and, if requested, of the text encoders, by canonical layer name."""
    if base.denoiser is None:
        raise BaseMismatchError(
            f"{base.name} has no denoiser to train.", fix="Specify a complete pipeline with --base."
        )
    layers = choose(base, base.denoiser, settings.targets)
    if settings.text_encoders != NONE:
        if not base.text_encoders:
            raise UsageError(f"{base.name} has no text encoder to train.", fix="Remove --text-encoders.")
        for component in base.text_encoders:
            layers |= choose(base, component, settings.text_encoders)
    return layers


def _own_shapes(layers: Mapping[str, ModuleSpec], settings: TrainingSettings) -> dict[str, str]:
    """Return shapes by layer; the last matching pattern wins. Raises UsageError if a pattern matches no layer."""
    own: dict[str, str] = {}
    for pattern, shape in settings.shapes.items():
        found = [layer for layer in layers if re.search(pattern, layer)]
        if not found:
            raise UsageError(
                f"Pattern {pattern!r} in [shapes] matches none of the {len(layers)} trained layers.",
                fix=f"Match names such as {', '.join(list(layers)[:MARGIN])}.",
            )
        own |= dict.fromkeys(found, shape)
    return own


def _target(layer: str, module: ModuleSpec, shape: KronShape, settings: TrainingSettings) -> TrainedLayer:
    if settings.terms > shape.max_terms:
        raise ShapeError(
            f"{shape} with {shape.max_terms} terms represents any matrix; {settings.terms} terms were requested.",
            fix=f"Use --terms {shape.max_terms} or less, or another shape.",
        )
    low = settings.rank is not None and settings.rank < min(shape.b1, shape.b2)
    return TrainedLayer(layer, module, shape, settings.terms, settings.rank if low else None)


# --- auto ------------------------------------------------------------------------------------------------------------


def _spent(layers: Mapping[str, ModuleSpec], own: Mapping[str, str], settings: TrainingSettings) -> int:
    """Return the parameters of the layers with a given shape. Shapes that do not divide are reported elsewhere."""
    total = 0
    for layer, module in layers.items():
        if (shape := own.get(layer, settings.shape)) != "auto":
            with suppress(ShapeError):
                total += _target(layer, module, split(module.matrix, *parse_shape(shape)), settings).parameters
    return total


def _automatic(layers: Mapping[str, ModuleSpec], settings: TrainingSettings, spent: int) -> dict[str, KronShape]:
    """Choose shapes for layers without a given shape. Layers of equal size get equal shapes.

    The budget is shared in proportion to the parameters of the smallest factorization of each layer. Without a budget,
    a layer gets DEFAULT_FACTOR times that, which is about the size of a LoRA of rank 2.
    """
    least = {m.matrix: smallest_split(m.matrix).parameters * settings.terms for m in layers.values()}
    total = sum(least[m.matrix] for m in layers.values())
    factor = DEFAULT_FACTOR if settings.budget is None else (settings.budget - spent) / max(total, 1)
    chosen = {size: _best_within(size, factor * least[size], settings) for size in sorted(least)}
    return {layer: chosen[m.matrix] for layer, m in layers.items()}


def _best_within(size: tuple[int, int], parameters: float, settings: TrainingSettings) -> KronShape:
    """Return the shape of the highest rank within a number of parameters, and of several the one that uses most."""
    possible = [s for s in choices(*size) if settings.terms <= s.max_terms]
    costs = {s: _parameters_of(s, settings) for s in possible}
    fitting = [s for s in possible if costs[s] <= parameters]
    if not fitting:
        raise ShapeError(
            f"A layer of {size[0]}x{size[1]} needs {min(costs.values(), default=0):,} parameters, but its share of the "
            f"budget is {max(0, int(parameters)):,}.",
            fix="Increase --budget, or reduce --targets or --terms.",
        )
    return min(fitting, key=lambda s: (-highest_rank(s, settings.terms, settings.rank), -costs[s], work(s), s))


def _parameters_of(shape: KronShape, settings: TrainingSettings) -> int:
    return _target("", ModuleSpec(shape.full), shape, settings).parameters


def highest_rank(s: KronShape, terms: int = 1, rank: int | None = None) -> int:
    """Return the maximum rank of ΔW: the rank of A times the rank of B, summed over the terms.

    >>> highest_rank(KronShape(64, 4, 5, 192)), highest_rank(KronShape(64, 4, 5, 192), rank=2)
    (20, 8)
    """
    right = min(s.b1, s.b2) if rank is None else min(s.b1, s.b2, rank)
    return min(*s.full, terms * min(s.a1, s.a2) * right)


def work(s: KronShape) -> int:
    """Return the multiplications per token of (A ⊗ B) x in the cheaper of its two orders.

    >>> work(KronShape(64, 4, 5, 192))
    5120
    """
    right_first = s.a2 * s.b2 * s.b1 + s.a2 * s.a1 * s.b1
    left_first = s.a1 * s.a2 * s.b2 + s.a1 * s.b2 * s.b1
    return min(right_first, left_first)


# --- initial adapter -------------------------------------------------------------------------------------------------


def fresh_adapter(targets: tuple[TrainedLayer, ...], settings: TrainingSettings) -> Adapter:
    """Return an adapter with A ~ N(0, 1/a1²) and B = 0, as in DiffuseKronA, so that ΔW = 0.

    The random numbers of a layer depend on its name, not on the other layers.
    """
    return Adapter({t.layer: LayerDelta((_fresh(t, settings),), t.module.shape) for t in targets})


def _fresh(target: TrainedLayer, settings: TrainingSettings) -> KronTerms:
    s, source = target.shape, generator(settings.seed, f"init {target.layer}")
    a = torch.randn(target.terms, s.a1, s.a2, generator=source) / s.a1
    if target.rank is None:
        return KronTerms(a, torch.zeros(target.terms, s.b1, s.b2), settings.rows)
    down = torch.randn(target.terms, target.rank, s.b2, generator=source) / target.rank
    return KronTerms(a, LowRank(torch.zeros(target.terms, s.b1, target.rank), down), settings.rows)


def started_from(adapter: Adapter, base: Base, settings: TrainingSettings) -> Adapter:
    """Return an initial adapter made from an existing one.

    Without a requested shape, it is used as it is. Otherwise, a delta with another factorization is replaced by the
    nearest Kronecker sum, and layers that the adapter lacks start from zero. Vectors stay as they are in both cases.
    """
    if settings.shape == "auto" and not settings.shapes:
        return Adapter(
            {layer: _in_float32(d) for layer, d in adapter.layers.items()},
            extras=adapter.extras,
            vectors=adapter.vectors,
        )
    targets = plan_targets(base, settings)
    fresh = fresh_adapter(targets, settings)
    foreign = [layer for layer in adapter.layers if layer not in fresh.layers]
    if foreign:
        raise BaseMismatchError(
            f"--init contains {len(foreign)} layers that are not trained: {', '.join(foreign[:MARGIN])}.",
            fix="Extend --targets, or use an adapter for the trained layers only.",
        )
    near = {t.layer: _nearest(adapter.layers[t.layer], t, settings) for t in targets if t.layer in adapter.layers}
    return Adapter({**fresh.layers, **near}, vectors=adapter.vectors)


def _in_float32(delta: LayerDelta) -> LayerDelta:
    """Copy the factors, in float32 at least, so that they no longer depend on the file."""

    def copied(t: Tensor) -> Tensor:
        return t.to(torch.promote_types(t.dtype, torch.float32), copy=True)

    return delta.map(copied)


def _nearest(delta: LayerDelta, target: TrainedLayer, settings: TrainingSettings) -> LayerDelta:
    if len(delta.sums) == 1 and _has_factorization(delta.sums[0], target, settings):
        return _in_float32(delta)
    if delta.magnitude is not None or target.rank is not None:
        raise UsageError(
            f"{target.layer}: --init with DoRA, or with --rank, cannot be replaced by the nearest Kronecker sum.",
            fix="Remove --rank or --init.",
        )
    dense = delta.low_rank_delta().reshape(delta.matrix_shape)
    if not dense.any():  # the nearest sum to zero has two zero factors, which have no gradient
        return LayerDelta((_fresh(target, settings),), target.module.shape)
    if settings.rows == "shuffled":  # restore the row order of A ⊗ B
        dense = dense.reshape(target.shape.b1, target.shape.a1, -1).transpose(0, 1).reshape(dense.shape)
    near = nearest_kron(dense, target.shape, target.terms).terms
    return LayerDelta((KronTerms(near.left, near.right, settings.rows),), delta.weight_shape)


def _has_factorization(terms: KronTerms, target: TrainedLayer, settings: TrainingSettings) -> bool:
    rank = stored_rank(terms.right)
    return (terms.shape, terms.terms, terms.rows, rank) == (target.shape, target.terms, settings.rows, target.rank)
