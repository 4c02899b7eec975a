"""Sample pictures that go with an adapter: few, small, and really pictures."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from krona_hub.errors import FormatError, NotFoundError, ResourceError
from krona_hub.hub.loss_plot import loss_curve
from krona_hub.hub.repo_layout import IMAGES, MAX_IMAGE, MAX_IMAGES, PICTURES, PLOTS
from krona_hub.rendering.humanize import human_bytes
from krona_hub.training.configuration import ECHO, read_toml
from krona_hub.training.progress.metrics import FILE, read_metrics, sample_files

FIRST_BYTES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}


CURVE = f"{PLOTS}loss.png"
SAMPLE = f"{IMAGES}run-"  # how names of samples begin, so that they never take the place of pictures that were chosen
QUALITY = 90  # of a sample that is too large as it is, as JPEG


class SampleImage(NamedTuple):
    """A picture of the repository."""

    name: str  # in the repository
    prompt: str  # of the text file beside it; "" where there is none


def gather(source: Path, folder: Path) -> tuple[SampleImage, ...]:
    """Copy the pictures of `source` into `folder`/images. A text file of the same name is a picture's prompt.

    Raises NotFoundError without pictures, ResourceError for too many or too large ones, FormatError for what is none.
    """
    found = sorted(p for p in source.iterdir() if p.suffix.lower() in PICTURES) if source.is_dir() else []
    if not found:
        raise NotFoundError(f"{source}: no pictures there.", fix=f"--images takes a folder of {', '.join(PICTURES)}.")
    if len(found) > MAX_IMAGES:
        raise ResourceError(f"{source} has {len(found)} pictures.", fix=f"Choose the best {MAX_IMAGES}.")
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    return tuple(_taken(path, folder, number) for number, path in enumerate(found, 1))


def _taken(path: Path, folder: Path, number: int) -> SampleImage:
    size = path.stat().st_size
    if size > MAX_IMAGE:
        fix = f"A picture may have {human_bytes(MAX_IMAGE)}: save it smaller, or as JPEG."
        raise ResourceError(f"{path} has {human_bytes(size)}.", fix=fix)
    with path.open("rb") as file:
        first = file.read(4)
    if not any(first.startswith(start) for start in FIRST_BYTES):
        raise FormatError(f"{path} is no picture.", fix="Save it as PNG.")
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-") or "sample"
    name = f"{IMAGES}{number:02d}-{stem[:60]}{path.suffix.lower()}"
    shutil.copyfile(path, folder / name)
    return SampleImage(name, _prompt(path.with_suffix(".txt")))


def _prompt(words: Path) -> str:
    try:
        return words.read_text(encoding="utf-8-sig").strip() if words.is_file() else ""
    except UnicodeDecodeError as error:
        raise FormatError(f"{words} is no text in UTF-8.", fix="Save it as UTF-8.") from error


def run_of(adapter: Path) -> Path | None:
    """The folder of the training that made an adapter; None where it lies elsewhere, or alone."""
    run = adapter.parent
    is_whole = adapter.name.startswith("adapter.") and (run / FILE).is_file() and (run / ECHO).is_file()
    return run if is_whole else None


def draw_curve(run: Path, folder: Path) -> tuple[str, ...]:
    """Write the curve of the loss into `folder`; its name, or nothing for a training of one step."""
    drawn = loss_curve(read_metrics(run))
    if drawn is None:
        return ()
    (folder / PLOTS).mkdir(parents=True, exist_ok=True)
    (folder / CURVE).write_bytes(drawn)
    return (CURVE,)


def last_samples(run: Path, folder: Path) -> tuple[SampleImage, ...]:
    """Copy the samples of the last step that has any into `folder`/images, each with its prompt."""
    steps = sample_files(run)
    if not steps:
        return ()
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    prompts: Sequence[object] = read_toml(run / ECHO).get("sample_prompts") or ()
    told = [*map(str, prompts), *[""] * MAX_IMAGES]  # a run that went on with fewer prompts
    return tuple(_sample(p, folder, n, told[n]) for n, p in enumerate(steps[max(steps)][:MAX_IMAGES]))


def _sample(path: Path, folder: Path, number: int, prompt: str) -> SampleImage:
    small = path.stat().st_size <= MAX_IMAGE
    name = f"{SAMPLE}{number + 1:02d}{path.suffix if small else '.jpg'}"
    if small:
        shutil.copyfile(path, folder / name)
        return SampleImage(name, prompt)
    from PIL import Image

    with Image.open(path) as picture:
        picture.convert("RGB").save(folder / name, quality=QUALITY)
    return SampleImage(name, prompt)
