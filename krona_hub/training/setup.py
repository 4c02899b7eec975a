"""Everything that a training needs, from its settings: the base, the pictures, the start, the optimizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from PIL.Image import Image
from torch import Tensor

from krona_hub.adapters.adapter import Adapter
from krona_hub.aliases import Progress
from krona_hub.bases.base import Base
from krona_hub.checkpoints.atomic import atomic_text
from krona_hub.errors import UsageError
from krona_hub.formats.reading.reader import read
from krona_hub.layers import attach, branches_of
from krona_hub.pipelines.load_adapter import base_of
from krona_hub.sources import resolve
from krona_hub.training.configuration import ECHO, to_toml
from krona_hub.training.data.batches import Batches
from krona_hub.training.data.dataset import Data, Example
from krona_hub.training.data.encoding import Encoder, Source
from krona_hub.training.model.device import TrainingDevice, is_wanted, machine_for, open_base, shard
from krona_hub.training.model.model_families import ModelFamily, family_of
from krona_hub.training.model.objective import Objective
from krona_hub.training.model.optimizers import Average, make_optimizer
from krona_hub.training.model.precision import MixedPrecision
from krona_hub.training.model.trained_layers import fresh_adapter, plan_targets, started_from
from krona_hub.training.plan import Pictures, check_settings, read_pictures, square_side
from krona_hub.training.progress.metrics import Metrics, trackers_of
from krona_hub.training.progress.regularization_images import draw_prior, missing_pictures
from krona_hub.training.progress.samples import draw_samples, encode_prompts
from krona_hub.training.progress.training_state import Training
from krona_hub.training.settings import TrainingSettings
from krona_hub.training.training_record import ELSEWHERE, base_name, recorded

FREE = ("steps", "checkpoint_every", "keep_checkpoints", "validate_every", "sample_every", "sample_prompts", "export",
        "sample_steps", "sample_guidance", "licence", "nan", *ELSEWHERE)  # what a resumed run may change  # fmt: skip
EMPTY = 0.25  # share of the class that is shown without a caption


@dataclass(frozen=True)
class Session:
    """What the loop does not need and the end does."""

    pipe: Any
    base: Base
    facts: dict[str, Any]


class Seen(NamedTuple):
    """The pictures of a training, encoded or to be encoded."""

    source: Source
    validation: Source | None
    prior: Source | None
    fingerprint: str


def prepared(settings: TrainingSettings, run: Path, encoding: Progress) -> tuple[Training, Session]:
    """A training that can begin, and its pipeline with the adapter attached. Raises what its parts raise."""
    check_settings(settings)
    torch.manual_seed(settings.seed)
    machine = machine_for(settings)
    accelerator = _accelerator(settings, machine, run)
    machine = replace(machine, device=accelerator.device)
    spread = is_wanted(accelerator)
    pipe = open_base(settings, machine, denoiser_waits=spread)
    family, base = family_of(pipe), base_of(pipe)
    start, side = _start(base, settings), square_side(pipe, family, settings)
    if spread and missing_pictures(settings):
        raise UsageError("with FSDP, nothing can be drawn before the training.", fix="Draw them first, on one device.")
    with accelerator.main_process_first():
        draw_prior(pipe, family, settings, machine.device, side)
    encoder = Encoder(pipe, family, settings, machine.device, machine.base_dtype)
    sampler = _sampler(pipe, family, settings, machine, side)
    seen = _seen(encoder, settings, encoding, accelerator.num_processes)
    encoder.free(keep_vae=sampler is not None)
    attach(pipe, start, trainable=True)
    training = _training(pipe, family, settings, run, accelerator, machine, seen)
    if spread:
        shard(getattr(pipe, family.denoiser), accelerator, training.parameters)
    training.sampler = sampler
    if accelerator.is_main_process:
        atomic_text(run / ECHO, to_toml(replace(settings, output=str(run.resolve()))), overwrite=True)
    facts = {"base": base_name(settings), "family": family.name, "pictures": len(seen.source.examples)}
    return training, Session(pipe, base, facts)


def _accelerator(settings: TrainingSettings, machine: TrainingDevice, run: Path) -> Accelerator:
    trackers = list(trackers_of(settings))
    accelerator = Accelerator(cpu=machine.device.type == "cpu", log_with=trackers or None, project_dir=str(run))
    if trackers:
        accelerator.init_trackers("krona", config={k: str(v) for k, v in recorded(settings).items()})
    return accelerator


def _start(base: Base, settings: TrainingSettings) -> Adapter:
    """The adapter that the training begins with."""
    if settings.init:
        return started_from(read(resolve(settings.init), base=base), base, settings)
    return fresh_adapter(plan_targets(base, settings), settings)


# --- pictures --------------------------------------------------------------------------------------------------------


def _seen(encoder: Encoder, settings: TrainingSettings, encoding: Progress, processes: int) -> Seen:
    """Every picture found, and encoded where that is kept."""
    pictures = read_pictures(encoder.pipe, encoder.family, settings)
    plain = of_the_class(settings)
    source = Source(encoder, pictures.train.examples, pictures.sizes, settings)
    validation = _beside(encoder, pictures, pictures.validation, settings)
    prior = _beside(encoder, pictures, pictures.prior, plain)
    for each in (source, validation, prior):
        if each is not None and settings.cache:
            encoder.fill(each.examples, each.sizes, each.captions, encoding)
    return Seen(source, validation, prior, _fingerprint(settings, pictures, processes))


def of_the_class(settings: TrainingSettings) -> TrainingSettings:
    """How captions of the class are told: without what names the subject. Where the base is to stay as it is, some are
    empty, too: guidance leads away from what it says then.
    """
    empty = EMPTY if settings.prior_target == "base" else 0.0
    dropout = max(settings.caption_dropout, empty)
    return replace(settings, trigger_word="", caption_template="{caption}", caption_dropout=dropout)


def _beside(
    encoder: Encoder, pictures: Pictures, examples: tuple[Example, ...], settings: TrainingSettings
) -> Source | None:
    return Source(encoder, examples, pictures.sizes_of(examples, settings.buckets), settings) if examples else None


def _sampler(
    pipe: Any, family: ModelFamily, settings: TrainingSettings, machine: TrainingDevice, side: int
) -> Callable[[], list[Image]] | None:
    """What draws the samples; their prompts are encoded while there are text encoders."""
    if not settings.sample_every:
        return None
    told = encode_prompts(pipe, family, settings.sample_prompts or (settings.prompt,), machine.device)
    return lambda: draw_samples(pipe, told, settings, machine.device, side)


# --- the loop's own --------------------------------------------------------------------------------------------------


def _training(
    pipe: Any, family: ModelFamily, settings: TrainingSettings, run: Path, accelerator: Accelerator,
    machine: TrainingDevice, seen: Seen,
) -> Training:  # fmt: skip
    branches = branches_of(pipe)
    parameters: list[Tensor] = [p for branch in branches for p in branch.parameters() if p.requires_grad]
    model = _denoiser(pipe, family, settings, machine)
    objective = Objective(model, family, family.process(pipe.scheduler), settings, machine.device, machine.base_dtype)
    return Training(
        settings=settings,
        run=run,
        accelerator=accelerator,
        precision=MixedPrecision(machine.autocast, machine.device),
        objective=objective,
        source=seen.source,
        batches=_batches(settings, seen.source, accelerator),
        branches=branches,
        parameters=parameters,
        optimizer=make_optimizer(parameters, settings),
        metrics=Metrics(run),
        fingerprint=seen.fingerprint,
        validation=seen.validation,
        prior=None if seen.prior is None else (seen.prior, _batches(settings, seen.prior, accelerator)),
        average=Average(parameters, settings.ema) if settings.ema else None,
        spread=is_wanted(accelerator),
    )


def _batches(settings: TrainingSettings, source: Source, accelerator: Accelerator) -> Batches:
    return Batches(source.sizes, settings.batch_size, settings.accumulation, accelerator.num_processes, settings.seed)


def _denoiser(pipe: Any, family: ModelFamily, settings: TrainingSettings, machine: TrainingDevice) -> Any:
    model = getattr(pipe, family.denoiser)
    wanted = settings.gradient_checkpointing
    if wanted or (wanted is None and machine.is_gpu):
        model.enable_gradient_checkpointing()
    return torch.compile(model) if settings.compile else model


def _fingerprint(settings: TrainingSettings, pictures: Pictures, processes: int) -> str:
    """Of everything that decides a training's numbers and may not change when it goes on."""
    fixed = {name: value for name, value in settings.named.items() if name not in FREE}
    others = Data((*pictures.prior, *pictures.validation), {}).fingerprint
    text = json.dumps([fixed, pictures.train.fingerprint, others, processes], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()
