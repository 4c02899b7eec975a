"""Pictures of the class, drawn by the base before it is trained, so that the class stays what it was."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from krona_hub.checkpoints.atomic import atomic_text
from krona_hub.errors import DataError
from krona_hub.training.data.captions import wording
from krona_hub.training.data.dataset import picture_files
from krona_hub.training.model.model_families import ModelFamily
from krona_hub.training.progress.samples import Drawing, drawn, encode_prompts, save_picture, undisturbed
from krona_hub.training.randomness import generator
from krona_hub.training.settings import TrainingSettings

FOLDER = "prior"  # in the run folder, where --prior-data names no other
START = "drawn-"  # of the names of drawn pictures


def prior_folder(settings: TrainingSettings) -> Path | None:
    """Where the pictures of the class lie, or will; None where a training has none."""
    if not settings.prior_weight or not (settings.prior_data or settings.prior_pictures):
        return None
    return Path(settings.prior_data).expanduser() if settings.prior_data else Path(settings.output) / FOLDER


def pictures_there(settings: TrainingSettings) -> int:
    """How many the folder has."""
    folder = prior_folder(settings)
    return len(picture_files(folder)) if folder is not None and folder.is_dir() else 0


def missing_pictures(settings: TrainingSettings) -> range:
    """Numbers of the pictures that are still to be drawn: a folder is filled up to `--prior-pictures`."""
    wanted = settings.prior_pictures if prior_folder(settings) is not None else 0
    return range(pictures_there(settings), wanted)


def draw_prior(pipe: Any, family: ModelFamily, settings: TrainingSettings, device: torch.device, size: int) -> None:
    """Draw those that are missing, each with a seed of its own and its prompt beside it. Raises DataError for a folder
    that another base, prompt or setting has begun to fill.
    """
    folder, missing = prior_folder(settings), missing_pictures(settings)
    if folder is None or not settings.prior_pictures:
        return
    mark = _mark(settings, size)
    folder.mkdir(parents=True, exist_ok=True)
    _check_marks(folder, mark)
    if not missing:
        return
    how = Drawing(size, settings.sample_steps, settings.sample_guidance)
    with undisturbed(pipe, device):
        for number in missing:
            prompt = wording(settings.prior_prompt, settings.seed, number)
            (given,), empty = encode_prompts(pipe, family, [prompt], device)
            image = drawn(pipe, given, empty, how, generator(settings.seed, "prior", number))
            path = folder / f"{mark}{number:05d}.png"
            atomic_text(path.with_suffix(".txt"), f"{prompt}\n", overwrite=True)
            save_picture(image, path)


def _mark(settings: TrainingSettings, size: int) -> str:
    """The start of the names of pictures that these settings draw."""
    said = [settings.base, settings.prior_prompt, settings.seed, size, settings.sample_steps, settings.sample_guidance]
    return f"{START}{sha256(repr(said).encode()).hexdigest()[:8]}-"


def _check_marks(folder: Path, mark: str) -> None:
    foreign = [p.name for p in picture_files(folder) if p.name.startswith(START) and not p.name.startswith(mark)]
    if foreign:
        raise DataError(
            f"{folder} has {len(foreign)} pictures that were drawn by another base, prompt, seed or size.",
            fix="Give another --prior-data, or remove them.",
        )
