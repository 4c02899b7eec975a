"""Set up a training run from its settings: base model, images, initial adapter and optimizer."""

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
from krona_hub.layers.attachment import vector_branches_of
from krona_hub.pipelines.load_adapter import base_of
from krona_hub.sources import resolve
from krona_hub.training.configuration import ECHO, to_toml
from krona_hub.training.data.batches import Batches
from krona_hub.training.data.dataset import Data, Example
from krona_hub.training.data.encoding import Encoder, Source
from krona_hub.training.model.device import TrainingDevice, machine_for, open_base, shard, uses_fsdp
from krona_hub.training.model.model_families import ModelFamily, family_of
from krona_hub.training.model.objective import Objective
from krona_hub.training.model.optimizers import Average, make_optimizer
from krona_hub.training.model.precision import MixedPrecision
from krona_hub.training.model.trained_layers import fresh_adapter, plan_targets, started_from
from krona_hub.training.plan import TrainingImages, check_settings, read_images, square_side
from krona_hub.training.progress.metrics import Metrics, trackers_of
from krona_hub.training.progress.regularization_images import draw_prior, missing_images
from krona_hub.training.progress.samples import encode_prompts, generate_samples
from krona_hub.training.progress.training_state import Training
from krona_hub.training.settings import TrainingSettings
from krona_hub.training.training_record import LOCAL_SETTINGS, base_name, recorded

CHANGEABLE = (  # settings that a resumed run may change
    "steps", "checkpoint_every", "keep_checkpoints", "validate_every", "sample_every", "sample_prompts", "export",
    "sample_steps", "sample_guidance", "licence", "nan", *LOCAL_SETTINGS,
)  # fmt: skip
EMPTY = 0.25  # fraction of regularization images trained with an empty caption


@dataclass(frozen=True)
class Session:
    """What the end of a run needs in addition to the training state."""

    pipe: Any
    base: Base
    facts: dict[str, Any]


class Sources(NamedTuple):
    """The image sources of a run, and the fingerprint of its data and settings."""

    source: Source
    validation: Source | None
    prior: Source | None
    fingerprint: str


def prepared(settings: TrainingSettings, run: Path, encoding: Progress) -> tuple[Training, Session]:
    """Return a training run that can start, and its pipeline with the adapter attached."""
    check_settings(settings)
    torch.manual_seed(settings.seed)
    machine = machine_for(settings)
    accelerator = _accelerator(settings, machine, run)
    machine = replace(machine, device=accelerator.device)
    spread = uses_fsdp(accelerator)
    pipe = open_base(settings, machine, denoiser_waits=spread)
    family, base = family_of(pipe), base_of(pipe)
    start, side = _start(base, settings), square_side(pipe, family, settings)
    if spread and missing_images(settings):
        raise UsageError(
            "Regularization images cannot be generated with FSDP.", fix="Generate them first, on one device."
        )
    with accelerator.main_process_first():
        draw_prior(pipe, family, settings, machine.device, side)
    encoder = Encoder(pipe, family, settings, machine.device, machine.base_dtype)
    sampler = _sampler(pipe, family, settings, machine, side)
    sources = _sources(encoder, settings, encoding, accelerator.num_processes)
    encoder.free(keep_vae=sampler is not None)
    attach(pipe, start, trainable=True)
    training = _training(pipe, family, settings, run, accelerator, machine, sources)
    if spread:
        shard(getattr(pipe, family.denoiser), accelerator, training.parameters)
    training.sampler = sampler
    if accelerator.is_main_process:
        atomic_text(run / ECHO, to_toml(replace(settings, output=str(run.resolve()))), overwrite=True)
    facts = {"base": base_name(settings), "family": family.name, "pictures": len(sources.source.examples)}
    return training, Session(pipe, base, facts)


def _accelerator(settings: TrainingSettings, machine: TrainingDevice, run: Path) -> Accelerator:
    trackers = list(trackers_of(settings))
    accelerator = Accelerator(cpu=machine.device.type == "cpu", log_with=trackers or None, project_dir=str(run))
    if trackers:
        accelerator.init_trackers("krona", config={k: str(v) for k, v in recorded(settings).items()})
    return accelerator


