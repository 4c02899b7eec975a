"""Pictures against references and prompts: every measure that this machine can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from krona_hub.errors import DataError, KronaError, NotFoundError
from krona_hub.evaluation.color_identity import identity
from krona_hub.evaluation.embedders import CLIP, DINO, Embedder, agreement, likeness
from krona_hub.images.record import read_record
from krona_hub.training.data.dataset import picture_files, pictures_of
from krona_hub.training.data.images import open_picture

GRID = "grid.png"  # all pictures in one, which is none of them


class ImageOrigin(NamedTuple):
    """What is known of a picture besides its pixels."""

    prompt: str | None
    column: str  # of the comparison that it was drawn for: base, toy, …


@dataclass(frozen=True)
class Measure:
    """One score of every picture."""

    name: str  # identity, CLIP-I, DINO, CLIP-T
    means: str  # what it compares
    scores: tuple[float, ...]  # in the order of the pictures

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class EvaluationReport:
    """What was measured, and what was not, and why."""

    pictures: tuple[Path, ...]
    references: tuple[Path, ...]
    told: tuple[ImageOrigin, ...]  # of each picture
    measures: tuple[Measure, ...]
    left_out: tuple[str, ...]

    @property
    def columns(self) -> dict[str, dict[str, float]]:
        """Column of the pictures -> measure -> mean."""
        places = {c: [i for i, t in enumerate(self.told) if t.column == c] for c in (t.column for t in self.told)}
        return {c: {m.name: sum(m.scores[i] for i in at) / len(at) for m in self.measures} for c, at in places.items()}


def evaluate(
    pictures: str | Path,
    references: str | Path,
    *,
    prompt: str | None = None,
    clip: str | None = None,
    dino: str | None = None,
    device: str = "cpu",
) -> EvaluationReport:
    """How much the pictures of a folder look like those of another, and how well they show their prompts.

    Prompts are those that `krona generate` wrote into the pictures, or `prompt` for all. CLIP and DINO are taken where
    they are on this machine; one that was named and is not raises NotFoundError. Raises DataError for a folder without
    pictures.
    """
    files, known = _files(pictures), _files(references)
    shown, like = ([open_picture(path) for path in paths] for paths in (files, known))
    told = tuple(origin_of(path)._replace(prompt=prompt) if prompt else origin_of(path) for path in files)
    measures = [Measure("identity", "vivid colours and their height", tuple(identity(each, like) for each in shown))]
    left_out: list[str] = []
    if model := _embedder("CLIP", clip, CLIP, device, left_out):
        measures.append(Measure("CLIP-I", "pictures and references", tuple(likeness(model, shown, like))))
        measures += _by_words(model, shown, told, left_out)
    if model := _embedder("DINO", dino, DINO, device, left_out):
        measures.append(Measure("DINO", "pictures and references", tuple(likeness(model, shown, like))))
    return EvaluationReport(files, known, told, tuple(measures), tuple(left_out))


def _by_words(
    model: Embedder, shown: Sequence[Image.Image], told: Sequence[ImageOrigin], left_out: list[str]
) -> list[Measure]:
    prompts = [each.prompt for each in told if each.prompt]
    if len(prompts) < len(told):
        left_out.append("CLIP-T: not every picture has a prompt; give --prompt")
        return []
    return [Measure("CLIP-T", "pictures and prompts", tuple(agreement(model, shown, prompts)))]


def _embedder(name: str, asked: str | None, usual: str, device: str, left_out: list[str]) -> Embedder | None:
    try:
        return Embedder(asked or usual, device)
    except NotFoundError as error:
        if asked:
            raise
        left_out.append(f"{name}: {error.cause}")
        return None


def _files(source: str | Path) -> tuple[Path, ...]:
    """The pictures of a folder, or the one that is named."""
    place = pictures_of(source)
    if place.is_file():
        return (place,)
    if not place.is_dir():
        raise NotFoundError(f"there is no folder {str(source)!r}.", fix="Check the spelling of the path.")
    found = tuple(path for path in picture_files(place) if path.name != GRID)
    if not found:
        raise DataError(f"there is no picture in {place}.", fix="Give a folder with pictures.")
    return found


def origin_of(path: Path) -> ImageOrigin:
    """What `krona generate` wrote into a PNG; nothing for other pictures."""
    try:
        picture = read_record(path)["pictures"][0]
        return ImageOrigin(str(picture["prompt"]), str(picture["column"]))
    except (KronaError, KeyError, IndexError, TypeError):
        return ImageOrigin(None, "")
