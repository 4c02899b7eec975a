"""Apply a conversion method to every layer of an adapter."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import inf, isqrt

import torch

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.aliases import Progress
from krona_hub.conversion.methods import Budget, Exact, FixedShape, Keep, MaxError, Method, Rank
from krona_hub.conversion.report import LEFT_OUT, LayerReport
from krona_hub.conversion.target import ConversionTarget, Loads
from krona_hub.errors import InexpressibleError, KronaError, ShapeError, UsageError
from krona_hub.formats.forms.normal_forms import (
    Lora,
    exact_lora_of,
    has_hadamard,
    is_lora,
    lora_rank,
    size_of,
    with_lora,
    words_of,
)
from krona_hub.kron.allocation import BudgetError
from krona_hub.kron.factorization_search import Choice, realize, smallest_lora_error, smallest_within, within_budget
from krona_hub.kron.from_lora import nearest_kron_of_loras
from krona_hub.kron.norms import norm, recompress, relative_difference
from krona_hub.kron.shapes import KronShape, nearest_split, split
from krona_hub.kron.terms import KronTerms, dense_factor
from krona_hub.kron.to_lora import lora_rank_bound, nearest_lora, singular_values

Layers = Mapping[str, LayerDelta]
Holds = Callable[[LayerDelta], bool]
SEARCHED = 16  # largest rank of the LoRA equal to a LoHa for which all shapes are tried: more takes minutes per layer
WIDE = f"LoHa: Kronecker shapes are tried up to rank {isqrt(SEARCHED)}"
OTHERS_WITHIN = 4.0  # times the size of the LoRA: a larger alternative is not worth reporting


@dataclass(frozen=True)
class ConvertedLayer:
    """One layer after conversion."""

    delta: LayerDelta
    note: str = ""
    best_other: str | None = None
    is_left_out: bool = False  # the result does not have the layer; `delta` is then an empty sum


def apply_method(
    layers: Layers, method: Method, target: ConversionTarget, progress: Progress | None = None
) -> dict[str, ConvertedLayer]:
    """Convert every layer by `method`, to factorizations that the target can hold; a budget may leave layers out."""
    match method:
        case Keep():
            return {name: ConvertedLayer(delta) for name, delta in layers.items()}
        case Exact():
            return {
                name: ConvertedLayer(_as_lora(delta) if target.to_lora else delta) for name, delta in layers.items()
            }
        case Rank(rank):
            return {name: ConvertedLayer(_nearest_lora(delta, rank=rank)) for name, delta in layers.items()}
        case MaxError(error) if target.to_lora:
            return {name: ConvertedLayer(_nearest_lora(delta, max_error=error)) for name, delta in layers.items()}
        case FixedShape():
            return _fixed_shapes(layers, method, progress)
        case MaxError(error):
            wide = {name: delta for name, delta in layers.items() if _is_wide_loha(delta, target)}
            found = {name: ConvertedLayer(_nearest_lora(delta, max_error=error), WIDE) for name, delta in wide.items()}
            others = {name: delta for name, delta in layers.items() if name not in wide}
            return found | (_searched(others, method, target, progress) if others else {})
        case Budget():
            return _searched(layers, method, target, progress)


def _as_lora(delta: LayerDelta) -> LayerDelta:
    return delta if is_lora(delta) else with_lora(delta, exact_lora_of(delta))


def _nearest_lora(delta: LayerDelta, *, rank: int | None = None, max_error: float | None = None) -> LayerDelta:
    """Return the best LoRA of `rank`, or the smallest within `max_error`; a LoRA that already fits stays unchanged."""
    if rank is not None:
        rank = min(rank, *delta.matrix_shape)
    fit = nearest_lora(delta.sums, rank=rank, max_error=max_error)
    if fit.up.shape[1] >= (lora_rank(delta) or inf):
        return delta
    return with_lora(delta, Lora(fit.up.float(), fit.down.float()))


def _is_wide_loha(delta: LayerDelta, target: ConversionTarget) -> bool:
    """Return whether a LoHa equals only LoRAs of high rank, and the target can hold a LoRA in any layer."""
    if not has_hadamard(delta) or (lora_rank(delta) or 0) <= SEARCHED or len(target.loads) != 1:
        return False
    return target.loads[0](delta.weight_shape, KronShape(1, 1, *delta.matrix_shape), 1, 1)


def only_loras(weight_shape: tuple[int, ...], shape: KronShape, terms: int, right_rank: int | None) -> bool:
    """Return whether a factorization is a LoRA, [[1]] ⊗ (up·down): the only one that a LoRA target holds."""
    return shape[:2] == (1, 1) and terms == 1 and right_rank is not None


# --- one shape for every layer ---------------------------------------------------------------------------------------


def _fixed_shapes(layers: Layers, method: FixedShape, progress: Progress | None) -> dict[str, ConvertedLayer]:
    shapes = {name: _shape_for(name, delta.matrix_shape, method) for name, delta in layers.items()}
    outcomes: dict[str, ConvertedLayer] = {}
    for names in _groups(layers, shapes):
        terms = _nearest([layers[name] for name in names], shapes[names[0]], method.terms)
        for name, fitted in zip(names, terms, strict=True):
            shape = shapes[name]
            same = shape[:2] == (method.a1, method.a2)
            note = "" if same else f"{method.a1}x{method.a2} does not divide the layer; used {shape.a1}x{shape.a2}"
            outcomes[name] = ConvertedLayer(replace(layers[name], sums=(fitted.to(torch.float32),)), note)
        if progress:
            progress(len(outcomes), len(layers))
    return outcomes


def _groups(layers: Layers, shapes: Mapping[str, KronShape]) -> list[list[str]]:
    """Group the layers of one shape and one LoRA rank, which are computed together."""
    groups: dict[tuple[KronShape, int | None], list[str]] = {}
    for name, delta in layers.items():
        groups.setdefault((shapes[name], lora_rank(delta)), []).append(name)
    return list(groups.values())


def _nearest(deltas: Sequence[LayerDelta], shape: KronShape, terms: int) -> list[KronTerms]:
    """Return the nearest sums of that shape; low-rank LoRAs are computed together, through their factors."""
    terms = min(terms, shape.max_terms)
    rank = lora_rank(deltas[0])
    if rank is None or 4 * rank > min(shape.full):
        return _recompressed(deltas, shape, terms)
    loras = [exact_lora_of(delta) for delta in deltas]
    fits = nearest_kron_of_loras([x.up for x in loras], [x.down for x in loras], shape, terms)
    return [fit.terms for fit in fits]


def _recompressed(deltas: Sequence[LayerDelta], shape: KronShape, terms: int) -> list[KronTerms]:
    """Return the nearest sums of that shape in float32, computed from whole matrices, one layer at a time.

    The results are allocated before the first matrix: between matrices, each small result would keep the allocator from
    using the memory of the last matrix again, and a LoHa of SDXL would need gigabytes.
    """
    a1, a2, b1, b2 = shape
    spaces = [(torch.empty(terms, a1, a2), torch.empty(terms, b1, b2)) for _ in deltas]
    fitted = []
    for delta, (left, right) in zip(deltas, spaces, strict=True):
        found = recompress(delta.sums, shape, terms).terms
        own = found.terms  # fewer where fewer are exact
        a, b = left[:own].copy_(dense_factor(found.left)), right[:own].copy_(dense_factor(found.right))
        fitted.append(KronTerms(a, b, found.rows))
    return fitted


def _shape_for(name: str, size: tuple[int, int], method: FixedShape) -> KronShape:
    try:
        return split(size, method.a1, method.a2)
    except ShapeError as e:
        if method.fallback:
            return nearest_split(size, method.a1, method.a2)
        e.fix += " Or use --shape-fallback nearest."
        raise e.within(name) from None


# --- smallest factorization, or best for a budget --------------------------------------------------------------------


def _searched(
    layers: Layers, method: MaxError | Budget, target: ConversionTarget, progress: Progress | None
) -> dict[str, ConvertedLayer]:
    wide = any(_is_wide_loha(delta, target) for delta in layers.values())
    variants = (only_loras,) if target.to_lora or wide else target.loads
    loras = {name: exact_lora_of(delta) for name, delta in layers.items()}
    total = sum(size_of(delta)[0] for delta in layers.values())
    required = {i for i, (name, delta) in enumerate(layers.items()) if target.requires(name, delta)}
    found: list[list[Choice]] = []
    too_small: list[BudgetError] = []
    for loads in variants:
        try:
            found.append(_search(layers, list(loras.values()), method, total, loads, required, progress))
        except BudgetError as error:
            too_small.append(error)
        except InexpressibleError:  # this variant cannot hold some layer
            continue
    if too_small and not found:
        raise min(too_small, key=lambda error: error.least)
    norms = [norm(delta.sums) for delta in layers.values()]
    choices = _best(found, method, norms)
    return {
        name: _outcome(delta, loras[name], choice, target.holds_any_shape)
        for (name, delta), choice in zip(layers.items(), choices, strict=True)
    }


def _search(
    layers: Layers,
    loras: list[Lora],
    method: MaxError | Budget,
    total: int,
    loads: Loads,
    required: Collection[int],
    progress: Progress | None,
) -> list[Choice]:
    """Return one choice per layer, among the factorizations that `loads` allows; a budget keeps the required layers."""
    allowed = _allowed_by_size(layers, loads)
    if isinstance(method, MaxError):
        return smallest_within(loras, method.value, allowed=allowed, others_within=OTHERS_WITHIN, progress=progress)
    return within_budget(loras, method.of(total), allowed=allowed, required=required, progress=progress)


def _best(found: list[list[Choice]], method: MaxError | Budget, norms: Sequence[float]) -> list[Choice]:
    """Return the variant with the fewest parameters, or with the smallest error, depending on the method."""
    if not found:
        raise InexpressibleError(
            f"No factorization that the target can load meets {_limit(method)}.",
            fix="Allow a larger error or budget, or choose a target that supports every shape, such as --to krona.",
        )
    if isinstance(method, MaxError):
        return min(found, key=lambda choices: sum(c.form.parameters for c in choices))
    return min(found, key=lambda choices: _lost(choices, norms))


def _limit(method: MaxError | Budget) -> str:
    return str(method).removeprefix("convert ")


def _lost(choices: Sequence[Choice], norms: Sequence[float]) -> float:
    """Squared error over all layers: Σ (eₗ·‖ΔWₗ‖)²."""
    return sum((c.form.relative_error * n) ** 2 for c, n in zip(choices, norms, strict=True))


def _allowed_by_size(layers: Layers, loads: Loads) -> Callable[[KronShape, int, int | None], bool]:
    """Return the predicate of the search, by matrix size: all weights of that size must be able to hold it."""
    shapes: dict[tuple[int, int], set[tuple[int, ...]]] = {}
    for delta in layers.values():
        shapes.setdefault(delta.matrix_shape, set()).add(delta.weight_shape)

    @cache
    def loaded(shape: KronShape, terms: int, right_rank: int | None) -> bool:
        return all(loads(weight, shape, terms, right_rank) for weight in shapes.get(shape.full, ()))

    def allowed(shape: KronShape, terms: int, right_rank: int | None) -> bool:
        # targets only distinguish one term from several and a dense B from a product: query once for each
        return loaded(shape, min(terms, 2), None if right_rank is None else 1)

    return allowed


def _outcome(delta: LayerDelta, lora: Lora, choice: Choice, holds_any_shape: Holds) -> ConvertedLayer:
    form, other = choice.form, choice.best_other
    if form.is_nothing:
        return ConvertedLayer(replace(delta, sums=()), is_left_out=True)
    best_other = None if other is None else f"{other}, error {other.relative_error:.3f}"
    if is_lora(delta) and form.shape[:2] == (1, 1) and (form.right_rank or 0) >= lora.up.shape[1]:
        return ConvertedLayer(delta, "kept as LoRA", best_other)
    is_stored = not is_lora(delta) and not has_hadamard(delta)
    if is_stored and size_of(delta)[0] <= form.parameters and holds_any_shape(delta):
        return ConvertedLayer(delta, "unchanged: no smaller factorization within the limit")
    rank = lora_rank(delta) if is_lora(delta) else None
    note = _lora_note(rank, form.right_rank or form.terms) if form.is_lora else ""
    terms = realize(lora.up, lora.down, form).terms.to(torch.float32)  # as new factors are stored
    return ConvertedLayer(replace(delta, sums=(terms,)), note, best_other if form.is_lora else None)


def _lora_note(before: int | None, after: int) -> str:
    if before is None:
        return f"best as LoRA, rank {after}"
    return f"kept as LoRA, rank reduced {before} → {after}" if after < before else "kept as LoRA"


def check_kind(method: Method, to_lora: bool, names: Sequence[str], *, has_moments: bool = False) -> None:
    """Raise UsageError if the method and the kind of the target contradict each other."""
    if not names:
        raise KronaError("The adapter is empty.", fix="Choose another adapter or another --component.")
    if to_lora and isinstance(method, FixedShape):
        raise UsageError(
            "--shape does not apply to a LoRA target.", fix="Use --rank or --max-error, or choose a Kronecker format."
        )
    if not to_lora and isinstance(method, Rank) and not has_moments:
        raise UsageError(
            "--rank requires a LoRA target.", fix="Add --to lora, or use --shape, --max-error or --budget."
        )


def lora_error_within(layers: Layers, parameters: int) -> float:
    """Return the total relative error of the best LoRAs within that many parameters, as a baseline.

    Layers may be left out: 1.0, the error without any layer, if not even the smallest LoRA fits.
    """
    deltas = list(layers.values())
    # one layer at a time, since a LoHa needs its whole matrix; allocated first for the reason in `_recompressed`
    spaces = [torch.empty(lora_rank_bound(delta.sums), dtype=torch.float64) for delta in deltas]
    spectra = []
    for delta, space in zip(deltas, spaces, strict=True):
        values = singular_values(delta.sums)
        spectra.append(space[: len(values)].copy_(values))
    try:
        return smallest_lora_error(spectra, [delta.matrix_shape for delta in deltas], parameters)
    except UsageError:
        return 1.0


def error_of(found: LayerDelta, exact: LayerDelta) -> float:
    """Return the relative error of a delta; 0.0, without reading any number, if its sums are those of `exact`."""
    return 0.0 if found.sums == exact.sums else relative_difference(found.sums, exact.sums)


def layer_report(
    name: str, before: LayerDelta, outcome: ConvertedLayer, stored: LayerDelta, error: float, norm: float
) -> LayerReport:
    """Return the report of one layer: factorizations before and after, size in the file, error and norm."""
    (p0, b0), (p1, _) = size_of(before), size_of(outcome.delta)
    return LayerReport(
        layer=name,
        before=words_of(before),
        after=LEFT_OUT if outcome.is_left_out else words_of(outcome.delta),
        parameters_before=p0,
        parameters_after=p1,
        bytes_before=b0,
        bytes_after=size_of(stored)[1],
        relative_error=error,
        norm=norm,
        note=outcome.note,
        best_other=outcome.best_other,
    )
