"""From what is asked to pictures in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from krona_hub.aliases import Progress
from krona_hub.errors import UsageError
from krona_hub.images import record as records
from krona_hub.images.output_files import check_place, grid_name, pictures_of
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

MACHINE = {"out", "device", "dtype", "offload", "tiled_vae", "batch", "variant"}  # change no picture but by rounding


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
    """Make pictures with a base and adapters: numbered PNGs, a labelled grid and a record in the folder `out`.

    `base` is a diffusers folder, a checkpoint file, a Hub id or `tiny-scenes`; `adapters` are files or Hub ids in any
    format, alone or with a strength. Several adapters make a column each, beside one of the base alone, with equal
    seeds and equal noise, unless they act `together`; `strengths` multiply their own and make a column each; `compare`
    adds or leaves out the base's column; `beside` are further bases with a column each. Every prompt gets
    `images_per_prompt` pictures (`batch`, if not given) from seeds that count up from `seed`, `batch` of them computed
    together. `size` is in pixels, (width, height); None for steps, guidance, scheduler and size leaves it to the base.
    `more` goes to the pipeline's call as it is. `out=None` writes nothing: the report has the images.

    `again` repeats a record, a folder of pictures or one PNG; what is given besides takes the place of its own.
    `progress` gets the denoising steps that are done, of all pictures, and their total. Raises a KronaError with a fix:
    UsageError, NotFoundError, UnknownBaseError, BaseMismatchError, ResourceError for full memory, and others.
    """
    given = {
        "base": None if base is None else str(base), "prompts": prompts, "adapters": [_weighted(a) for a in adapters],
        "negative": negative, "seed": seed, "images_per_prompt": images_per_prompt, "batch": batch, "steps": steps,
        "guidance": guidance, "scheduler": scheduler, "size": size, "more": more or {}, "strengths": strengths,
        "together": together, "compare": compare, "beside": [str(b) for b in beside], "device": device, "dtype": dtype,
        "offload": offload, "tiled_vae": tiled_vae, "variant": variant, "config": config,
    }  # fmt: skip
    repeated = _Repeated.of(again, given) if again is not None else None
    plan = make_plan(_checked(**(repeated.arguments if repeated else given)))
    folder = None if out is None else Path(out).expanduser()
    if folder is not None:
        check_place(folder, overwrite)
    notes = (*plan.notes, *(repeated.notes(plan) if repeated else ()))
    if dry_run:
        return _planned(plan, folder, notes)
    from krona_hub.images.execute import execute

    report = execute(plan, folder, progress or (lambda _done, _total: None))
    return replace(report, notes=(*notes, *report.notes), same=repeated.same(report) if repeated else None)


def _weighted(adapter: str | Path | tuple[str | Path, float]) -> tuple[str, float]:
    source, weight = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
    return str(source), float(weight)


def _checked(**given: Any) -> GenerateRequest:
    """Everything looked at that can be judged without looking at a file."""
    if given["base"] is None:
        raise UsageError("there is no base.", fix="krona generate BASE --prompt …: a folder, a file or a Hub id.")
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
class _Repeated:
    """A record that is repeated, with what was given besides in place of its own."""

    record: Mapping[str, Any]
    arguments: Mapping[str, Any]
    changed: frozenset[str]  # names of arguments that replace the record's

    @classmethod
    def of(cls, again: str | Path, given: Mapping[str, Any]) -> _Repeated:
        record = records.read_record(again)
        own = records.arguments_of(record, Path(again).expanduser().parent)
        plain = {"seed": 0, "batch": 1}  # defaults that are no wish
        new = {name: value for name, value in given.items() if value and value != plain.get(name)}
        if "base" in new:
            own = {**own, "config": None, "variant": None}
        return cls(record, {**given, **own, **new}, frozenset(new))

    def notes(self, plan: GeneratePlan) -> tuple[str, ...]:
        return records.check_same_files(self.record, plan) if not self.changed & {"base", "adapters"} else ()

    def same(self, report: GenerateReport) -> int | None:
        """How many pictures are the record's, pixel by pixel; None where others were asked for."""
        if self.changed - MACHINE:
            return None
        was = [picture["pixels"] for picture in self.record.get("pictures", ())]
        return sum(bool(a.pixels == b) for a, b in zip(report.pictures, was, strict=False))


# --- planning and drawing --------------------------------------------------------------------------------------------


def _planned(plan: GeneratePlan, folder: Path | None, notes: tuple[str, ...]) -> GenerateReport:
    settings = plan.request.settings
    steps, guidance = plan.bases[0].preferred
    request = replace(settings, steps=settings.steps or steps, guidance=settings.guidance or guidance)
    machine = plan.request.machine
    record = records.make_record(plan, request, "", machine.device or "", machine.dtype or "")
    labels = tuple(column.label for column in plan.columns)
    return GenerateReport(
        folder, pictures_of(plan), labels, len(plan.rows), grid_name(plan), record, 0.0, written=False, notes=notes
    )
