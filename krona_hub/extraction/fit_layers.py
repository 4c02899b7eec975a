"""Fit every pair of layers to a layer of the adapter.

With one shape, a layer is read, fitted and measured in one step. With `--shape auto` or a budget, it is read again for
each step instead of being kept, so that only a few layers are in memory: evaluate the LoRA; try all shapes on some
layers of each size; evaluate the best of these on the others; choose; compute the factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from krona_hub.errors import UsageError
from krona_hub.extraction.candidate_shapes import Thin, best_shapes, smaller_than_lora
from krona_hub.extraction.error_curves import ErrorCurve, points
from krona_hub.extraction.fit_plan import FitPlan
from krona_hub.extraction.layer_difference import LayerDifference, Taken
from krona_hub.extraction.tensor_pairs import LayerPair
from krona_hub.kron.allocation import allocate
from krona_hub.kron.candidates import Factorization
from krona_hub.kron.parallel import in_parallel
from krona_hub.kron.shapes import KronShape
from krona_hub.kron.terms import KronTerms

Step = Callable[[], None]  # called after each step of a pair
STEPS = 3  # of a pair that is not fitted in one step
THIN = 16  # largest LoRA rank for which all shapes are tried through its factors; larger ones take too long


@dataclass(frozen=True)
class Fitted:
    """Result for one pair: a layer of the adapter, or none if it is equal or differs only by rounding."""

    pair: LayerPair
    taken: Taken | None = None
    is_rounding: bool = False
    curve: ErrorCurve | None = None  # error by number of terms


@dataclass(frozen=True)
class Study:
    """Measurements of a layer before its factorization is chosen."""

    pair: LayerPair
    curves: tuple[ErrorCurve, ...]
    noise: float  # expected energy of the rounding
    lora: KronTerms | None = None  # the LoRA above the noise, if its rank is low
    only_rounding: bool = False  # nothing exceeds the noise

    @property
    def size(self) -> tuple[int, int]:
        return self.curves[0].shape.full


def steps_of(plan: FitPlan) -> int:
    """Return the steps per pair, for a progress bar."""
    return 1 if _at_once(plan) else STEPS


def fit(pairs: Sequence[LayerPair], plan: FitPlan, step: Step) -> list[Fitted]:
    """Fit all pairs, in order."""
    if not _at_once(plan):
        return _in_steps(pairs, plan, step)
    fitted = []
    for _, result in in_parallel(partial(_fit_at_once, plan), pairs, plan.threads):
        fitted.append(result)
        step()
    return fitted


def _at_once(plan: FitPlan) -> bool:
    return plan.one_shape and plan.request.budget is None


def _fit_at_once(plan: FitPlan, pair: LayerPair) -> Fitted:
    return fit_difference(plan, pair, LayerDifference.of(pair))


def fit_difference(plan: FitPlan, pair: LayerPair, difference: LayerDifference | None) -> Fitted:
    """Fit one layer of a plan with one shape; a difference of None means that the layers are equal."""
    if difference is None:
        return Fitted(pair)
    if difference.noise.explains(difference.delta):
        return Fitted(pair, is_rounding=True)
    curve = plan.curve(difference)
    if not curve.above and difference.is_rounding():
        return Fitted(pair, is_rounding=True)
    form = plan.choose(pair, [curve], difference.noise.energy)
    sums = difference.sums(form) if form.terms else None
    return Fitted(pair, difference.take(sums, plan.stored, plan.note(pair, curve, form)), curve=curve)


# --- in steps --------------------------------------------------------------------------------------------------------


def _in_steps(pairs: Sequence[LayerPair], plan: FitPlan, step: Step) -> list[Fitted]:
    studies: dict[LayerPair, Study | Fitted] = {}
    for pair, study in in_parallel(partial(_study, plan), pairs, plan.threads):
        studies[pair] = study
        step()
    known = [s for s in studies.values() if isinstance(s, Study)]
    wide = [s for s in known if plan.request.shape is None and not plan.target.to_lora and _is_wide(plan, s)]
    shapes = best_shapes([s.pair for s in wide], plan)
    for study, curves in in_parallel(partial(_more_curves, plan, shapes), wide, plan.threads):
        studies[study.pair] = replace(study, curves=(*study.curves, *curves))
    for _ in pairs:
        step()
    chosen = _chosen(plan, [s for s in studies.values() if isinstance(s, Study)])

    def finish(pair: LayerPair) -> Fitted:
        study = studies[pair]
        return study if isinstance(study, Fitted) else _take(plan, study, chosen[pair])

    fitted = []
    for _, result in in_parallel(finish, pairs, plan.threads):
        fitted.append(result)
        step()
    return fitted


def _study(plan: FitPlan, pair: LayerPair) -> Study | Fitted:
    """Evaluate the LoRA, or the one shape, of a layer that differs by more than rounding."""
    difference = LayerDifference.of(pair)
    if difference is None:
        return Fitted(pair)
    if difference.noise.explains(difference.delta):
        return Fitted(pair, is_rounding=True)
    curve, lora = plan.curve(difference), None
    if curve.is_lora and 0 < curve.above <= min(THIN, min(difference.size) // 4):
        lora = difference.sums(curve.form(curve.above))
    return Study(pair, (curve,), difference.noise.energy, lora, difference.is_rounding())


def _is_wide(plan: FitPlan, study: Study) -> bool:
    """Return whether to try shapes on the difference itself; a low-rank LoRA gives all of them by its factors."""
    return study.lora is None or plan.request.budget is not None


def _more_curves(plan: FitPlan, shapes: dict[tuple[int, int], list[KronShape]], study: Study) -> list[ErrorCurve]:
    wanted = shapes[study.size]
    difference = LayerDifference.of(study.pair) if wanted else None
    return [] if difference is None else [difference.curve_to_noise(shape, plan.request.max_error) for shape in wanted]


def _chosen(plan: FitPlan, studies: Sequence[Study]) -> dict[LayerPair, Factorization | KronTerms]:
    """Return a factorization, or an already known sum, for every layer."""
    if plan.request.budget is not None:
        return dict(_within_budget(plan, studies))
    forms = {s.pair: plan.choose(s.pair, list(s.curves), s.noise) for s in studies}
    thin = [
        Thin(s.pair, s.curves[0], s.lora, forms[s.pair])
        for s in studies
        if s.lora is not None and forms[s.pair].right_rank is not None
    ]
    whole = {t.pair: t.lora for t in thin if t.chosen.right_rank == t.curve.above}
    return forms | whole | smaller_than_lora(plan, thin)


def _within_budget(plan: FitPlan, studies: Sequence[Study]) -> dict[LayerPair, Factorization]:
    """Allocate the budget among layers for the smallest total error."""
    budget = plan.request.budget
    whole = sum(s.size[0] * s.size[1] for s in studies)
    if budget is None or not studies:
        return {}
    parameters = budget.of(whole)
    if parameters < 1:
        raise UsageError(f"Invalid budget: {parameters} parameters.", fix="Use a budget of at least 1 parameter.")
    layers = [points(s.curves, plan.allowed(s.pair.shape), dense=not plan.one_shape) for s in studies]
    found, _ = allocate(layers, parameters)
    return {s.pair: point.form for s, point in zip(studies, found, strict=True)}


def _take(plan: FitPlan, study: Study, chosen: Factorization | KronTerms) -> Fitted:
    nothing_above = not any(c.above for c in study.curves)
    if nothing_above and study.only_rounding:
        return Fitted(study.pair, is_rounding=True)
    difference = LayerDifference.of(study.pair)
    if difference is None:  # the file changed in the meantime
        return Fitted(study.pair)
    if isinstance(chosen, KronTerms):
        return Fitted(study.pair, difference.take(chosen, plan.stored))
    sums = difference.sums(chosen) if chosen.terms else None
    return Fitted(study.pair, difference.take(sums, plan.stored, plan.note(study.pair, study.curves[0], chosen)))
