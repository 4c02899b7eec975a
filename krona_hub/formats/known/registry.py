"""Every format that krona_hub knows, in the order in which a file is tried (FORMATS §2): the first hit decides."""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from krona_hub.checkpoints.file_names import PEFT_CONFIG
from krona_hub.errors import AmbiguousError, UnrecognisedError, UnsupportedError, UsageError
from krona_hub.formats.known.cloneofsimo import CLONEOFSIMO
from krona_hub.formats.known.diffusekrona import DIFFUSEKRONA
from krona_hub.formats.known.diffusers import DIFFUSERS_LOKR, DIFFUSERS_LORA
from krona_hub.formats.known.format import Format, Storage
from krona_hub.formats.known.kohya import KOHYA_LORA, LYCORIS_LOCON, LYCORIS_LOKR
from krona_hub.formats.known.native import KRONA
from krona_hub.formats.known.peft import PEFT_LOKR, PEFT_LORA
from krona_hub.formats.parsing.adapter_file import AdapterFile, open_files

FORMATS: tuple[Format, ...] = (
    KRONA,
    PEFT_LOKR,
    PEFT_LORA,
    CLONEOFSIMO,
    DIFFUSERS_LOKR,
    LYCORIS_LOKR,
    DIFFUSEKRONA,
    LYCORIS_LOCON,
    KOHYA_LORA,
    DIFFUSERS_LORA,
)


def names() -> tuple[str, ...]:
    return tuple(format.name for format in FORMATS)


def by_name(name: str) -> Format:
    """The format of that name. Raises UsageError with the nearest name.

    >>> by_name("kohya-lora").name
    'kohya-lora'
    """
    found = next((format for format in FORMATS if name == format.name), None)
    if found is None:
        near = get_close_matches(name.lower().replace("_", "-"), names(), n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"{name!r} is no format.", fix=f"{hint}Known formats: {', '.join(names())}.")
    return found


def storage_of(name: str) -> Storage:
    """How the format of that name is written. Raises UsageError for one that is unknown or only read."""
    storage = by_name(name).storage
    if storage is None:
        writable = ", ".join(format.name for format in FORMATS if format.writes)
        raise UsageError(f"{name!r} cannot be written.", fix=f"Choose one of {writable}.")
    return storage


def detect_format(file: AdapterFile) -> Format:
    """The format of a file by its keys, shapes and metadata.

    Raises UnrecognisedError for a file without an adapter, UnsupportedError for one of another algorithm only,
    AmbiguousError where two readings fit, naming the option that settles it.
    """
    if not KRONA.recognizes(file):
        _check_ours(file)
    for format in FORMATS:
        if format.recognizes(file):
            return format
    raise UnrecognisedError("no adapter was found in it.", fix="`krona formats` lists what krona reads.")


def _check_ours(file: AdapterFile) -> None:
    keys = file.keys
    if not keys.modules and keys.foreign:
        module, algorithm = next(iter(keys.foreign.items()))
        raise UnsupportedError(
            f"all {len(keys.foreign)} modules are {algorithm} or the like, such as {module}.",
            fix="That is no Kronecker or low-rank product; merge it with the tool that trained it.",
        )
    if not keys.modules:
        tensors = file.header.tensors
        example = f", such as {min(tensors)}" if tensors else ""
        raise UnrecognisedError(
            f"none of its {len(tensors)} tensors belongs to an adapter{example}.",
            fix="Give an adapter file; `krona formats` lists what krona reads. Is this a checkpoint?",
        )
    scaled = "lora_adapter_metadata" in file.metadata or any("alpha" in m.parts for m in keys.modules)
    if file.config is None and not scaled and any(m.name.startswith("base_model.model.") for m in keys.modules):
        kind = "lokr" if "lokr" in keys.kinds else "lora"
        raise AmbiguousError(
            f"these are PEFT tensors without their {PEFT_CONFIG}: the scale alpha / r is unknown.",
            fix=f"Put {PEFT_CONFIG} beside the file, or say --from diffusers-{kind} for scale 1.",
        )


def format_of(source: str | Path, base: str | Path | None = None) -> str:
    """The name of the format that an adapter is stored in; of a folder, that of its first file. Headers only.

    A native file remembers where it came from (`provenance.source_format`); this says what it is.
    """
    return detect_format(open_files(source, base)[0]).name
