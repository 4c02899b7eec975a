"""The record of a run, which repeats its images: stored beside them, and in each PNG for that image alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from krona_hub.errors import FormatError, IntegrityError, NotFoundError
from krona_hub.images.plan import BasePlan, GeneratePlan, base_digest, small_files
from krona_hub.images.report import GeneratedImage
from krona_hub.images.request import Settings

VERSION = 1
KEY = "krona"  # key of the record in a PNG's text
PEERS = ("torch", "diffusers", "transformers")
REPEATED = (  # arguments of `generate` that are taken from a record unchanged
    "prompts", "negative", "seed", "images_per_prompt", "steps", "guidance", "scheduler", "size", "more", "strengths",
    "together", "compare", "device", "dtype", "offload", "tiled_vae", "batch", "variant", "config",
)  # fmt: skip


def make_record(plan: GeneratePlan, settings: Settings, scheduler: str, device: str, dtype: str) -> dict[str, Any]:
    """Build the record without its images; `settings` are those in force, `scheduler` is the diffusers class."""
    request = plan.request
    first, *beside = [_base(plan.base(source)) for source in (request.base, *request.beside)]
    return {
        "krona_generate": VERSION,
        "base": first,
        "beside": beside,
        "adapters": [_adapter(a.name, a.source, a.weight, a.sha256) for a in plan.adapters],
        "prompts": list(request.prompts),
        "negative": settings.negative,
        "seed": request.seed,
        "images_per_prompt": request.images_per_prompt,
        "steps": settings.steps,
        "guidance": settings.guidance,
        "scheduler": settings.scheduler,
        "scheduler_class": scheduler,
        "size": list(settings.size) if settings.size else None,
        "more": dict(settings.more),
        "strengths": list(request.strengths),
        "together": request.together,
        "compare": request.compare,
        "device": device,
        "dtype": dtype,
        "offload": request.machine.offload,
        "tiled_vae": request.machine.tiled_vae,
        "batch": request.machine.batch,
        "variant": request.variant,
        "config": request.config,
        "versions": versions(),
    }


def _base(base: BasePlan) -> dict[str, Any]:
    identity = {
        "source": base.source,
        "pipeline": base.pipeline,
        "family": base.family,
        "fingerprint": base.fingerprint,
    }
    return {**identity, "digest": base_digest(base.path), "files": small_files(base.path)}


def _adapter(name: str, source: str, weight: float, sha256: str) -> dict[str, Any]:
    return {"name": name, "source": source, "weight": weight, "sha256": sha256}


def versions() -> dict[str, str | None]:
    """Versions of krona_hub and of the libraries that compute the images."""
    return {"krona_hub": _version("krona-hub"), **{name: _version(name) for name in PEERS}}


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def of_one(record: Mapping[str, Any], image: GeneratedImage) -> dict[str, Any]:
    """Build the record of one image: a run that generates only this one. The digest stands for the hashes of files."""
    bases = {base["source"]: base for base in (record["base"], *record["beside"])}
    base = {name: value for name, value in bases[image.base].items() if name != "files"}
    shas = {a["name"]: a for a in record["adapters"]}
    adapters = [{**shas[name], "weight": weight} for name, weight in image.adapters.items()]
    alone = {"prompts": [image.prompt], "seed": image.seed, "images_per_prompt": 1, "strengths": [], "beside": []}
    options = {"together": len(adapters) > 1, "compare": False if adapters else None, "batch": 1}
    itself = {"file": image.file, "prompt": image.prompt, "column": image.column, "pixels": image.pixels}
    return {**record, "base": base, "adapters": adapters, **alone, **options, "pictures": [itself]}


def parameters_text(record: Mapping[str, Any]) -> str:
    """Format the record of one image as image browsers and web UIs show it, under the PNG key `parameters`."""
    words = {
        "Steps": record["steps"], "Sampler": record["scheduler_class"], "CFG scale": record["guidance"],
        "Seed": record["seed"], "Size": "x".join(map(str, record["size"] or ())), "Model": record["base"]["source"],
        "Adapters": " ".join(f"{a['name']}:{a['weight']:g}" for a in record["adapters"]),
    }  # fmt: skip
    summary = ", ".join(f"{key}: {value}" for key, value in words.items() if value not in (None, ""))
    negative = [f"Negative prompt: {record['negative']}"] if record["negative"] else []
    return "\n".join([record["prompts"][0], *negative, summary])


# --- again -----------------------------------------------------------------------------------------------------------


def read_record(path: str | Path) -> dict[str, Any]:
    """Read the record in a JSON file, a folder of images, or a PNG. Raises FormatError if there is none."""
    path = Path(path).expanduser()
    path = path / "record.json" if path.is_dir() else path
    if not path.exists():
        raise NotFoundError(f"{path}: no such file.", fix="Specify record.json, its folder, or one image.")
    try:
        text = _png_text(path) if path.suffix.lower() == ".png" else path.read_text("utf-8")
        found = json.loads(text)
    except (ValueError, OSError) as error:
        raise _no_record(path) from error
    if not isinstance(found, dict) or "krona_generate" not in found:
        raise _no_record(path)
    if found["krona_generate"] != VERSION:
        raise FormatError(f"{path} was written by a newer version of krona-hub.", fix="Install a newer krona-hub.")
    return found


def _png_text(path: Path) -> str:
    from PIL import Image

    with Image.open(path) as image:
        return str(image.info.get(KEY, ""))


def _no_record(path: Path) -> FormatError:
    return FormatError(
        f"{path} contains no record of krona generate.", fix="Specify record.json or an image that krona generate made."
    )


def arguments_of(record: Mapping[str, Any], beside: Path) -> dict[str, Any]:
    """Return the arguments of `generate` that repeat a record.

    Sources are looked up as recorded, and beside the record if nothing is there.
    """
    try:
        adapters = [(_found(a["source"], beside), float(a["weight"])) for a in record["adapters"]]
        bases = [_found(base["source"], beside) for base in (record["base"], *record["beside"])]
        same = {name: record[name] for name in REPEATED}
    except (KeyError, TypeError) as error:
        raise FormatError(f"The record lacks {error}.", fix="Specify the record as krona wrote it.") from error
    return {**same, "base": bases[0], "beside": bases[1:], "adapters": adapters}


def _found(source: str, beside: Path) -> str:
    near = beside / Path(source).name
    return str(near) if not Path(source).exists() and near.exists() else source


def check_same_files(record: Mapping[str, Any], plan: GeneratePlan) -> tuple[str, ...]:
    """Raise IntegrityError if an adapter differs from the recorded one; return notes about other differences."""
    for adapter, was in zip(plan.adapters, record["adapters"], strict=False):
        if adapter.sha256 != was["sha256"] and was["source"].endswith(Path(adapter.source).name):
            raise IntegrityError(
                f"{adapter.source} is not the adapter of the record: its sha256 differs.",
                fix="Specify the same file, or pass yours with --adapter to generate new images with it.",
            )
    notes = [f"{name} is {now}, was {was}" for name, now, was in _changed(record)]
    if plan.bases[0].path.exists() and base_digest(plan.bases[0].path) != record["base"]["digest"]:
        notes.append(f"{plan.request.base} differs from the base of the record")
    return tuple(notes)


def _changed(record: Mapping[str, Any]) -> Sequence[tuple[str, str | None, str | None]]:
    was: Mapping[str, str | None] = record.get("versions", {})
    return [(name, now, was.get(name)) for name, now in versions().items() if was.get(name) != now]
