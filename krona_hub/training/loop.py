"""The loop: steps, and what happens between them. A step is a function of the state before it and of its number."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor
from torch.optim import Optimizer

from krona_hub.errors import DivergedError, IntegrityError, StoppedError
from krona_hub.training.batches import Batches
from krona_hub.training.encoding import Source
from krona_hub.training.interruptions import Stop, stoppable
from krona_hub.training.metrics import Metrics, smoothed
from krona_hub.training.objective import Objective
from krona_hub.training.optimisers import Average, has_own_mode, rate_at
from krona_hub.training.settings import TrainingSettings
from krona_hub.training.state import load_state, random_states, save_state, saved_states, set_random_states

PRIOR = 1_000_000  # samples of the prior are numbered from here on


@dataclass(frozen=True)
class Progress:
    """What a person sees while it runs."""

    step: int  # that are done
    steps: int
    loss: float
    smooth_loss: float
    seconds: float  # of the last step
    memory: int  # bytes: the most that the device, or the process, has held


@dataclass
class Training:
    """A training in progress."""

    settings: TrainingSettings
    run: Path
    accelerator: Accelerator
    objective: Objective
    source: Source
    batches: Batches
    parameters: list[Tensor]
    optimizer: Optimizer
    metrics: Metrics
    fingerprint: str  # of settings and data: what a checkpoint must have been made with
    validation: Source | None = None
    prior: tuple[Source, Batches] | None = None
    average: Average | None = None
    step: int = 0  # steps that are done
    smooth_loss: float | None = None
    skipped: int = 0  # batches whose loss was no number
    sample: Callable[[int], None] | None = None
    tell: Callable[[Progress], None] = field(default=lambda _progress: None)

    @property
    def is_main(self) -> bool:
        return bool(self.accelerator.is_main_process)


def run_loop(training: Training) -> None:
    """All steps that are left. Raises DivergedError for a loss that is no number, StoppedError after Ctrl-C; what was
    done until then is saved.
    """
    if has_own_mode(training.optimizer):
        training.optimizer.train()  # type: ignore[attr-defined]
    with stoppable() as stop:
        if training.step == 0:
            _watch(training)
        while training.step < training.settings.steps:
            started = time.perf_counter()
            values, stopped = one_step(training, stop)
            _note(training, values, time.perf_counter() - started)
            _between(training, stopped)
            if stopped:
                raise StoppedError(
                    f"stopped after step {training.step} of {training.settings.steps}; it is saved.",
                    fix=f"Go on with: krona train --resume {training.run}",
                )


def one_step(training: Training, stop: Stop) -> tuple[dict[str, float], bool]:
    """One optimizer step: its measures, and whether any process was asked to stop."""
    s, rate = training.settings, rate_at(training.step, training.settings)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    training.optimizer.zero_grad(set_to_none=True)
    loss = _gradients(training)
    loss, stopped = _shared(training, loss, stop.wanted)
    norm = _norm(training.parameters)
    if isfinite(loss) and isfinite(norm):
        _clip(training.parameters, norm, s.clip)
        training.optimizer.step()
        if training.average is not None:
            training.average.update(training.step)
    else:
        _not_finite(training)
    training.step += 1
    return {"loss": loss, "learning_rate": rate, "gradient_norm": norm}, stopped


def _gradients(training: Training) -> float:
    """Of every forward pass of this process; the loss of its pictures, without the prior's."""
    s, total = training.settings, 0.0
    rank = training.accelerator.process_index
    for number, part in enumerate(training.batches.parts(training.step, rank)):
        latents, given = training.source.batch(part.examples, training.step, part.samples)
        with training.accelerator.autocast():
            loss = training.objective.loss(latents, given, training.step, part.samples)
            both = loss if training.prior is None else loss + s.prior_weight * _prior_loss(training, number, rank)
        training.accelerator.backward(both / s.accumulation)
        total += float(loss.detach()) / s.accumulation
    return total


def _prior_loss(training: Training, number: int, rank: int) -> Tensor | float:
    if training.prior is None:
        return 0.0
    source, batches = training.prior
    part = batches.parts(training.step, rank)[number]
    samples = tuple(PRIOR + i for i in part.samples)
    latents, given = source.batch(part.examples, training.step, samples)
    return training.objective.loss(latents, given, training.step, samples)


def _shared(training: Training, loss: float, stop: bool) -> tuple[float, bool]:
    """Mean gradients and loss over the processes, in one message; whether one of them is to stop."""
    if training.accelerator.num_processes == 1:
        return loss, stop
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in training.parameters]
    flat = torch.cat([*(g.flatten() for g in grads), torch.tensor([loss, float(stop)]).to(grads[0])])
    flat = training.accelerator.reduce(flat, "mean")
    pieces = flat[:-2].split([p.numel() for p in training.parameters])
    for parameter, piece in zip(training.parameters, pieces, strict=True):
        parameter.grad = piece.reshape(parameter.shape)
    return float(flat[-2]), bool(flat[-1] > 0)


