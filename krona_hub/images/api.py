"""`generate`: from arguments to images in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from krona_hub.aliases import Progress
from krona_hub.errors import UsageError
from krona_hub.images import record as records
from krona_hub.images.output_files import check_output_folder, grid_name, planned_images
from krona_hub.images.plan import GeneratePlan, make_plan
from krona_hub.images.report import GenerateReport
from krona_hub.images.request import (
    GenerateRequest,
    checked_machine,
    checked_prompts,
    checked_seed,
    checked_settings,
    checked_strengths,
)

MACHINE = {"out", "device", "dtype", "offload", "tiled_vae", "batch", "variant"}  # change images by rounding at most


def generate(
    base: str | Path | None = None,
    prompts: str | Sequence[str] = (),
    *,
    adapters: Sequence[str | Path | tuple[str | Path, float]] = (),
    negative: str | None = None,
    seed: int = 0,
    images_per_prompt: int | None = None,
    batch: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    scheduler: str | None = None,
    size: str | int | Sequence[int] | None = None,
    more: Mapping[str, Any] | None = None,
    strengths: Sequence[float] = (),
    together: bool = False,
    compare: bool | None = None,
    beside: Sequence[str | Path] = (),
    device: str | None = None,
    dtype: str | None = None,
    offload: str | None = None,
    tiled_vae: bool = False,
    variant: str | None = None,
    config: str | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    again: str | Path | None = None,
    progress: Progress | None = None,
) -> GenerateReport:
    """Generate images with a base model and adapters: numbered PNGs, a labeled grid and a record.

    Parameters
    ----------
    base : diffusers folder, checkpoint file, Hub id or "tiny-scenes"
    prompts, negative : one or several prompts; a negative prompt
    adapters : files or Hub ids in any format, each alone or as (source, strength); one column per adapter
    seed, images_per_prompt, batch : first seed; images (default: `batch`), seeds count up; images computed together
    steps, guidance, scheduler, size : None uses the base's defaults; `size` is (width, height) in pixels
    more, strengths : more arguments of the pipeline's call; factors on the adapters' strengths, a column each
    together, compare, beside : all adapters in one column; a column without any; further bases, a column each
    device, dtype, offload, tiled_vae : where and how to compute; changes images by rounding at most
    variant, config : variant of the weights in a folder; configuration of a checkpoint file
    out, overwrite, dry_run : output folder (None writes nothing); replace earlier images; only plan
    again : record, folder of images or PNG to repeat; other arguments override the record's
    progress : callback (done, total) for the denoising steps of all images

    Returns
    -------
    GenerateReport : images row by row with equal noise per row, and the record that repeats them

    Raises
    ------
    UsageError, NotFoundError, UnknownBaseError, BaseMismatchError, ResourceError

    Examples
    --------
    >>> report = generate("tiny-scenes", "a photo of a red cube", seed=7, images_per_prompt=2, dry_run=True)
    >>> [(image.file, image.seed) for image in report.pictures]
    [('001.png', 7), ('002.png', 8)]
    """
    arguments = {
        "base": None if base is None else str(base), "prompts": prompts, "negative": negative, "seed": seed,
        "adapters": [_with_strength(a) for a in adapters], "images_per_prompt": images_per_prompt, "batch": batch,
        "steps": steps, "guidance": guidance, "scheduler": scheduler, "size": size, "more": more or {},
        "strengths": strengths, "together": together, "compare": compare, "beside": [str(b) for b in beside],
        "device": device, "dtype": dtype, "offload": offload, "tiled_vae": tiled_vae,
        "variant": variant, "config": config,
    }  # fmt: skip
    return _generate(arguments, out, overwrite, dry_run, again, progress)


def _generate(
    arguments: Mapping[str, Any],
    out: str | Path | None,
    overwrite: bool,
    dry_run: bool,
    again: str | Path | None,
    progress: Progress | None,
) -> GenerateReport:
    repeated = _Repetition.of(again, arguments) if again is not None else None
    plan = make_plan(_request(**(repeated.arguments if repeated else arguments)))
    folder = None if out is None else Path(out).expanduser()
    if folder is not None:
        check_output_folder(folder, overwrite)
    notes = (*plan.notes, *(repeated.notes(plan) if repeated else ()))
    if dry_run:
        return _dry_run_report(plan, folder, notes)
    from krona_hub.images.execute import execute

    report = execute(plan, folder, progress or (lambda _done, _total: None))
    return replace(report, notes=(*notes, *report.notes), same=repeated.same(report) if repeated else None)


def _with_strength(adapter: str | Path | tuple[str | Path, float]) -> tuple[str, float]:
    source, strength = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
    return str(source), float(strength)


def _request(**given: Any) -> GenerateRequest:
    """Check everything that can be checked without opening a file."""
    if given["base"] is None:
        raise UsageError(
            "Missing argument BASE.", fix="Specify a folder, a file or a Hub id: krona generate BASE --prompt …"
        )
    count = given["images_per_prompt"] or given["batch"]
    adapters = tuple(given["adapters"])
    return GenerateRequest(
        base=given["base"],
        prompts=checked_prompts(given["prompts"]),
        adapters=adapters,
        seed=checked_seed(given["seed"], count),
        images_per_prompt=count,
        settings=checked_settings(
            *(given[name] for name in ("negative", "steps", "guidance", "scheduler", "size", "more"))
        ),
        machine=checked_machine(*(given[name] for name in ("device", "dtype", "offload", "tiled_vae", "batch"))),
        strengths=checked_strengths(given["strengths"], adapters, given["together"], given["compare"]),
        together=given["together"],
        compare=given["compare"],
        beside=tuple(given["beside"]),
        variant=given["variant"],
        config=given["config"],
    )


# --- again -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Repetition:
    """A record to repeat, with the arguments that override it."""

    record: Mapping[str, Any]
    arguments: Mapping[str, Any]
    changed: frozenset[str]  # names of arguments that override the record's

    @classmethod
    def of(cls, again: str | Path, given: Mapping[str, Any]) -> _Repetition:
        record = records.read_record(again)
        own = records.arguments_of(record, Path(again).expanduser().parent)
        plain = {"seed": 0, "batch": 1}  # defaults, which do not override the record
        new = {name: value for name, value in given.items() if value and value != plain.get(name)}
        if "base" in new:
            own = {**own, "config": None, "variant": None}
        return cls(record, {**given, **own, **new}, frozenset(new))

    def notes(self, plan: GeneratePlan) -> tuple[str, ...]:
        return records.check_same_files(self.record, plan) if not self.changed & {"base", "adapters"} else ()

    def same(self, report: GenerateReport) -> int | None:
        """Count the images that equal the record's, pixel by pixel; None if the arguments ask for others."""
        if self.changed - MACHINE:
            return None
        recorded = [image["pixels"] for image in self.record.get("pictures", ())]
        return sum(bool(a.pixels == b) for a, b in zip(report.pictures, recorded, strict=False))


# --- dry run ---------------------------------------------------------------------------------------------------------


def _dry_run_report(plan: GeneratePlan, folder: Path | None, notes: tuple[str, ...]) -> GenerateReport:
    settings = plan.request.settings
    steps, guidance = plan.bases[0].preferred
    request = replace(settings, steps=settings.steps or steps, guidance=settings.guidance or guidance)
    machine = plan.request.machine
    record = records.make_record(plan, request, "", machine.device or "", machine.dtype or "")
    labels = tuple(column.label for column in plan.columns)
    return GenerateReport(
        folder, planned_images(plan), labels, len(plan.rows), grid_name(plan), record, 0.0, written=False, notes=notes
    )
