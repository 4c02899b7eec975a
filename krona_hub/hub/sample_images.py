"""Sample images of an adapter: limited in number and size, and checked to be images."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from krona_hub.errors import FormatError, NotFoundError, ResourceError
from krona_hub.hub.loss_plot import loss_curve
from krona_hub.hub.repo_layout import IMAGE_SUFFIXES, IMAGES, MAX_IMAGE, MAX_IMAGES, PLOTS
from krona_hub.rendering.humanize import human_bytes
from krona_hub.training.configuration import ECHO, read_toml
from krona_hub.training.progress.metrics import FILE, read_metrics, sample_files

FIRST_BYTES = {b"\x89PNG": ".png", b"\xff\xd8\xff": ".jpg", b"RIFF": ".webp"}


CURVE = f"{PLOTS}loss.png"
SAMPLE = f"{IMAGES}run-"  # prefix of samples from a run, so that they never replace images that the user chose
QUALITY = 90  # JPEG quality of a sample that is too large as it is


class SampleImage(NamedTuple):
    """A sample image in the repository."""

    name: str  # in the repository
    prompt: str  # from the text file beside it; "" if there is none


def collect_images(source: Path, folder: Path) -> tuple[SampleImage, ...]:
    """Copy the images in `source` to `folder`/images. A text file of the same name holds an image's prompt.

    Raises NotFoundError without images, ResourceError for too many or too large ones, FormatError for other files.
    """
    found = sorted(p for p in source.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES) if source.is_dir() else []
    if not found:
        raise NotFoundError(
            f"{source} contains no images.",
            fix=f"Specify a folder with {', '.join(IMAGE_SUFFIXES)} files: --images DIR.",
        )
    if len(found) > MAX_IMAGES:
        raise ResourceError(f"{source} contains {len(found)} images.", fix=f"Choose at most {MAX_IMAGES}.")
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    return tuple(_copied(path, folder, number) for number, path in enumerate(found, 1))


def _copied(path: Path, folder: Path, number: int) -> SampleImage:
    size = path.stat().st_size
    if size > MAX_IMAGE:
        fix = f"Reduce it to {human_bytes(MAX_IMAGE)}, or save it as JPEG."
        raise ResourceError(f"{path} is {human_bytes(size)}; the limit is {human_bytes(MAX_IMAGE)}.", fix=fix)
    with path.open("rb") as file:
        first = file.read(4)
    if not any(first.startswith(start) for start in FIRST_BYTES):
        raise FormatError(f"{path} is not an image.", fix="Save it as PNG.")
    stem = re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-") or "sample"
    name = f"{IMAGES}{number:02d}-{stem[:60]}{path.suffix.lower()}"
    shutil.copyfile(path, folder / name)
    return SampleImage(name, _prompt(path.with_suffix(".txt")))


def _prompt(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip() if path.is_file() else ""
    except UnicodeDecodeError as error:
        raise FormatError(f"{path} is not UTF-8 text.", fix="Save it as UTF-8.") from error


def run_of(adapter: Path) -> Path | None:
    """The run folder of the training that made an adapter; None if it is elsewhere or incomplete."""
    run = adapter.parent
    is_whole = adapter.name.startswith("adapter.") and (run / FILE).is_file() and (run / ECHO).is_file()
    return run if is_whole else None


def plot_loss(run: Path, folder: Path) -> tuple[str, ...]:
    """Write the loss curve to `folder`; return its name, or () if there are too few steps."""
    png = loss_curve(read_metrics(run))
    if png is None:
        return ()
    (folder / PLOTS).mkdir(parents=True, exist_ok=True)
    (folder / CURVE).write_bytes(png)
    return (CURVE,)


def last_samples(run: Path, folder: Path) -> tuple[SampleImage, ...]:
    """Copy the samples of the last step that has any to `folder`/images, each with its prompt."""
    steps = sample_files(run)
    if not steps:
        return ()
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    prompts: Sequence[object] = read_toml(run / ECHO).get("sample_prompts") or ()
    padded = [*map(str, prompts), *[""] * MAX_IMAGES]  # a resumed run may have fewer prompts
    return tuple(_sample(p, folder, n, padded[n]) for n, p in enumerate(steps[max(steps)][:MAX_IMAGES]))


def _sample(path: Path, folder: Path, number: int, prompt: str) -> SampleImage:
    small = path.stat().st_size <= MAX_IMAGE
    name = f"{SAMPLE}{number + 1:02d}{path.suffix if small else '.jpg'}"
    if small:
        shutil.copyfile(path, folder / name)
        return SampleImage(name, prompt)
    from PIL import Image

    with Image.open(path) as image:
        image.convert("RGB").save(folder / name, quality=QUALITY)
    return SampleImage(name, prompt)
