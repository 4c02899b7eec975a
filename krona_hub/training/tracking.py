"""Other programs that draw a training's curves, through accelerate. TensorBoard is told where it is installed."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from importlib.util import find_spec

from krona_hub.errors import NoDeviceError, UsageError
from krona_hub.training.settings import TrainingSettings

AUTO, NONE = "auto", "none"
PACKAGES: Mapping[str, tuple[str, ...]] = {  # tracker -> packages, one of which it needs
    "tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "trackio": ("trackio",),
}  # fmt: skip


def trackers_of(settings: TrainingSettings) -> tuple[str, ...]:
    """The trackers that are told. Raises UsageError for an unknown name, NoDeviceError without its package."""
    named = tuple(name for name in settings.trackers if name not in (AUTO, NONE))
    for name in named:
        _check(name)
    automatic = AUTO in settings.trackers and "tensorboard" not in named and _installed("tensorboard")
    return (*named, "tensorboard") if automatic else named


def _check(name: str) -> None:
    if name not in PACKAGES:
        near = get_close_matches(name, PACKAGES, n=1)
        fix = f"Did you mean {near[0]!r}?" if near else f"There are {', '.join(PACKAGES)}, {AUTO} and {NONE}."
        raise UsageError(f"there is no tracker {name!r}.", fix=fix)
    if not _installed(name):
        raise NoDeviceError(f"the tracker {name} is not installed.", fix=f"pip install {PACKAGES[name][0]}.")


def _installed(name: str) -> bool:
    return any(find_spec(package) is not None for package in PACKAGES[name])
