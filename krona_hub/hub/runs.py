"""What a training has left beside its adapter, for the repository: the curve of its loss, and its last samples."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from krona_hub.hub.loss_plot import loss_curve
from krona_hub.hub.repo_layout import IMAGES, MAX_IMAGE, MAX_IMAGES, PLOTS
from krona_hub.hub.sample_pictures import Picture
from krona_hub.training.configuration import ECHO, read_toml
from krona_hub.training.progress.metrics import FILE, read_metrics
from krona_hub.training.samples import sample_files

CURVE = f"{PLOTS}loss.png"
SAMPLE = f"{IMAGES}run-"  # how names of samples begin, so that they never take the place of pictures that were chosen
QUALITY = 90  # of a sample that is too large as it is, as JPEG


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


def last_samples(run: Path, folder: Path) -> tuple[Picture, ...]:
    """Copy the samples of the last step that has any into `folder`/images, each with its prompt."""
    steps = sample_files(run)
    if not steps:
        return ()
    (folder / IMAGES).mkdir(parents=True, exist_ok=True)
    prompts: Sequence[object] = read_toml(run / ECHO).get("sample_prompts") or ()
    told = [*map(str, prompts), *[""] * MAX_IMAGES]  # a run that went on with fewer prompts
    return tuple(_taken(p, folder, n, told[n]) for n, p in enumerate(steps[max(steps)][:MAX_IMAGES]))


def _taken(path: Path, folder: Path, number: int, prompt: str) -> Picture:
    small = path.stat().st_size <= MAX_IMAGE
    name = f"{SAMPLE}{number + 1:02d}{path.suffix if small else '.jpg'}"
    if small:
        shutil.copyfile(path, folder / name)
        return Picture(name, prompt)
    from PIL import Image

    with Image.open(path) as picture:
        picture.convert("RGB").save(folder / name, quality=QUALITY)
    return Picture(name, prompt)
