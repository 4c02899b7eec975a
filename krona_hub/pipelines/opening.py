"""Opening the pipeline of a base model with diffusers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from krona_hub.bases import catalog
from krona_hub.bases.weight_files import only_pickles
from krona_hub.errors import FormatError, IncompleteError, KronaError, NoDeviceError, NotFoundError, UnknownBaseError

SINGLE_FILES: Mapping[str, str] = {  # start of a family's name -> the pipeline for its checkpoints in one file
    "sd1": "StableDiffusionPipeline", "sd2": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline", "flux1": "FluxPipeline", "flux2-klein": "Flux2KleinPipeline",
    "flux2": "Flux2Pipeline", "chroma": "ChromaPipeline", "z-image": "ZImagePipeline",
    "qwen-image": "QwenImagePipeline", "lumina2": "Lumina2Pipeline", "auraflow": "AuraFlowPipeline",
}  # fmt: skip


def device_for(requested: str | None) -> str:
    """Return the requested device, or the best available one. Raises NoDeviceError if it is not available."""
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if requested is None:
        return next(name for name, here in there.items() if here)
    kind, _, number = requested.partition(":")
    count = getattr(torch, kind).device_count() if kind in ("cuda", "xpu") else 1
    here = there.get(kind, hasattr(torch, kind) and getattr(torch, kind).is_available())
    if here and (not number or (number.isdigit() and int(number) < count)):
        return requested
    found = " or ".join(name for name, here in there.items() if here)
    raise NoDeviceError(f"Device {requested} is not available to torch.", fix=f"Use --device {found}.")


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress the progress bars, warnings and logs of diffusers and transformers."""
    from diffusers.utils import logging as diffusers_log
    from transformers.utils import logging as transformers_log

    logs = (diffusers_log, transformers_log)
    levels = [log.get_verbosity() for log in logs]
    bars = [log.is_progress_bar_enabled() for log in logs]
    try:
        for log in logs:
            log.set_verbosity_error()
            log.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level, bar in zip(logs, levels, bars, strict=True):
            log.set_verbosity(level)
            if bar:
                log.enable_progress_bar()


@contextmanager
def loading_errors(source: str) -> Iterator[None]:
    """Turn errors of diffusers for a broken or incomplete base into a KronaError."""
    try:
        yield
    except KronaError:
        raise
    except NotImplementedError as problem:  # a tensor that was expected and never filled
        raise IncompleteError(
            f"{source} lacks weights of the pipeline, such as the autoencoder.",
            fix="Specify a diffusers folder, or a file with the whole pipeline.",
        ) from problem
    except (OSError, ValueError, KeyError, AttributeError, ImportError) as problem:
        if pickles := _pickles_in(Path(source)):
            raise pickles from problem
        words = " ".join(str(problem).split())[:200]
        kind = IncompleteError if isinstance(problem, OSError) else FormatError
        raise kind(
            f"{source}: diffusers cannot load it: {words}",
            fix="Download it again; a single file needs its configuration: --config FOLDER.",
        ) from problem


def _pickles_in(folder: Path) -> KronaError | None:
    """Return the error of the first component of a pipeline folder with weights only as pickles, if there is one."""
    parts = sorted(path for path in folder.glob("*") if path.is_dir())
    return next(filter(None, map(only_pickles, parts)), None)


def pipeline_for(source: str, family: str | None) -> str:
    """Return the pipeline class for a family's single-file checkpoints."""
    for start, name in SINGLE_FILES.items():
        if (family or "").startswith(start):
            return name
    raise UnknownBaseError(
        f"Unknown pipeline class for the checkpoint file {source}.",
        fix="Specify a diffusers folder, or --config FOLDER|ID with a diffusers pipeline of the same kind.",
    )


def missing_base_error(source: str) -> KronaError:
    """Return the error for a base without files: a catalog name without weights, or a missing path."""
    known = catalog.find(source)
    if known is None:
        return NotFoundError(f"{source}: no such file or folder.", fix="Check the path; a Hub id is written ns/name.")
    hub_id = catalog.get(source).hub_id
    where = f" or its Hub id, {hub_id}" if hub_id else ""
    return UnknownBaseError(
        f"{source} is a catalog name, but the weights of the base model are needed.",
        fix=f"Specify its diffusers folder, its checkpoint file{where}.",
    )
