"""Calls of a denoiser, recorded while a pipeline generates, and repeated with any adapter.

A recorded call holds one row of every argument: noisy latents, time, conditions. It depends on no model family: the
pipeline prepares the arguments itself. Conditions that text encoders computed are linked to their encoding, so that
they are computed again where an adapter changes the text encoders.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from krona_hub.errors import UnsupportedError
from krona_hub.images.call_pipeline import call_arguments, call_with
from krona_hub.images.request import Settings
from krona_hub.pipelines.opening import quiet
from krona_hub.pipelines.randomness import generator

SHARED = ("txt_ids", "img_ids")  # arguments without a batch dimension
Path = tuple[str, ...]  # of an argument: its name, and keys inside mappings


class Encoding(NamedTuple):
    """A call of the pipeline's prompt encoder."""

    arguments: Mapping[str, Any]
    outputs: tuple[Any, ...]


class Link(NamedTuple):
    """An argument that is one row of an output of the prompt encoder."""

    path: Path
    output: int
    row: int


@dataclass(frozen=True, eq=False)
class DenoiserCall:
    """One row of a call of the denoiser, on the CPU."""

    prompt: int  # index of the prompt
    arguments: Mapping[str, Any]  # name -> tensor (1, …), mapping, list or constant
    latents: str  # name of the argument with the noisy latents
    step: int  # of the schedule
    encoding: Encoding | None = None
    links: tuple[Link, ...] = ()


@dataclass(frozen=True)
class Trajectory:
    """How calls are recorded: the settings of the pipeline, and how many calls of each kind a prompt gives."""

    settings: Settings
    seed: int
    points: int = 6  # calls on the way from noise to the image
    renoised: int = 6  # calls at noised versions of the result


