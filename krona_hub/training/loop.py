"""The training loop. A step depends only on the state before it and on its number."""

from __future__ import annotations

import time
from math import isfinite
from shlex import quote

import torch
from torch import Tensor

from krona_hub.errors import DivergedError, StoppedError
from krona_hub.layers.attachment import without
from krona_hub.pipelines.stop_signal import Stop, stoppable
from krona_hub.training.data.encoding import Source
from krona_hub.training.model.device import peak_memory
from krona_hub.training.model.optimizers import has_own_mode, rate_at
from krona_hub.training.progress.checkpoint import save, saved_states
from krona_hub.training.progress.metrics import smoothed
from krona_hub.training.progress.training_state import StepReport, Training
from krona_hub.training.progress.validation import due, run_due_checks

PRIOR = 1_000_000  # first sample number of regularization images, so that their noise differs


def run_loop(training: Training) -> None:
    """Run the remaining steps.

    Raises DivergedError if the loss becomes NaN or infinite, and StoppedError after Ctrl-C, once a checkpoint is saved.
    """
    if has_own_mode(training.optimizer):
        training.optimizer.train()  # type: ignore[attr-defined]
    with stoppable() as stop:
        if training.step == 0:
            run_due_checks(training)
        while training.step < training.settings.steps:
            started = time.perf_counter()
            values, stopped = one_step(training, stop)
            _record_step(training, values, time.perf_counter() - started)
            _run_due_tasks(training, stopped)
            if stopped:
                raise StoppedError(
                    f"Stopped after step {training.step} of {training.settings.steps}; a checkpoint was saved.",
                    fix=f"Resume with: {_resume_command(training)}",
                )


def one_step(training: Training, stop: Stop) -> tuple[dict[str, float], bool]:
    """Run one optimizer step. Return its metrics, and whether a process received a stop signal."""
    s, rate = training.settings, rate_at(training.step, training.settings)
    for group in training.optimizer.param_groups:
        group["lr"] = rate
    training.optimizer.zero_grad(set_to_none=True)
    loss = _gradients(training)
    loss, stopped = _reduce(training, loss, stop.requested)
    training.precision.unscale(training.optimizer)
    norm = _norm(training.parameters)
    finite = isfinite(loss) and isfinite(norm)
    if finite:
        _clip(training.parameters, norm, s.clip)
    elif not (isfinite(loss) and training.precision.expects_overflow):
        _handle_non_finite(training)
    training.precision.step(training.optimizer, finite=finite)
    if finite and training.average is not None:
        training.average.update(training.step)
    training.step += 1
    return {"loss": loss, "learning_rate": rate, "gradient_norm": norm}, stopped


def _gradients(training: Training) -> float:
    """Accumulate the gradients of this process. Return the loss of its images, without the prior-preservation loss."""
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
    target = _base_prediction(training, source, part.examples, samples) if of_base else None
    latents, given = source.batch(part.examples, training.step, samples)
    return training.objective.loss(latents, given, training.step, samples, target)


@torch.no_grad()
def _base_prediction(training: Training, source: Source, examples: tuple[int, ...], samples: tuple[int, ...]) -> Tensor:
    """Return the prediction of the base model, without the adapter, at the noise of this step."""
    with without(training.branches):
        return training.objective.predict(*source.batch(examples, training.step, samples), training.step, samples)


def _reduce(training: Training, loss: float, stop: bool) -> tuple[float, bool]:
    """Average gradients and loss over the processes in one collective call; return whether one of them is to stop."""
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


def _clip(parameters: list[Tensor], norm: float, limit: float) -> None:
    if limit and norm > limit:
        for p in parameters:
            if p.grad is not None:
                p.grad.mul_(limit / norm)


def _handle_non_finite(training: Training) -> None:
    """Skip the step, or end the run with DivergedError."""
    if training.settings.nan == "skip":
        training.skipped += 1
        return
    steps = sorted(saved_states(training.run))
    last = f"the last good checkpoint is step {steps[-1]}" if steps else "no checkpoint was saved yet"
    skip = f"resume without such batches: {_resume_command(training)} --nan skip" if steps else "add --nan skip"
    raise DivergedError(
        f"The loss or gradient of step {training.step + 1} is NaN or infinite; {last}.",
        fix=f"Start a new run with a lower --learning-rate, or {skip}",
    )


def _resume_command(training: Training) -> str:
    """Return the command that resumes the run, quoted for a shell."""
    return f"krona train --resume {quote(str(training.run))}"


def _record_step(training: Training, values: dict[str, float], seconds: float) -> None:
    loss = values["loss"]
    if isfinite(loss):
        training.smooth_loss = smoothed(training.smooth_loss, loss)
    smooth = training.smooth_loss if training.smooth_loss is not None else loss
    if training.is_main:
        finite = {k: v if isfinite(v) else None for k, v in values.items()}
        epoch = round(training.batches.epoch_of(training.step), 4)
        training.metrics.add(training.step, **finite, smooth_loss=smooth, epoch=epoch, seconds=round(seconds, 4))
    if training.accelerator.trackers:
        training.accelerator.log({**values, "smooth_loss": smooth}, step=training.step)
    report = StepReport(training.step, training.settings.steps, loss, smooth, seconds, memory_used(training))
    training.on_step(report)


def memory_used(training: Training) -> int:
    """Return the peak memory in bytes of the GPU or, on other devices, of the process."""
    device = training.accelerator.device
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return peak_memory()


def _run_due_tasks(training: Training, stopped: bool) -> None:
    """Save a checkpoint, validate and sample, each at its own interval."""
    s, step = training.settings, training.step
    if step == s.steps or stopped or due(step, s.checkpoint_every):
        save(training)
    if step == s.steps or due(step, s.validate_every) or due(step, s.sample_every):
        run_due_checks(training)
