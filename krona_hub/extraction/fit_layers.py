"""Every pair of layers to its layer of the adapter.

With one shape a layer is read, fitted and measured at once. With `--shape auto`, and with a budget, it is read again
for each step rather than kept, so that a few layers are in memory at a time: study the LoRA form; try all shapes on
some layers of each size; study the best of these on the others; choose; take the numbers.
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

Step = Callable[[], None]  # called when a pair is through a step
STEPS = 3  # of a pair that is not fitted at once
THIN = 16  # rank up to which every Kronecker form of a LoRA is tried by its factors; it takes too long above


@dataclass(frozen=True)
class Fitted:
    """What became of one pair: a layer of the adapter, or nothing because it is equal or differs by rounding only."""

    pair: LayerPair
    taken: Taken | None = None
    is_rounding: bool = False
    curve: ErrorCurve | None = None  # what more terms would leave


@dataclass(frozen=True)
class Study:
    """What is known of a layer before its form is chosen."""

    pair: LayerPair
    curves: tuple[ErrorCurve, ...]
    noise: float  # expected energy of the rounding
    lora: KronTerms | None = None  # the LoRA above the noise, where it is thin
    only_rounding: bool = False  # where nothing stands above the noise

    @property
    def size(self) -> tuple[int, int]:
        return self.curves[0].shape.full


def steps_of(plan: FitPlan) -> int:
    """Steps per pair, for a progress bar."""
    return 1 if _at_once(plan) else STEPS


def fit(pairs: Sequence[LayerPair], plan: FitPlan, step: Step) -> list[Fitted]:
    """Every pair in its form, in order."""
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
    """One layer of a plan with one shape; without a difference it is equal."""
    if difference is None:
        return Fitted(pair)
    if difference.noise.explains(difference.delta):
        return Fitted(pair, is_rounding=True)
    curve = plan.curve(difference)
    if not curve.above and difference.is_rounding():
        return Fitted(pair, is_rounding=True)
    form = plan.choose(pair, [curve], difference.noise.energy)
    sums = difference.sums(form) if form.terms else None
    return Fitted(pair, difference.take(sums, plan.dtype, plan.note(pair, curve, form)), curve=curve)


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
    """The LoRA form, or the one shape, of a layer that differs by more than rounding."""
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
    """Whether the shapes are to be tried on the difference itself: a thin LoRA knows all of them by its factors."""
    return study.lora is None or plan.request.budget is not None


def _more_curves(plan: FitPlan, shapes: dict[tuple[int, int], list[KronShape]], study: Study) -> list[ErrorCurve]:
    wanted = shapes[study.size]
    difference = LayerDifference.of(study.pair) if wanted else None
    return [] if difference is None else [difference.curve_to_noise(shape, plan.request.max_error) for shape in wanted]


def _chosen(plan: FitPlan, studies: Sequence[Study]) -> dict[LayerPair, Factorization | KronTerms]:
    """A form, or a sum that is known already, for every layer."""
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
    """The least total error for the budget, shared between layers by what each gains."""
    budget = plan.request.budget
    whole = sum(s.size[0] * s.size[1] for s in studies)
    if budget is None or not studies:
        return {}
    parameters = budget.of(whole)
    if parameters < 1:
        raise UsageError(f"a budget of {parameters} parameters holds nothing.", fix="Choose 1 or more.")
    layers = [points(s.curves, plan.allowed(s.pair.shape), dense=not plan.one_shape) for s in studies]
    found, _ = allocate(layers, parameters)
    return {s.pair: point.form for s, point in zip(studies, found, strict=True)}


def _take(plan: FitPlan, study: Study, chosen: Factorization | KronTerms) -> Fitted:
    nothing_above = not any(c.above for c in study.curves)
    if nothing_above and study.only_rounding:
        return Fitted(study.pair, is_rounding=True)
    difference = LayerDifference.of(study.pair)
    if difference is None:  # the file changed meanwhile
        return Fitted(study.pair)
    if isinstance(chosen, KronTerms):
        return Fitted(study.pair, difference.take(chosen, plan.dtype))
    sums = difference.sums(chosen) if chosen.terms else None
    return Fitted(study.pair, difference.take(sums, plan.dtype, plan.note(study.pair, study.curves[0], chosen)))