def _start(base: Base, settings: TrainingSettings) -> Adapter:
    """Return the initial adapter."""
    if settings.init:
        return started_from(read(resolve(settings.init), base=base), base, settings)
    return fresh_adapter(plan_targets(base, settings), settings)


# --- images ----------------------------------------------------------------------------------------------------------


def _sources(encoder: Encoder, settings: TrainingSettings, encoding: Progress, processes: int) -> Sources:
    """Read all images, and encode them if the cache is enabled."""
    images = read_images(encoder.pipe, encoder.family, settings)
    prior_options = prior_settings(settings)
    source = Source(encoder, images.train.examples, images.sizes, settings)
    validation = _source_of(encoder, images, images.validation, settings)
    prior = _source_of(encoder, images, images.prior, prior_options)
    for each in (source, validation, prior):
        if each is not None and settings.cache:
            encoder.fill(each.examples, each.sizes, each.captions, encoding)
    return Sources(source, validation, prior, _fingerprint(settings, images, processes))


def prior_settings(settings: TrainingSettings) -> TrainingSettings:
    """Return the caption settings of regularization images: no trigger word and no template.

    If their target is the prediction of the base model, some captions are empty, because classifier-free guidance also
    uses the prediction without a prompt.
    """
    empty = EMPTY if settings.prior_target == "base" else 0.0
    dropout = max(settings.caption_dropout, empty)
    return replace(settings, trigger_word="", caption_template="{caption}", caption_dropout=dropout)


def _source_of(
    encoder: Encoder, images: TrainingImages, examples: tuple[Example, ...], settings: TrainingSettings
) -> Source | None:
    return Source(encoder, examples, images.sizes_of(examples, settings.buckets), settings) if examples else None


def _sampler(
    pipe: Any, family: ModelFamily, settings: TrainingSettings, machine: TrainingDevice, side: int
) -> Callable[[], list[Image]] | None:
    """Return the function that generates the samples. Prompts are encoded now, before the text encoders are freed."""
    if not settings.sample_every:
        return None
    conditions = encode_prompts(pipe, family, settings.sample_prompts or (settings.prompt,), machine.device)
    return lambda: generate_samples(pipe, conditions, settings, machine.device, side)


# --- training state --------------------------------------------------------------------------------------------------


def _training(
    pipe: Any, family: ModelFamily, settings: TrainingSettings, run: Path, accelerator: Accelerator,
    machine: TrainingDevice, sources: Sources,
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
        source=sources.source,
        batches=_batches(settings, sources.source, accelerator),
        branches=[*branches, *vector_branches_of(pipe)],
        parameters=parameters,
        optimizer=make_optimizer(parameters, settings),
        metrics=Metrics(run),
        fingerprint=sources.fingerprint,
        validation=sources.validation,
        prior=None if sources.prior is None else (sources.prior, _batches(settings, sources.prior, accelerator)),
        average=Average(parameters, settings.ema) if settings.ema else None,
        spread=uses_fsdp(accelerator),
    )


def _batches(settings: TrainingSettings, source: Source, accelerator: Accelerator) -> Batches:
    return Batches(source.sizes, settings.batch_size, settings.accumulation, accelerator.num_processes, settings.seed)


def _denoiser(pipe: Any, family: ModelFamily, settings: TrainingSettings, machine: TrainingDevice) -> Any:
    model = getattr(pipe, family.denoiser)
    checkpointing = settings.gradient_checkpointing
    if checkpointing or (checkpointing is None and machine.is_gpu):
        model.enable_gradient_checkpointing()
    return torch.compile(model) if settings.compile else model


def _fingerprint(settings: TrainingSettings, images: TrainingImages, processes: int) -> str:
    """Hash everything that determines the result and must not change when a run is resumed."""
    fixed = {name: value for name, value in settings.named.items() if name not in CHANGEABLE}
    others = Data((*images.prior, *images.validation), {}).fingerprint
    text = json.dumps([fixed, images.train.fingerprint, others, processes], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()
