"""Everything that a training needs, from its settings: the base, the pictures, the start, the optimizer."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from krona_hub.adapter import Adapter
from krona_hub.bases.base import Base
from krona_hub.checkpoints.atomic import atomic_text
from krona_hub.formats.files import read
from krona_hub.layers import attach, branches_of
from krona_hub.runtime import base_of
from krona_hub.sources import resolve
from krona_hub.training.batches import Batches
from krona_hub.training.configuration import ECHO, to_toml
from krona_hub.training.encoding import Encoder, Source
from krona_hub.training.families import ModelFamily, family_of
from krona_hub.training.machine import Machine, machine_for, open_base
from krona_hub.training.metrics import Metrics
from krona_hub.training.objective import Objective
from krona_hub.training.optimisers import Average, make_optimizer
from krona_hub.training.plan import Pictures, check_settings, read_pictures
from krona_hub.training.record import ELSEWHERE, base_name, recorded
from krona_hub.training.sampling import draw_samples, encode_prompts, save_samples
from krona_hub.training.settings import TrainingSettings
from krona_hub.training.targets import fresh_adapter, plan_targets, started_from
from krona_hub.training.training import Training

FREE = ("steps", "checkpoint_every", "keep_checkpoints", "validate_every", "sample_every", "sample_prompts", "export",
        "sample_steps", "sample_guidance", "licence", *ELSEWHERE)  # what a resumed run may change  # fmt: skip
Encoding = Callable[[int, int], None]  # done, total


@dataclass(frozen=True)
class Session:
    """What the loop does not need and the end does."""

    pipe: Any
    base: Base
    facts: dict[str, Any]


def prepared(settings: TrainingSettings, run: Path, encoding: Encoding) -> tuple[Training, Session]:
    check_settings(settings)
    torch.manual_seed(settings.seed)
    machine = machine_for(settings)
    accelerator = _accelerator(settings, machine, run)
    machine = replace(machine, device=accelerator.device)
    pipe = open_base(settings, machine)
    family, base = family_of(pipe), base_of(pipe)
    start = _start(base, settings)
    pictures = read_pictures(pipe, family, settings)
    encoder = Encoder(pipe, family, settings, machine.device, machine.base_dtype)
    source = Source(encoder, pictures.train.examples, pictures.sizes)
    validation = _beside(encoder, pictures, pictures.validation, settings)
    prior = _beside(encoder, pictures, pictures.prior, settings)
    told = encode_prompts(pipe, family, _sample_prompts(settings), machine.device) if settings.sample_every else None
    for each in (source, validation, prior):
        if each is not None and settings.cache:
            encoder.fill(each.examples, each.sizes, each.captions(settings), encoding)
    encoder.free(keep_vae=told is not None)
    attach(pipe, start, trainable=True)
    parameters: list[Tensor] = [p for branch in branches_of(pipe) for p in branch.parameters() if p.requires_grad]
    model = _denoiser(pipe, family, settings, machine)
    objective = Objective(model, family, family.process(pipe.scheduler), settings, machine.device, machine.base_dtype)
    training = Training(
        settings, run, accelerator, objective, source, _batches(settings, source, accelerator), parameters,
        make_optimizer(parameters, settings), Metrics(run), _fingerprint(settings, pictures), validation,
        None if prior is None else (prior, _batches(settings, prior, accelerator)),
        Average(parameters, settings.ema) if settings.ema else None,
    )  # fmt: skip
    if told is not None:
        training.sample = lambda step: save_samples(
            run, step, draw_samples(pipe, told, settings, machine.device, _side(pictures), step)
        )
    facts = {"base": base_name(settings), "family": family.name, "pictures": len(pictures.train.examples)}
    if accelerator.is_main_process:
        atomic_text(run / ECHO, to_toml(settings), overwrite=True)
    return training, Session(pipe, base, facts)


def _accelerator(settings: TrainingSettings, machine: Machine, run: Path) -> Accelerator:
    accelerator = Accelerator(
        cpu=machine.device.type == "cpu", mixed_precision=machine.autocast, log_with=list(settings.trackers) or None,
        project_dir=str(run),
    )  # fmt: skip
    if settings.trackers:
        accelerator.init_trackers("krona", config={k: str(v) for k, v in recorded(settings).items()})
    return accelerator


def _start(base: Base, settings: TrainingSettings) -> Adapter:
    """The adapter that the training begins with."""
    if settings.init:
        return started_from(read(resolve(settings.init), base=base), base, settings)
    return fresh_adapter(plan_targets(base, settings), settings)


def _beside(encoder: Encoder, pictures: Pictures, examples: Any, settings: TrainingSettings) -> Source | None:
    return Source(encoder, examples, pictures.sizes_of(examples, settings.buckets)) if examples else None


def _batches(settings: TrainingSettings, source: Source, accelerator: Accelerator) -> Batches:
    return Batches(source.sizes, settings.batch_size, settings.accumulation, accelerator.num_processes, settings.seed)


def _sample_prompts(settings: TrainingSettings) -> tuple[str, ...]:
    return settings.sample_prompts or (settings.prompt,)


def _side(pictures: Pictures) -> int:
    """Of a square sample, pixels."""
    return pictures.resolution // pictures.multiple * pictures.multiple


def _denoiser(pipe: Any, family: ModelFamily, settings: TrainingSettings, machine: Machine) -> Any:
    model = getattr(pipe, family.denoiser)
    wanted = settings.gradient_checkpointing
    if wanted or (wanted is None and machine.is_gpu):
        model.enable_gradient_checkpointing()
    return torch.compile(model) if settings.compile else model


def _fingerprint(settings: TrainingSettings, pictures: Pictures) -> str:
    """Of everything that decides a training's numbers and may not change when it goes on."""
    fixed = {name: value for name, value in settings.named.items() if name not in FREE}
    prior = [e.path.name for e in (*pictures.prior, *pictures.validation)]
    text = json.dumps([fixed, pictures.train.fingerprint, prior], sort_keys=True, default=str)
    return sha256(text.encode()).hexdigest()
