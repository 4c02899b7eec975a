"""Checkpoints of a run: folders that are written atomically and contain no pickles."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor

from krona_hub.checkpoints import reader
from krona_hub.checkpoints.atomic import atomic_folder
from krona_hub.checkpoints.header import read_header
from krona_hub.checkpoints.writer import write_tensors
from krona_hub.errors import IntegrityError, KronaError, NotFoundError, StructureError
from krona_hub.training.progress.training_state import Training

FOLDER = "checkpoints"  # in the run folder
NAME = re.compile(r"step-(\d{7,})$")
TENSOR, TUPLE, PAIRS = "__tensor__", "__tuple__", "__pairs__"


def save_state(run: Path, step: int, tree: Mapping[str, Any], keep: int) -> Path:
    """Write `tree` (dicts and lists of numbers, strings and tensors) as a checkpoint, and keep the newest `keep`."""
    folder = run / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:07d}"
    tensors: dict[str, Tensor] = {}
    plain = _packed(tree, tensors)
    if not path.exists():
        with atomic_folder(path) as temporary:
            write_tensors(temporary / "state.safetensors", tensors)
            (temporary / "state.json").write_text(json.dumps(plain), "utf-8")
    for old in sorted(saved_states(run))[:-keep]:
        shutil.rmtree(saved_states(run)[old], ignore_errors=True)
    return path


def saved_states(run: Path) -> dict[int, Path]:
    """Return the folders of all complete checkpoints by step."""
    folder = run / FOLDER
    found = {p: NAME.match(p.name) for p in folder.iterdir()} if folder.is_dir() else {}
    return {int(match[1]): path for path, match in found.items() if match}


def load_state(run: Path) -> tuple[int, dict[str, Any]]:
    """Return (step, tree) of the newest readable checkpoint.

    Raises NotFoundError without any checkpoint, and the first reading error if none is readable.
    """
    problem: KronaError | None = None
    for step, path in sorted(saved_states(run).items(), reverse=True):
        try:
            return step, _read(path)
        except KronaError as error:
            problem = problem or error
    if problem is not None:
        raise problem
    raise NotFoundError(f"{run} has no checkpoint to resume from.", fix="Start a new run without --resume.")


def _read(path: Path) -> dict[str, Any]:
    try:
        plain = json.loads((path / "state.json").read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StructureError(f"Cannot read {path}/state.json: {error}.", fix="Delete this checkpoint.") from error
    tensors = reader.load(read_header(path / "state.safetensors"))
    tree: dict[str, Any] = _unpacked(plain, tensors)
    return tree


def _packed(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return the tree as JSON, with its tensors replaced by numbered references."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value.detach().cpu().contiguous()
        return {TENSOR: name}
    if isinstance(value, tuple):
        return {TUPLE: [_packed(v, tensors) for v in value]}
    if isinstance(value, Mapping):
        return {PAIRS: [[_packed(k, tensors), _packed(v, tensors)] for k, v in value.items()]}
    return [_packed(v, tensors) for v in value] if isinstance(value, list) else value


def _unpacked(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Invert `_packed`; every tensor is a separate copy."""
    if isinstance(value, list):
        return [_unpacked(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    (kind, inner), *_ = value.items()
    if kind == TENSOR:
        return tensors[inner].clone()
    if kind == TUPLE:
        return tuple(_unpacked(v, tensors) for v in inner)
    return {_unpacked(k, tensors): _unpacked(v, tensors) for k, v in inner}


def random_states() -> dict[str, Any]:
    """Return the random states of torch, CUDA, numpy and Python."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": (str(kind), torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss),
        "python": random.getstate(),
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Restore the result of `random_states`."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"][: torch.cuda.device_count()])
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    random.setstate(states["python"])


def save(training: Training) -> None:
    """Save a checkpoint of the current step in the main process."""
    if training.is_main:
        average = training.average.values if training.average is not None else []
        tree = {
            "fingerprint": training.fingerprint,
            "factors": list(training.parameters),
            "optimizer": training.optimizer.state_dict(),
            "average": list(average),
            "scaler": training.precision.state,
            "random": random_states(),
            "smooth_loss": training.smooth_loss,
            "skipped": training.skipped,
        }
        save_state(training.run, training.step, tree, training.settings.keep_checkpoints)
    training.accelerator.wait_for_everyone()


def resume(training: Training) -> None:
    """Restore the newest checkpoint. Raises IntegrityError if data or settings have changed since."""
    step, tree = load_state(training.run)
    if tree["fingerprint"] != training.fingerprint:
        raise IntegrityError(
            f"{training.run} was trained with other images, captions or settings, or another number of processes.",
            fix="Restore them, or start a new run.",
        )
    with torch.no_grad():
        for parameter, value in zip(training.parameters, tree["factors"], strict=True):
            parameter.copy_(value)
        if training.average is not None:
            for kept, value in zip(training.average.values, tree["average"], strict=True):
                kept.copy_(value)
    training.optimizer.load_state_dict(tree["optimizer"])
    training.step, training.smooth_loss, training.skipped = step, tree["smooth_loss"], tree["skipped"]
    training.precision.restore(tree["scaler"])
    set_random_states(tree["random"])
    if training.is_main:
        training.metrics.cut(step)


def broadcast_factors(training: Training) -> None:
    """Copy the factors of the main process to all processes, in case one of them read other values."""
    if training.accelerator.num_processes > 1:
        for parameter in training.parameters:
            parameter.data.copy_(broadcast(parameter.data))
