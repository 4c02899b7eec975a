"""`extract`: pair, subtract, fit, measure, refuse or write."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from krona_hub.adapters.adapter import Adapter
from krona_hub.adapters.provenance import Provenance
from krona_hub.aliases import Progress
from krona_hub.bases import catalogue
from krona_hub.checkpoints.atomic import check_output
from krona_hub.conversion.output_options import FOLDERS, default_out, dtype_named, format_named
from krona_hub.conversion.report import REFUSED_ABOVE
from krona_hub.conversion.target import ConversionTarget
from krona_hub.errors import InexpressibleError, LossyError, NoDifferenceError, UnknownBaseError, UsageError
from krona_hub.extraction.fit_layers import Fitted, fit, steps_of
from krona_hub.extraction.fit_plan import FitPlan
from krona_hub.extraction.other_tensors import ChangedTensor, changes
from krona_hub.extraction.report import ExtractionReport
from krona_hub.extraction.request import what_is_asked
from krona_hub.extraction.tensor_pairs import Pairs, pair_up
from krona_hub.formats.writing.writer import write
from krona_hub.sources import is_remote, resolve, resolve_base


def extract(
    base: str | Path,
    tuned: str | Path,
    out: str | Path | None = None,
    *,
    shape: str | tuple[int, int] = "auto",
    terms: int | None = None,
    max_error: float | None = None,
    budget: str | int | None = None,
    shape_fallback: str | None = None,
    to: str = "krona",
    component: str | None = None,
    targets: str | Sequence[str] | None = None,
    also_vectors: bool = False,
    base_name: str | Path | None = None,
    dtype: str | torch.dtype | None = None,
    allow_loss: bool = False,
    overwrite: bool = False,
    threads: int | None = None,
    progress: Progress | None = None,
    dry_run: bool = False,
) -> ExtractionReport:
    """The adapter that turns `base` into `tuned`: per layer the nearest Kronecker sum of the float32 difference.

    Both are diffusers folders, component folders or checkpoint files, in any layout and dtype. `shape` is the size
    `a1xa2` of A in every layer, or `auto`: the shape, or the LoRA form, that suits each layer best. At most one of
    `terms` (with `auto`: the most), `max_error` (per layer) and `budget` (parameters, or a share of the whole
    difference) says where a sum ends; without them it ends where the rounding of the stored numbers begins. `to` is a
    format of FORMATS, or `lora` or `lokr`. `targets` are named sets of layers or regular expressions. `also_vectors`
    keeps the differences of norms, biases and embeddings in extras; without it they are listed only.
    `base_name` names the base where the checkpoints do not tell. A few layers are in memory at a time.

    Raises NoDifferenceError where nothing differs, or nothing by more than rounding; BaseMismatchError where the
    checkpoints do not fit each other; LossyError where the total error that rounding does not explain exceeds 0.5
    (unless `allow_loss`); InexpressibleError where the target cannot hold what was asked for, and what `write`
    raises. Then nothing is written.
    """
    asked = what_is_asked(shape, terms, max_error, budget, shape_fallback)
    target = _target(to, asked.shape is not None)
    plan = FitPlan(asked, target, _dtype(dtype), threads)
    before, after = _checkpoint(base), _checkpoint(tuned)
    path = Path(out) if out is not None else default_out(tuned, target.format)
    if target.format not in FOLDERS and not dry_run:
        check_output(path, overwrite=overwrite)
    pairs = pair_up(before, after, component=component, targets=targets, base_name=base_name)
    fitted = fit(pairs.layers, plan, _steps(progress, steps_of(plan) * len(pairs.layers)))
    found = list(changes(pairs.others))
    report = ExtractionReport(
        base=str(base),
        tuned=str(tuned),
        target_format=target.format,
        out=path,
        method=str(asked),
        layers=tuple(f.taken.report for f in fitted if f.taken is not None),
        unchanged=sum(f.taken is None and not f.is_rounding for f in fitted),
        at_rounding=tuple(f.pair.name for f in fitted if f.is_rounding),
        others=tuple(replace(c.report, kept=also_vectors) for c in found),
        notes=_notes(pairs),
    )
    adapter = _adapter(report, pairs, fitted, found if also_vectors else [])
    _check(report, adapter, fitted, target, allow_loss)
    if dry_run:
        return report
    written = write(adapter, path, format=target.format, base=pairs.model, dtype=plan.dtype, overwrite=overwrite)
    notes = (*report.notes, *written.notes)
    return replace(report, checked=str(written), written=True, files=written.files, notes=notes)


def _target(to: str, with_shape: bool) -> ConversionTarget:
    target = ConversionTarget(format_named(to))
    if target.to_lora and with_shape:
        raise UsageError("a LoRA has no Kronecker shape.", fix="Use --terms for its rank, or --max-error.")
    if target.format == "diffusekrona":
        raise InexpressibleError(
            "DiffuseKronA interleaves rows, which no nearest A ⊗ B does.", fix="Choose --to krona, lokr or lora."
        )
    return target


def _checkpoint(source: str | Path) -> Path:
    """The path of a checkpoint, from the Hub where it is no local one."""
    if not Path(source).exists() and catalogue.find(str(source)) is not None:
        raise UnknownBaseError(
            f"{source} is a name, and a difference needs the weights.", fix="Give the folder or file of the checkpoint."
        )
    return resolve_base(source) if is_remote(source) else resolve(source)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    named: torch.dtype = getattr(torch, dtype_named(dtype))
    return named


def _steps(progress: Progress | None, total: int) -> Callable[[], None]:
    done = 0

    def step() -> None:
        nonlocal done
        done += 1
        if progress:
            progress(done, total)

    return step


def _adapter(
    report: ExtractionReport, pairs: Pairs, fitted: Sequence[Fitted], extras: Sequence[ChangedTensor]
) -> Adapter:
    """What is written: the layers that have something above the noise."""
    layers = {f.pair.name: f.taken.delta for f in fitted if f.taken is not None and f.taken.delta.sums}
    provenance = Provenance(
        method=report.method,
        relative_error=report.relative_error,
        layer_errors={x.layer: x.relative_error for x in report.layers if x.layer in layers},
    )
    kept = {change.extra: change.difference for change in extras}
    return Adapter(layers, pairs.model.model, provenance, kept)


def _check(
    report: ExtractionReport, adapter: Adapter, fitted: Sequence[Fitted], target: ConversionTarget, allow_loss: bool
) -> None:
    """Raise what forbids the result: nothing in it, too much missing from it, or a format that cannot hold it."""
    if not report.layers and not adapter.extras:
        raise _no_difference(report)
    if report.beyond_rounding > REFUSED_ABOVE and not allow_loss:
        raise _too_lossy(report, fitted)
    if not adapter.layers and not adapter.extras:
        raise _no_difference(report)
    refusals = target.refusals(adapter.layers)
    if refusals:
        name, why = next(iter(refusals.items()))
        raise InexpressibleError(
            f"{len(refusals)} of {len(adapter)} layers cannot be written as {target.format}; the first is "
            f"{name}: {why}.",
            fix="Use --to krona, which holds any sum, --to lora, or --shape auto.",
        )


def _no_difference(report: ExtractionReport) -> NoDifferenceError:
    vectors = len(report.others)
    fix = f"{vectors} norms, biases or embeddings differ: --also-vectors keeps them." if vectors else ""
    if report.at_rounding:
        return NoDifferenceError(
            f"there is no difference above rounding: {len(report.at_rounding)} layers differ by no more than storing "
            "them in their dtypes explains.",
            fix=fix or "Compare checkpoints of more precision, if there are any.",
        )
    return NoDifferenceError(
        f"nothing to extract: all {report.unchanged} layers are equal.", fix=fix or "Are these the right two files?"
    )


def _too_lossy(report: ExtractionReport, fitted: Sequence[Fitted]) -> LossyError:
    """The refusal, with how many terms would do."""
    offer = _terms_for(REFUSED_ABOVE, [f for f in fitted if f.taken is not None])
    return LossyError(
        f"the result would be {report.relative_error:.1%} error, with {report.energy_kept:.1%} of the difference's "
        "energy kept; nothing was written.",
        fix=f"{offer}--max-error 0.05 finds the smallest form within 5 % per layer, --shape auto tries every shape and "
        "the LoRA form; --allow-loss writes this one anyway.",
    )


def _terms_for(error: float, fitted: Sequence[Fitted]) -> str:
    """How many terms of the same shape come below that total error, where it is known."""
    curves = [f.curve.left for f in fitted if f.curve is not None]
    if not curves or len(curves) < len(fitted):
        return ""
    whole = sum(left[0] for left in curves)
    for terms in range(1, max(map(len, curves))):
        if sum(left[min(terms, len(left) - 1)] for left in curves) <= error**2 * whole:
            return f"--terms {terms} of this shape is below {error:.0%}; "
    return ""


def _notes(pairs: Pairs) -> tuple[str, ...]:
    sides = (("the tuned checkpoint lacks", pairs.only_base), ("the base lacks", pairs.only_tuned))
    return tuple(
        f"{words} {len(names)} layers of the other, such as {names[0]}: they are left out"
        for words, names in sides
        if names
    )
