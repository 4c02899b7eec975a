"""The ways applied: every layer of an adapter to the form that was asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

import torch

from krona_hub.adapter import LayerDelta
from krona_hub.conversion.forms import Lora, exact_lora_of, is_lora, size_of, with_lora
from krona_hub.conversion.ways import Budget, Exact, FixedShape, Keep, MaxError, Rank, Way
from krona_hub.errors import KronaError, ShapeError, UsageError
from krona_hub.kron.lowrank import nearest_kron_of_lora, nearest_lora
from krona_hub.kron.search import Choice, realise, smallest_within, within_budget
from krona_hub.kron.shapes import KronShape, nearest_split, split
from krona_hub.kron.terms import KronTerms, LowRank, nearest_kron

Layers = Mapping[str, LayerDelta]
# May the target hold this many terms of this shape, B of this rank (None: dense), on this weight?
Loads = Callable[[tuple[int, ...], KronShape, int, int | None], bool]
Progress = Callable[[int, int], None] | None


@dataclass(frozen=True)
class Outcome:
    """One layer after a way."""

    delta: LayerDelta
    note: str = ""
    best_other: str | None = None


def apply_way(layers: Layers, way: Way, loads: Loads, to_lora: bool, progress: Progress = None) -> dict[str, Outcome]:
    """Every layer in the form that `way` asks for; `to_lora` restricts the forms to LoRAs."""
    match way:
        case Keep():
            return {name: Outcome(delta) for name, delta in layers.items()}
        case Exact():
            return {name: Outcome(_as_lora(delta) if to_lora else delta) for name, delta in layers.items()}
        case Rank(rank):
            return {name: Outcome(_nearest_lora(delta, rank=rank)) for name, delta in layers.items()}
        case MaxError(error) if to_lora:
            return {name: Outcome(_nearest_lora(delta, max_error=error)) for name, delta in layers.items()}
        case FixedShape():
            return _fixed_shapes(layers, way, progress)
        case MaxError() | Budget():
            return _searched(layers, way, _only_loras if to_lora else loads, progress)


def _as_lora(delta: LayerDelta) -> LayerDelta:
    return delta if is_lora(delta) else with_lora(delta, exact_lora_of(delta))


def _nearest_lora(delta: LayerDelta, *, rank: int | None = None, max_error: float | None = None) -> LayerDelta:
    """The best LoRA of that rank, or the smallest within that error; a LoRA that fits already is left alone."""
    if rank is not None:
        rank = min(rank, *delta.matrix_shape)
    fit = nearest_lora(delta.sums, rank=rank, max_error=max_error)
    if is_lora(delta) and fit.up.shape[1] >= sum(_rank(s) for s in delta.sums):
        return delta
    return with_lora(delta, Lora(fit.up.float(), fit.down.float()))


def _rank(terms: KronTerms) -> int:
    return terms.terms * terms.right.rank if isinstance(terms.right, LowRank) else min(terms.shape.full)


def _only_loras(weight_shape: tuple[int, ...], shape: KronShape, terms: int, right_rank: int | None) -> bool:
    return shape[:2] == (1, 1) and right_rank is not None


# --- one shape for every layer ---------------------------------------------------------------------------------


def _fixed_shapes(layers: Layers, way: FixedShape, progress: Progress) -> dict[str, Outcome]:
    shapes = {name: _shape_for(name, delta.matrix_shape, way) for name, delta in layers.items()}
    outcomes = {}
    for done, (name, delta) in enumerate(layers.items(), 1):
        shape = shapes[name]
        terms = min(way.terms, shape.max_terms)
        note = "" if shape[:2] == (way.a1, way.a2) else f"{way.a1}x{way.a2} does not divide it: {shape.a1}x{shape.a2}"
        outcomes[name] = Outcome(replace(delta, sums=(_nearest(delta, shape, terms),)), note)
        if progress:
            progress(done, len(layers))
    return outcomes


def _shape_for(name: str, size: tuple[int, int], way: FixedShape) -> KronShape:
    try:
        return split(size, way.a1, way.a2)
    except ShapeError as e:
        if way.fallback:
            return nearest_split(size, way.a1, way.a2)
        e.fix += " Give --shape-fallback nearest to take it."
        raise e.within(name) from None


def _nearest(delta: LayerDelta, shape: KronShape, terms: int) -> KronTerms:
    """Through the factors where the delta is low-rank, else from the matrix itself in float64."""
    lora = exact_lora_of(delta)
    if 4 * lora.up.shape[1] <= min(delta.matrix_shape):
        return _single(nearest_kron_of_lora(lora.up, lora.down, shape, terms).terms)
    return _single(nearest_kron(delta.low_rank_delta().reshape(delta.matrix_shape).double(), shape, terms).terms)


def _single(terms: KronTerms) -> KronTerms:
    """New factors are stored in float32."""

    def narrow(factor: torch.Tensor | LowRank) -> torch.Tensor | LowRank:
        return LowRank(factor.up.float(), factor.down.float()) if isinstance(factor, LowRank) else factor.float()

    return replace(terms, left=narrow(terms.left), right=narrow(terms.right))


# --- the smallest form, or the best for a size -------------------------------------------------------------------


def _searched(layers: Layers, way: MaxError | Budget, loads: Loads, progress: Progress) -> dict[str, Outcome]:
    loras = {name: exact_lora_of(delta) for name, delta in layers.items()}
    allowed = _allowed_by_size(layers, loads)
    if isinstance(way, MaxError):
        choices = smallest_within(list(loras.values()), way.value, allowed=allowed, progress=progress)
    else:
        total = sum(size_of(delta)[0] for delta in layers.values())
        choices = within_budget(list(loras.values()), way.of(total), allowed=allowed, progress=progress)
    return {
        name: _outcome(delta, loras[name], choice)
        for (name, delta), choice in zip(layers.items(), choices, strict=True)
    }


def _allowed_by_size(layers: Layers, loads: Loads) -> Callable[[KronShape, int, int | None], bool]:
    """The search knows matrices: a form is allowed where every weight of that matrix size may hold it."""
    shapes: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    for delta in layers.values():
        shapes.setdefault(delta.matrix_shape, set()).add(delta.weight_shape)

    def allowed(shape: KronShape, terms: int, right_rank: int | None) -> bool:
        return all(loads(weight, shape, terms, right_rank) for weight in shapes.get(shape.full, ()))

    return allowed


def _outcome(delta: LayerDelta, lora: Lora, choice: Choice) -> Outcome:
    other = choice.best_other
    best_other = None if other is None else f"{other}, error {other.relative_error:.3f}"
    kept = size_of(delta)[0] <= choice.form.parameters
    if kept or (choice.form.is_lora and (choice.form.right_rank or inf) >= lora.up.shape[1]):
        return Outcome(delta, "the LoRA itself" if is_lora(delta) else "unchanged", best_other)
    terms = _single(realise(lora.up, lora.down, choice.form))
    note = "the LoRA itself, truncated" if choice.form.is_lora else ""
    return Outcome(replace(delta, sums=(terms,)), note, best_other if choice.form.is_lora else None)


def check_kind(way: Way, to_lora: bool, names: Sequence[str]) -> None:
    """Raise UsageError where the way and the kind of the target contradict each other."""
    if not names:
        raise KronaError("the adapter has no layer.", fix="There is nothing to convert.")
    if to_lora and isinstance(way, FixedShape):
        raise UsageError("a LoRA has no Kronecker shape.", fix="Use --rank or --max-error, or choose a Kronecker format.")
    if not to_lora and isinstance(way, Rank):
        raise UsageError("--rank belongs to LoRA targets.", fix="Add --to lora, or use --shape, --max-error or --budget.")
