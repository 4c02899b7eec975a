"""Open a source as adapter files: a file, a PEFT folder, or a folder with one PEFT folder per component.

Torch-free: only headers and `adapter_config.json` are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from krona_hub.bases.base import COMPONENTS, Base
from krona_hub.bases.loading import Weights, base_weights, load_base
from krona_hub.bases.weight_files import indices_of
from krona_hub.checkpoints.file_names import ADAPTER_PICKLES, DIFFUSERS_WEIGHTS, PEFT_CONFIG, PEFT_WEIGHTS
from krona_hub.checkpoints.header import Header, read_header
from krona_hub.checkpoints.os_errors import fault
from krona_hub.errors import AmbiguousError, FormatError, KronaError, NotFoundError, PickleError, UnrecognisedError
from krona_hub.formats.parsing.keys import Keys, sort_keys

EXTRACT = "Run `krona extract BASE MODEL` for an adapter of a fine-tuned model; specify a base model with --base."
CONFIG_LIMIT = 10_000_000  # bytes; real ones are a few kB


@dataclass(frozen=True, eq=False)
class AdapterFile:
    """One safetensors file with an adapter or one component of it."""

    header: Header
    config: Mapping[str, Any] | None = None  # PEFT configuration, from adapter_config.json
    component: str | None = None  # from the folder name or the model class in the PEFT configuration, if stated
    base: Base | None = None  # specified by the user
    weights: Weights | None = None  # of that base model, if it has any

    @cached_property
    def keys(self) -> Keys:
        """The tensors grouped by module. Raises the errors of `sort_keys`."""
        flat = {name for name, info in self.header.tensors.items() if len(info.shape) == 1}
        return sort_keys(self.header.tensors, self.header.metadata, flat, peft=self.config is not None)

    @property
    def path(self) -> Path:
        return self.header.path

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.header.metadata

    def starts(self, *prefixes: str) -> bool:
        """Whether every module's name starts with one of the prefixes."""
        return bool(self.keys.modules) and all(m.name.startswith(prefixes) for m in self.keys.modules)

    @property
    def dotted(self) -> bool:
        """Whether the names of modules are paths with dots."""
        return any("." in m.name for m in self.keys.modules)


def open_files(source: str | Path, base: str | Path | Base | None = None) -> tuple[AdapterFile, ...]:
    """Open the adapter files of `source`, at least one; `base` is their base model, if known.

    Raises NotFoundError, AmbiguousError for a folder of several unrelated files, PickleError for a folder of pickles,
    and the errors of `read_header`.
    """
    known = base if base is None or isinstance(base, Base) else load_base(base)
    weights = None if base is None or isinstance(base, Base) else base_weights(base)
    try:
        files = _files(Path(source))
    except OSError as error:
        if isinstance(error, KronaError):
            raise
        raise fault(error, Path(source)) from None
    return tuple(replace(file, base=known, weights=weights) for file in files)


@contextmanager
def in_file(path: Path) -> Iterator[None]:
    """Prefix errors raised inside with the path, once."""
    try:
        yield
    except KronaError as error:
        if not error.cause.startswith(str(path)):
            error.within(str(path))
        raise


def _files(path: Path) -> tuple[AdapterFile, ...]:
    if not path.exists():
        raise NotFoundError(f"{path} does not exist.", fix="Check the path.")
    if not path.is_dir():
        return (_beside_config(path),)
    if (path / PEFT_CONFIG).exists():
        return (_peft(path, None),)
    parts = sorted(p.parent for p in path.glob(f"*/{PEFT_CONFIG}"))
    if parts:
        return tuple(_peft(part, part.name if part.name in COMPONENTS else None) for part in parts)
    return (AdapterFile(read_header(_only_file(path))),)


def _beside_config(path: Path) -> AdapterFile:
    """A single file; PEFT tensors get the configuration from the same folder, if it exists."""
    header = read_header(path)
    config = path.parent / PEFT_CONFIG
    is_peft = path.name == PEFT_WEIGHTS or any(key.startswith("base_model.model.") for key in header.tensors)
    return AdapterFile(header, _config(config) if is_peft and config.exists() else None)


def _peft(folder: Path, component: str | None) -> AdapterFile:
    config = _config(folder / PEFT_CONFIG)
    weights = folder / PEFT_WEIGHTS
    path = weights if weights.exists() else _only_file(folder)
    return AdapterFile(read_header(path), config, component or component_of_class(config))


def component_of_class(config: Mapping[str, Any]) -> str | None:
    """The component implied by the model class in a PEFT configuration; None if it implies none."""
    mapping = config.get("auto_mapping")
    name = str(mapping.get("base_model_class", "")) if isinstance(mapping, dict) else ""
    if name.startswith("UNet"):
        return "unet"
    return "transformer" if "Transformer" in name and "2DModel" in name else None


def _only_file(folder: Path) -> Path:
    """The only safetensors file of a folder, or the one with a standard PEFT or diffusers name."""
    files = sorted(folder.glob("*.safetensors"))
    preferred = [f for f in files if f.name in (PEFT_WEIGHTS, DIFFUSERS_WEIGHTS)]
    if len(preferred or files) == 1:
        return (preferred or files)[0]
    if indices_of(folder) or (not files and any((folder / c).is_dir() for c in COMPONENTS)):
        raise UnrecognisedError(f"{folder} contains a model in the layout of diffusers, not an adapter.", fix=EXTRACT)
    if files:
        raise AmbiguousError(
            f"{folder} contains {len(files)} safetensors files: {', '.join(f.name for f in files[:4])}.",
            fix="Specify one of the files.",
        )
    pickles = [f for f in sorted(folder.iterdir()) if f.suffix in ADAPTER_PICKLES]
    if pickles:
        raise PickleError(
            f"{folder} contains only a pickle, {pickles[0].name}, which can run arbitrary code when loaded.",
            fix="Save it again as safetensors with the application that wrote it.",
        )
    raise NotFoundError(f"No adapter file in {folder}.", fix="Specify a .safetensors file or a PEFT folder.")


def _config(path: Path) -> Mapping[str, Any]:
    """The JSON object in `path`. Raises FormatError for anything else."""
    try:
        if path.stat().st_size > CONFIG_LIMIT:
            raise FormatError(
                f"{path} exceeds 10 MB, too large for a configuration.", fix="Download the adapter again."
            )
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        if isinstance(error, FormatError):
            raise
        raise FormatError(f"{path} is not valid JSON.", fix="Download the adapter again.") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path} is not a JSON object.", fix="Download the adapter again.")
    return config
