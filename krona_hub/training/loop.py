"""The loop: steps, and what happens between them. A step is a function of the state before it and of its number."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from math import isfinite
from shlex import quote
from types import FrameType

import torch
from torch import Tensor

from krona_hub.errors import DivergedError, StoppedError
from krona_hub.layers.attachment import without
from krona_hub.training.data.encoding import Source
from krona_hub.training.model.device import peak_memory
from krona_hub.training.model.optimizers import has_own_mode, rate_at
from krona_hub.training.progress.checkpoint import save, saved_states
from krona_hub.training.progress.metrics import smoothed
from krona_hub.training.progress.training_state import StepReport, Training
from krona_hub.training.progress.validation import due, run_due_checks

PRIOR = 1_000_000  # samples of the prior are numbered from here on


SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_loop(training: Training) -> None:
    """All steps that are left. Raises DivergedError for a loss that is no number, StoppedError after Ctrl-C; what was
    done until then is saved.
    """
    if has_own_mode(training.optimizer):
        training.optimizer.train()  # type: ignore[attr-defined]
    with stoppable() as stop:
        if training.step == 0:
            run_due_checks(training)
        while training.step < training.settings.steps:
            started = time.perf_counter()
            values, stopped = one_step(training, stop)
            _note(training, values, time.perf_counter() - started)
            _between(training, stopped)
            if stopped:
                raise StoppedError(
                    f"stopped after step {training.step} of {training.settings.steps}; it is saved.",
                    fix=f"Go on with: {_going_on(training)}",
                )


def one_step(training: Training, stop: Stop) -> tuple[dict[str, float], bool]:
    """One optimizer step: its measures, and whether any process was asked to stop."""
    s, rate = training.settings, rate_at(training.step, training.settings)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    training.optimizer.zero_grad(set_to_none=True)
    loss = _gradients(training)
    loss, stopped = _shared(training, loss, stop.wanted)
    training.precision.unscale(training.optimizer)
    norm = _norm(training.parameters)
    finite = isfinite(loss) and isfinite(norm)
    if finite:
        _clip(training.parameters, norm, s.clip)
    elif not (isfinite(loss) and training.precision.expects_overflow):
        _not_finite(training)
    training.precision.step(training.optimizer, finite=finite)
    if finite and training.average is not None:
        training.average.update(training.step)
    training.step += 1
    return {"loss": loss, "learning_rate": rate, "gradient_norm": norm}, stopped


def _gradients(training: Training) -> float:
    """Of every forward pass of this process; the loss of its pictures, without the prior's."""
    s, total = training.settings, 0.0
    rank = training.accelerator.process_index
    for number, part in enumerate(training.batches.parts(training.step, rank)):
        latents, given = training.source.batch(part.examples, training.step, part.samples)
        with training.precision.autocast():
            loss = training.objective.loss(latents, given, training.step, part.samples)
            both = loss if training.prior is None else loss + s.prior_weight * _prior_loss(training, number, rank)
        training.precision.backward(both / s.accumulation)
        total += float(loss.detach()) / s.accumulation
    return total


def _prior_loss(training: Training, number: int, rank: int) -> Tensor | float:
    if training.prior is None:
        return 0.0
    source, batches = training.prior
    part = batches.parts(training.step, rank)[number]
    samples = tuple(PRIOR + i for i in part.samples)
    of_base = training.settings.prior_target == "base"
    target = _base_says(training, source, part.examples, samples) if of_base else None
    latents, given = source.batch(part.examples, training.step, samples)
    return training.objective.loss(latents, given, training.step, samples, target)


@torch.no_grad()
def _base_says(training: Training, source: Source, examples: tuple[int, ...], samples: tuple[int, ...]) -> Tensor:
    """What the base, without the adapter, says of pictures at the noise of this step."""
    with without(training.branches):
        return training.objective.answer(*source.batch(examples, training.step, samples), training.step, samples)


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
    skip = f"go on without such batches: {_going_on(training)} --nan skip" if steps else "add --nan skip"
    raise DivergedError(
        f"the loss of step {training.step + 1} is no number; {last}.",
        fix=f"Start anew with a lower --learning-rate; or {skip}",
    )


def _going_on(training: Training) -> str:
    """The command, as a shell reads it."""
    return f"krona train --resume {quote(str(training.run))}"


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
    progress = StepReport(training.step, training.settings.steps, loss, smooth, seconds, memory_used(training))
    training.tell(progress)


def memory_used(training: Training) -> int:
    """Bytes that the GPU, or else the process, has held at most."""
    device = training.accelerator.device
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_memory()


def _between(training: Training, stopped: bool) -> None:
    """Checkpoint, validation and samples, each at its own interval."""
    s, step = training.settings, training.step
    if step == s.steps or stopped or due(step, s.checkpoint_every):
        save(training)
    if step == s.steps or due(step, s.validate_every) or due(step, s.sample_every):
        run_due_checks(training)


class Stop:
    """Whether somebody has asked to stop. A second Ctrl-C does not wait."""

    wanted = False

    def ask(self, number: int, _frame: FrameType | None) -> None:
        if self.wanted and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.wanted = True


@contextmanager
def stoppable() -> Iterator[Stop]:
    """Signals set the flag while the block runs; in another thread than the main one they stay as they are."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.ask) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
