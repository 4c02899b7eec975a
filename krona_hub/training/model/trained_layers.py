"""Which layers are trained, with which shape, and the adapter that they start from."""

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
from krona_hub.training.randomness import generator
from krona_hub.training.settings import TrainingSettings

NONE = "none"  # as --text-encoders
USUAL = 2.0  # times the cheapest split: what `auto` spends where nobody gave a budget
MARGIN = 3  # names in a message


@dataclass(frozen=True)
class TrainedLayer:
    """A layer to train, and the form of its delta."""

    layer: str  # canonical
    module: ModuleSpec
    shape: KronShape
    terms: int
    rank: int | None  # of B

    @property
    def parameters(self) -> int:
        """terms · (a1·a2 + b1·b2), or with B of rank r: terms · (a1·a2 + r·(b1 + b2))."""
        s = self.shape
        b = s.b1 * s.b2 if self.rank is None else self.rank * (s.b1 + s.b2)
        return self.terms * (s.a1 * s.a2 + b)


def plan_targets(base: Base, settings: TrainingSettings) -> tuple[TrainedLayer, ...]:
    """Every layer that is trained, in the order of the base.

    Raises UsageError where a pattern picks nothing, ShapeError where a shape does not divide a layer (all such layers
    are counted), and where no shapes keep within the budget.
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
    """Canonical layer -> module, of the denoiser and, where wanted, of the text encoders."""
    if base.denoiser is None:
        raise BaseMismatchError(f"{base.name} has no denoiser to train.", fix="Give a whole pipeline.")
    layers = choose(base, base.denoiser, settings.targets)
    if settings.text_encoders != NONE:
        if not base.text_encoders:
            raise UsageError(f"{base.name} has no text encoder to train.", fix="Leave out --text-encoders.")
        for component in base.text_encoders:
            layers |= choose(base, component, settings.text_encoders)
    return layers


def _own_shapes(layers: Mapping[str, ModuleSpec], settings: TrainingSettings) -> dict[str, str]:
    """Layer -> the shape of the last pattern that finds it. Raises UsageError for a pattern that finds none."""
    own: dict[str, str] = {}
    for pattern, shape in settings.shapes.items():
        found = [layer for layer in layers if re.search(pattern, layer)]
        if not found:
            raise UsageError(
                f"[shapes] {pattern!r} finds none of the {len(layers)} layers that are trained.",
                fix=f"They are called {', '.join(list(layers)[:MARGIN])}, …",
            )
        own |= dict.fromkeys(found, shape)
    return own


def _target(layer: str, module: ModuleSpec, shape: KronShape, settings: TrainingSettings) -> TrainedLayer:
    if settings.terms > shape.max_terms:
        raise ShapeError(
            f"{shape} of {shape.max_terms} terms is any matrix; {settings.terms} are asked for.",
            fix=f"Ask for at most {shape.max_terms}, or another shape.",
        )
    low = settings.rank is not None and settings.rank < min(shape.b1, shape.b2)
    return TrainedLayer(layer, module, shape, settings.terms, settings.rank if low else None)


# --- auto ------------------------------------------------------------------------------------------------------------


def _spent(layers: Mapping[str, ModuleSpec], own: Mapping[str, str], settings: TrainingSettings) -> int:
    """Parameters of the layers whose shape is given; what does not divide is told elsewhere."""
    total = 0
    for layer, module in layers.items():
        if (shape := own.get(layer, settings.shape)) != "auto":
            with suppress(ShapeError):
                total += _target(layer, module, split(module.matrix, *parse_shape(shape)), settings).parameters
    return total


def _automatic(layers: Mapping[str, ModuleSpec], settings: TrainingSettings, spent: int) -> dict[str, KronShape]:
    """The shape of each layer that nobody gave one: layers of equal size get equal shapes.

    The budget is shared in proportion to what the layers' cheapest splits have. Without a budget, a layer gets USUAL
    times that: the size of a LoRA of rank 2.
    """
    least = {m.matrix: smallest_split(m.matrix).parameters * settings.terms for m in layers.values()}
    whole = sum(least[m.matrix] for m in layers.values())
    factor = USUAL if settings.budget is None else (settings.budget - spent) / max(whole, 1)
    chosen = {size: _best_within(size, factor * least[size], settings) for size in sorted(least)}
    return {layer: chosen[m.matrix] for layer, m in layers.items()}


def _best_within(size: tuple[int, int], parameters: float, settings: TrainingSettings) -> KronShape:
    """The split of the highest rank that so many parameters allow; of several the one that uses most of them."""
    possible = [s for s in choices(*size) if settings.terms <= s.max_terms]
    costs = {s: _form_parameters(s, settings) for s in possible}
    fitting = [s for s in possible if costs[s] <= parameters]
    if not fitting:
        raise ShapeError(
            f"a layer of {size[0]}x{size[1]} needs {min(costs.values(), default=0):,} parameters, and its share of the "
            f"budget is {max(0, int(parameters)):,}.",
            fix="Give a larger --budget, fewer --targets or fewer --terms.",
        )
    return min(fitting, key=lambda s: (-highest_rank(s, settings.terms, settings.rank), -costs[s], work(s), s))


def _form_parameters(shape: KronShape, settings: TrainingSettings) -> int:
    return _target("", ModuleSpec(shape.full), shape, settings).parameters


def highest_rank(s: KronShape, terms: int = 1, rank: int | None = None) -> int:
    """The rank that ΔW can have: of A times that of B, for each term.

    >>> highest_rank(KronShape(64, 4, 5, 192)), highest_rank(KronShape(64, 4, 5, 192), rank=2)
    (20, 8)
    """
    right = min(s.b1, s.b2) if rank is None else min(s.b1, s.b2, rank)
    return min(*s.full, terms * min(s.a1, s.a2) * right)


def work(s: KronShape) -> int:
    """Multiplications per token of (A ⊗ B) x in the better of its two orders.

    >>> work(KronShape(64, 4, 5, 192))
    5120
    """
    right_first = s.a2 * s.b2 * s.b1 + s.a2 * s.a1 * s.b1
    left_first = s.a1 * s.a2 * s.b2 + s.a1 * s.b2 * s.b1
    return min(right_first, left_first)


# --- the adapter to start from ---------------------------------------------------------------------------------------


def fresh_adapter(targets: tuple[TrainedLayer, ...], settings: TrainingSettings) -> Adapter:
    """A ~ N(0, 1/a1²), B = 0, as DiffuseKronA: the model starts as its base. Each layer draws by its own name."""
    return Adapter({t.layer: LayerDelta((_fresh(t, settings),), t.module.shape) for t in targets})


def _fresh(target: TrainedLayer, settings: TrainingSettings) -> KronTerms:
    s, source = target.shape, generator(settings.seed, f"init {target.layer}")
    a = torch.randn(target.terms, s.a1, s.a2, generator=source) / s.a1
    if target.rank is None:
        return KronTerms(a, torch.zeros(target.terms, s.b1, s.b2), settings.rows)
    down = torch.randn(target.terms, target.rank, s.b2, generator=source) / target.rank
    return KronTerms(a, LowRank(torch.zeros(target.terms, s.b1, target.rank), down), settings.rows)


def started_from(adapter: Adapter, base: Base, settings: TrainingSettings) -> Adapter:
    """An earlier adapter as the start: as it is, where no shape was asked for; else each delta in the asked form.

    A delta that is not in the form becomes the nearest one, by nearest_kron. Layers that it lacks start from zero.
    """
    if settings.shape == "auto" and not settings.shapes:
        return Adapter({layer: _in_float32(d) for layer, d in adapter.layers.items()}, extras=adapter.extras)
    targets = plan_targets(base, settings)
    fresh = fresh_adapter(targets, settings)
    foreign = [layer for layer in adapter.layers if layer not in fresh.layers]
    if foreign:
        raise BaseMismatchError(
            f"--init has {len(foreign)} layers that are not trained: {', '.join(foreign[:MARGIN])}.",
            fix="Widen --targets, or give an adapter of these layers.",
        )
    near = {t.layer: _nearest(adapter.layers[t.layer], t, settings) for t in targets if t.layer in adapter.layers}
    return fresh.with_layers({**fresh.layers, **near})


def _in_float32(delta: LayerDelta) -> LayerDelta:
    """With factors of float32 at least, which no file backs any more."""

    def wide(t: Tensor) -> Tensor:
        return t.to(torch.promote_types(t.dtype, torch.float32), copy=True)

    return delta.map(wide)


def _nearest(delta: LayerDelta, target: TrainedLayer, settings: TrainingSettings) -> LayerDelta:
    if len(delta.sums) == 1 and _is_form(delta.sums[0], target, settings):
        return _in_float32(delta)
    if delta.magnitude is not None or target.rank is not None:
        raise UsageError(
            f"{target.layer}: DoRA and low-rank B cannot be a nearest start.", fix="Leave out --rank, or --init."
        )
    dense = delta.low_rank_delta().reshape(delta.matrix_shape)
    if not dense.any():  # the nearest to nothing has two zero factors, which no gradient moves
        return LayerDelta((_fresh(target, settings),), target.module.shape)
    if settings.rows == "shuffled":  # the rows in the order of A ⊗ B
        dense = dense.reshape(target.shape.b1, target.shape.a1, -1).transpose(0, 1).reshape(dense.shape)
    near = nearest_kron(dense, target.shape, target.terms).terms
    return LayerDelta((KronTerms(near.left, near.right, settings.rows),), delta.weight_shape)


def _is_form(terms: KronTerms, target: TrainedLayer, settings: TrainingSettings) -> bool:
    rank = stored_rank(terms.right)
    return (terms.shape, terms.terms, terms.rows, rank) == (target.shape, target.terms, settings.rows, target.rank)