def _norm(parameters: list[Tensor]) -> float:
    norms = [torch.linalg.vector_norm(p.grad) for p in parameters if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def _clip(parameters: list[Tensor], norm: float, most: float) -> None:
    if most and norm > most:
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(most / norm)


def _not_finite(training: Training) -> None:
    """The step is left out, or the training ends."""
    if training.settings.nan == "skip":
        training.skipped += 1
        return
    steps = sorted(saved_states(training.run))
    last = f"the last good checkpoint is that of step {steps[-1]}" if steps else "there is no checkpoint yet"
    raise DivergedError(
        f"the loss of step {training.step + 1} is no number; {last}.",
        fix="Lower --learning-rate, or leave such batches out with --nan skip; then --resume.",
    )


def _note(training: Training, values: dict[str, float], seconds: float) -> None:
    loss = values["loss"]
    if isfinite(loss):
        training.smooth_loss = smoothed(training.smooth_loss, loss)
    smooth = training.smooth_loss if training.smooth_loss is not None else loss
    if training.is_main:
        plain = {k: v if isfinite(v) else None for k, v in values.items()}
        epoch = round(training.batches.epoch_of(training.step), 4)
        training.metrics.add(training.step, **plain, smooth_loss=smooth, epoch=epoch, seconds=round(seconds, 4))
    if training.accelerator.trackers:
        training.accelerator.log({**values, "smooth_loss": smooth}, step=training.step)
    progress = Progress(training.step, training.settings.steps, loss, smooth, seconds, memory_used(training))
    training.tell(progress)


def memory_used(training: Training) -> int:
    device = training.accelerator.device
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    from resource import RUSAGE_SELF, getrusage

    return getrusage(RUSAGE_SELF).ru_maxrss * 1024


def _between(training: Training, stopped: bool) -> None:
    """Checkpoint, validation and samples, each at its own interval."""
    s, step = training.settings, training.step
    if step == s.steps or stopped or _due(step, s.checkpoint_every):
        save(training)
    if step == s.steps or _due(step, s.validate_every) or _due(step, s.sample_every):
        _watch(training)


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _watch(training: Training) -> None:
    """Validation and samples of the adapter as it would be handed out; by the main process, the others wait."""
    s, step, last = training.settings, training.step, training.step == training.settings.steps
    with as_handed_out(training):
        if training.is_main and s.validate_every and (last or step == 0 or _due(step, s.validate_every)):
            training.metrics.add(step, validation_loss=validate(training))
        wanted = s.sample_every and (last or step == 0 or _due(step, s.sample_every))
        if training.is_main and wanted and training.sample is not None:
            training.sample(step)
    training.accelerator.wait_for_everyone()


def validate(training: Training) -> float:
    """Mean loss of the held-out pictures at fixed noise and times."""
    source = training.validation
    if source is None:
        return float("nan")
    seed, losses = training.settings.seed, []
    for i in range(len(source.examples)):
        latents, given = source.fixed(i, seed)
        losses.append(training.objective.validation_loss(latents, given, i))
    return sum(losses) / len(losses)


class as_handed_out:
    """The factors as the final adapter has them, while the block runs: averaged, where there is an average."""

    def __init__(self, training: Training) -> None:
        self.training = training

    def __enter__(self) -> None:
        if has_own_mode(self.training.optimizer):
            self.training.optimizer.eval()  # type: ignore[attr-defined]
        if self.training.average is not None:
            self.training.average.exchange()

    def __exit__(self, *_: object) -> None:
        if self.training.average is not None:
            self.training.average.exchange()
        if has_own_mode(self.training.optimizer):
            self.training.optimizer.train()  # type: ignore[attr-defined]


# ── saving and going on ──────────────────────────────────────────────────────────────────────────


def save(training: Training) -> None:
    """A checkpoint of this step, by the main process."""
    if training.is_main:
        average = training.average.values if training.average is not None else []
        tree = {
            "fingerprint": training.fingerprint,
            "factors": list(training.parameters),
            "optimizer": training.optimizer.state_dict(),
            "average": list(average),
            "random": random_states(),
            "smooth_loss": training.smooth_loss,
            "skipped": training.skipped,
        }
        save_state(training.run, training.step, tree, training.settings.keep_checkpoints)
    training.accelerator.wait_for_everyone()


def resume(training: Training) -> None:
    """Set everything to what it was at the newest checkpoint. Raises IntegrityError where the data is another."""
    step, tree = load_state(training.run)
    if tree["fingerprint"] != training.fingerprint:
        raise IntegrityError(
            f"{training.run} was trained with other pictures, captions or settings than there are now.",
            fix="Put them back as they were, or start a new run.",
        )
    with torch.no_grad():
        for parameter, value in zip(training.parameters, tree["factors"], strict=True):
            parameter.copy_(value)
        if training.average is not None:
            for kept, value in zip(training.average.values, tree["average"], strict=True):
                kept.copy_(value)
    training.optimizer.load_state_dict(tree["optimizer"])
    training.step, training.smooth_loss, training.skipped = step, tree["smooth_loss"], tree["skipped"]
    set_random_states(tree["random"])
    if training.is_main:
        training.metrics.cut(step)


def same_everywhere(training: Training) -> None:
    """The factors of the main process, in all: they start equal, unless a process read other numbers."""
    if training.accelerator.num_processes > 1:
        for parameter in training.parameters:
            parameter.data.copy_(broadcast(parameter.data))
