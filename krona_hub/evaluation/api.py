"""Score images against references and prompts with all locally available measures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from krona_hub.errors import DataError, KronaError, NotFoundError
from krona_hub.evaluation.color_identity import identity
from krona_hub.evaluation.embedders import CLIP, DINO, Embedder, image_similarity, prompt_similarity
from krona_hub.images.record import read_record
from krona_hub.training.data.dataset import image_files, image_folder
from krona_hub.training.data.images import open_image

GRID = "grid.png"  # overview of a comparison, not one of its images


class ImageOrigin(NamedTuple):
    """The prompt and the comparison column of an image."""

    prompt: str | None
    column: str  # of the comparison it was generated for: base, toy, …


@dataclass(frozen=True)
class Measure:
    """One score per image."""

    name: str  # identity, CLIP-I, DINO, CLIP-T
    means: str  # what is compared
    scores: tuple[float, ...]  # in the order of the images

    @property
    def mean(self) -> float:
        """Mean score."""
        return sum(self.scores) / len(self.scores)


@dataclass(frozen=True)
class EvaluationReport:
    """Scores of images, and the measures that were skipped with the reasons."""

    pictures: tuple[Path, ...]
    references: tuple[Path, ...]
    told: tuple[ImageOrigin, ...]  # origin of each image
    measures: tuple[Measure, ...]
    left_out: tuple[str, ...]

    @property
    def columns(self) -> dict[str, dict[str, float]]:
        """Mean scores by column and measure."""
        indices: dict[str, list[int]] = {}
        for i, origin in enumerate(self.told):
            indices.setdefault(origin.column, []).append(i)
        return {c: {m.name: sum(m.scores[i] for i in at) / len(at) for m in self.measures} for c, at in indices.items()}


def evaluate(
    pictures: str | Path,
    references: str | Path,
    *,
    prompt: str | None = None,
    clip: str | None = None,
    dino: str | None = None,
    device: str = "cpu",
) -> EvaluationReport:
    """Score how much images look like reference images of a subject, and how well they match their prompts.

    `identity` needs no model. CLIP-I, CLIP-T and DINO (Ruiz et al., DreamBooth, 2023) are computed if the models are
    available locally; nothing is downloaded.

    Parameters
    ----------
    `pictures`, `references` : path
        Image or folder of images to score, and of the subject.
    prompt : str, optional
        Prompt of all images. Default: the prompts that `krona generate` stored in the images.
    clip, dino : str, optional
        Folder or Hub id of a local model. Default: openai/clip-vit-large-patch14 and facebook/dino-vits16.
    device : str, default "cpu"
        Device of CLIP and DINO.

    Returns
    -------
    EvaluationReport
        Scores of every image, means by comparison column, and the measures that were skipped with the reasons.
        Identity is in [0, 1]; the other scores are cosines in [-1, 1].

    Raises
    ------
    NotFoundError
        If a folder or a model specified by `clip` or `dino` does not exist.
    DataError
        If a folder contains no images, or an image is unreadable.

    Examples
    --------
    >>> report = evaluate("zorbi", "zorbi")  # the training images in the package
    >>> len(report.pictures), report.measures[0].name, round(report.measures[0].mean, 3)
    (5, 'identity', 1.0)
    """
    files, reference_files = _files(pictures), _files(references)
    images, subject = ([open_image(path) for path in paths] for paths in (files, reference_files))
    origins = tuple(origin_of(path)._replace(prompt=prompt) if prompt else origin_of(path) for path in files)
    scores = tuple(identity(image, subject) for image in images)
    measures = [Measure("identity", "vivid colors and their height", scores)]
    left_out: list[str] = []
    if model := _embedder("CLIP", clip, CLIP, device, left_out):
        measures.append(Measure("CLIP-I", "images and references", tuple(image_similarity(model, images, subject))))
        measures += _prompt_measures(model, images, origins, left_out)
    if model := _embedder("DINO", dino, DINO, device, left_out):
        measures.append(Measure("DINO", "images and references", tuple(image_similarity(model, images, subject))))
    return EvaluationReport(files, reference_files, origins, tuple(measures), tuple(left_out))


def _prompt_measures(
    model: Embedder, images: Sequence[Image.Image], origins: Sequence[ImageOrigin], left_out: list[str]
) -> list[Measure]:
    prompts = [origin.prompt for origin in origins if origin.prompt]
    if len(prompts) < len(origins):
        left_out.append("CLIP-T: not every image has a prompt; specify --prompt")
        return []
    return [Measure("CLIP-T", "images and prompts", tuple(prompt_similarity(model, images, prompts)))]


def _embedder(name: str, requested: str | None, default: str, device: str, left_out: list[str]) -> Embedder | None:
    try:
        return Embedder(requested or default, device)
    except NotFoundError as error:
        if requested:
            raise
        left_out.append(f"{name}: {error.cause}")
        return None


def _files(source: str | Path) -> tuple[Path, ...]:
    """Return the images of a folder, or a single image."""
    root = image_folder(source)
    if root.is_file():
        return (root,)
    if not root.is_dir():
        raise NotFoundError(f"No such folder: {str(source)!r}.", fix="Check the path.")
    found = tuple(path for path in image_files(root) if path.name != GRID)
    if not found:
        raise DataError(f"No images found in {root}.", fix="Specify a folder that contains images.")
    return found


def origin_of(path: Path) -> ImageOrigin:
    """Return the origin that `krona generate` stored in a PNG, or an empty one for other images."""
    try:
        entry = read_record(path)["pictures"][0]
        return ImageOrigin(str(entry["prompt"]), str(entry["column"]))
    except (KronaError, KeyError, IndexError, TypeError):
        return ImageOrigin(None, "")