@dataclass
class _Recorder:
    """Records the calls of a denoiser and of the prompt encoder during one call of the pipeline."""

    names: tuple[str, ...]
    calls: list[dict[str, Any]] = field(default_factory=list)
    encoding: Encoding | None = None

    def before(self, _module: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        self.calls.append({**dict(zip(self.names, args, strict=False)), **named})


def denoiser_of(pipe: Any) -> nn.Module:
    """Return the model that a pipeline calls in every step. Raises UnsupportedError if there is none."""
    for name in ("unet", "transformer"):
        if isinstance(model := getattr(pipe, name, None), nn.Module):
            return model
    raise UnsupportedError(
        f"{type(pipe).__name__} has neither a U-Net nor a transformer.", fix="Use a base model that has one."
    )


def record_calls(pipe: Any, prompt: str, number: int, role: str, how: Trajectory, *, empty: bool) -> list[DenoiserCall]:
    """Generate an image as latents, and return some of the denoiser's calls.

    Parameters
    ----------
    pipe : diffusers pipeline, with the adapters at the strengths that the trajectory has
    prompt, number, role : the prompt, its index, and what the calls are for; the seed depends on the last two
    how : settings and counts
    empty : record the rows with the empty (or negative) prompt instead, if guidance adds them

    Returns
    -------
    list of DenoiserCall : `points` calls of the trajectory, and `renoised` calls at noised versions of its end
    """
    model, encoder = denoiser_of(pipe), _Encoder(pipe)
    recorder = _Recorder(tuple(inspect.signature(model.forward).parameters))
    handle = model.register_forward_pre_hook(recorder.before, with_kwargs=True)
    call = call_with(how.settings, list(call_arguments(pipe)))
    noise = generator(how.seed, f"calibrate {role}", number)
    try:
        with encoder.recording(recorder), quiet(), torch.no_grad():
            result = pipe(prompt=[prompt], generator=noise, output_type="latent", **call)
    finally:
        handle.remove()
    return _chosen(pipe, recorder, result[0], number, role, how, empty=empty)


def _chosen(
    pipe: Any, recorder: _Recorder, end: Any, number: int, role: str, how: Trajectory, *, empty: bool
) -> list[DenoiserCall]:
    times = pipe.scheduler.timesteps
    each = max(1, len(recorder.calls) // max(1, len(times)))  # calls per step: 2 if guidance is a call of its own
    steps = range(len(recorder.calls) // each)
    seen = [recorder.calls[step * each] for step in steps]
    order = generator(how.seed, f"calibrate {role} steps", number)
    calls = [_row(seen[i], number, i, recorder, empty=empty) for i in _spread(len(seen), how.points, order)]
    afterwards = [
        _row(seen[step], number, step, recorder, empty=empty) for step in _spread(len(seen), how.renoised, order)
    ]
    noised = (
        _renoised(pipe, call, end, times, generator(how.seed, f"calibrate {role} noise", number, i))
        for i, call in enumerate(afterwards)
    )
    return [*calls, *(call for call in noised if call is not None)]


def _spread(count: int, wanted: int, order: torch.Generator) -> list[int]:
    """Return steps that divide the schedule evenly, from a random start within the first interval."""
    wanted = min(wanted, count)
    start = float(torch.rand((), generator=order))
    return [int((i + start) * count / wanted) for i in range(wanted)]


def _row(given: Mapping[str, Any], number: int, step: int, recorder: _Recorder, *, empty: bool) -> DenoiserCall:
    latents = next(iter(name for name in recorder.names if name in given))
    batch = len(given[latents])
    at = 0 if empty else batch - 1
    arguments = {name: _one(value, batch, at, name) for name, value in given.items()}
    links = tuple(_links(arguments, recorder.encoding)) if recorder.encoding else ()
    return DenoiserCall(number, arguments, latents, step, recorder.encoding, links)


def _one(value: Any, batch: int, at: int, name: str) -> Any:
    """Return one row of an argument, on the CPU."""
    if isinstance(value, Tensor):
        if value.dim() == 0:
            return value.detach().cpu()[None]
        is_batched = len(value) == batch and name not in SHARED
        return (value[at : at + 1] if is_batched else value).detach().cpu()
    if isinstance(value, Mapping):
        return {key: _one(each, batch, at, str(key)) for key, each in value.items()}
    if isinstance(value, list | tuple) and len(value) == batch and all(isinstance(v, Tensor) for v in value):
        return [value[at].detach().cpu()]
    return value


# --- noised results --------------------------------------------------------------------------------------------------


def _renoised(pipe: Any, call: DenoiserCall, end: Any, times: Tensor, source: torch.Generator) -> DenoiserCall | None:
    """Return the call at a noised version of the result; None if the scheduler or the latents do not allow it."""
    scheduler, now = pipe.scheduler, call.arguments[call.latents]
    if not isinstance(now, Tensor) or not isinstance(end, Tensor) or end.shape[1:] != now.shape[1:]:
        return None
    result = end[:1].detach().cpu().float()
    noise, time = torch.randn(result.shape, generator=source), times[call.step : call.step + 1].cpu()
    with _restarted(scheduler):
        if hasattr(scheduler, "add_noise"):
            noisy = scheduler.add_noise(result, noise, time)
        elif hasattr(scheduler, "scale_noise"):
            noisy = scheduler.scale_noise(result, time, noise)
        else:
            return None
    with _restarted(scheduler):
        if hasattr(scheduler, "scale_model_input"):
            noisy = scheduler.scale_model_input(noisy, time[0])
    return replace(call, arguments={**call.arguments, call.latents: noisy.to(now.dtype)})


@contextmanager
def _restarted(scheduler: Any) -> Iterator[None]:
    """Let a scheduler look up its step from the time, and restore its position afterwards."""
    places = {name: getattr(scheduler, name) for name in ("_step_index", "_begin_index") if hasattr(scheduler, name)}
    for name in places:
        setattr(scheduler, name, None)
    try:
        yield
    finally:
        for name, value in places.items():
            setattr(scheduler, name, value)


# --- prompt encoders -------------------------------------------------------------------------------------------------


class _Encoder:
    """The prompt encoder of a pipeline, with its calls recorded."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    @contextmanager
    def recording(self, recorder: _Recorder) -> Iterator[None]:
        original = getattr(self.pipe, "encode_prompt", None)
        if original is None:
            yield
            return
        names = tuple(inspect.signature(original).parameters)

        def recorded(*args: Any, **named: Any) -> Any:
            outputs = original(*args, **named)
            if recorder.encoding is None:
                given = {**dict(zip(names, args, strict=False)), **named}
                recorder.encoding = Encoding(given, _flat(outputs))
            return outputs

        self.pipe.encode_prompt = recorded
        try:
            yield
        finally:
            del self.pipe.encode_prompt


def _flat(outputs: Any) -> tuple[Any, ...]:
    """Return the outputs as a tuple of tensors on the CPU; None for anything else."""
    given = outputs if isinstance(outputs, tuple | list) else (outputs,)
    return tuple(each.detach().cpu() if isinstance(each, Tensor) else None for each in given)


def _links(arguments: Mapping[str, Any], encoding: Encoding) -> Iterator[Link]:
    for path, value in _leaves(arguments):
        for number, output in enumerate(encoding.outputs):
            if not isinstance(value, Tensor) or output is None or output.shape[1:] != value.shape[1:]:
                continue
            row = next((i for i in range(len(output)) if torch.equal(output[i : i + 1].to(value), value)), None)
            if row is not None:
                yield Link(path, number, row)
                break


def _leaves(arguments: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        else:
            yield (*path, name), value


# --- repetition ------------------------------------------------------------------------------------------------------


class RepeatedCall(NamedTuple):
    """How recorded calls are repeated."""

    pipe: Any
    device: torch.device
    dtype: torch.dtype
    text: bool = False  # whether the text encoders are called again


def outputs_of(how: RepeatedCall, calls: Sequence[DenoiserCall]) -> list[Tensor]:
    """Return the denoiser's outputs for calls of one prompt, each (1, …), computed together."""
    arguments = _joined([call.arguments for call in calls], how)
    if how.text:
        arguments = _encoded_again(how, calls, arguments)
    with quiet():
        out = denoiser_of(how.pipe)(**{**arguments, "return_dict": False})[0]
    return list(out) if isinstance(out, list | tuple) else list(out.split(1))


def _joined(rows: Sequence[Any], how: RepeatedCall) -> Any:
    """Join the rows of one argument, on the device."""
    first = rows[0]
    if isinstance(first, Tensor):
        return _moved(first if len(first) != 1 else torch.cat(list(rows)), how)
    if isinstance(first, Mapping):
        return {key: _joined([row[key] for row in rows], how) for key in first}
    if isinstance(first, list) and all(isinstance(each, Tensor) for each in first):
        return [_moved(each, how) for row in rows for each in row]
    return first


def _moved(tensor: Tensor, how: RepeatedCall) -> Tensor:
    return tensor.to(how.device, how.dtype) if tensor.is_floating_point() else tensor.to(how.device)


def _encoded_again(how: RepeatedCall, calls: Sequence[DenoiserCall], arguments: dict[str, Any]) -> dict[str, Any]:
    """Replace the conditions by those of the text encoders as they are now."""
    encoding, links = calls[0].encoding, calls[0].links
    if encoding is None or not links:
        raise UnsupportedError(
            f"The text encoders of {type(how.pipe).__name__} cannot be calibrated: they do not compute its conditions.",
            fix="Convert the denoiser alone with --component.",
        )
    with quiet():
        outputs = how.pipe.encode_prompt(**encoding.arguments)
    outputs = outputs if isinstance(outputs, tuple | list) else (outputs,)
    for link in links:
        rows = outputs[link.output][link.row : link.row + 1]
        arguments = _with(arguments, link.path, rows.to(how.dtype).expand(len(calls), *rows.shape[1:]))
    return arguments


def _with(arguments: Mapping[str, Any], path: Path, value: Any) -> dict[str, Any]:
    name, *rest = path
    return {**arguments, name: _with(arguments[name], tuple(rest), value) if rest else value}
