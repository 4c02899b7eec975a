"""`FORMATS`, the supported formats in the order in which detection tries them (FORMATS §2): the first match decides.

Examples
--------
>>> [format.name for format in FORMATS if not format.writes]
['peft-loha', 'cloneofsimo', 'lycoris-loha']
"""

from __future__ import annotations

from difflib import get_close_matches
from pathlib import Path

from krona_hub.checkpoints.file_names import PEFT_CONFIG
from krona_hub.errors import AmbiguousError, UnrecognisedError, UsageError
from krona_hub.formats.known.cloneofsimo import CLONEOFSIMO
from krona_hub.formats.known.diffusekrona import DIFFUSEKRONA
from krona_hub.formats.known.diffusers import DIFFUSERS_LOKR, DIFFUSERS_LORA
from krona_hub.formats.known.format import Format, Storage
from krona_hub.formats.known.kohya import KOHYA_LORA, LYCORIS_LOCON, LYCORIS_LOHA, LYCORIS_LOKR
from krona_hub.formats.known.native import KRONA
from krona_hub.formats.known.peft import PEFT_LOHA, PEFT_LOKR, PEFT_LORA
from krona_hub.formats.known.refusals import not_an_adapter, refuse_whole
from krona_hub.formats.parsing.adapter_file import AdapterFile, open_files

FORMATS: tuple[Format, ...] = (
    KRONA,
    PEFT_LOKR,
    PEFT_LORA,
    PEFT_LOHA,
    CLONEOFSIMO,
    DIFFUSERS_LOKR,
    LYCORIS_LOKR,
    DIFFUSEKRONA,
    LYCORIS_LOHA,
    LYCORIS_LOCON,
    KOHYA_LORA,
    DIFFUSERS_LORA,
)


def names() -> tuple[str, ...]:
    """The names of all formats, in the order of detection."""
    return tuple(format.name for format in FORMATS)


def by_name(name: str) -> Format:
    """The format of that name. Raises UsageError, with a suggestion, for an unknown name.

    >>> by_name("kohya-lora").name
    'kohya-lora'
    """
    found = next((format for format in FORMATS if name == format.name), None)
    if found is None:
        near = get_close_matches(name.lower().replace("_", "-"), names(), n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise UsageError(f"Unknown format {name!r}.", fix=f"{hint}Choose one of {', '.join(names())}.")
    return found


def storage_of(name: str) -> Storage:
    """The storage of the format of that name. Raises UsageError for an unknown or read-only format."""
    storage = by_name(name).storage
    if storage is None:
        writable = ", ".join(format.name for format in FORMATS if format.writes)
        raise UsageError(f"Format {name!r} is read-only.", fix=f"Choose one of {writable}.")
    return storage


def detect_format(file: AdapterFile) -> Format:
    """Detect the format of a file from its keys, shapes and metadata.

    Parameters
    ----------
    file : AdapterFile
        An open file, see `open_files`. Only its header and configuration are read.

    Returns
    -------
    Format
        The first of `FORMATS` that recognizes the file.

    Raises
    ------
    UnrecognisedError
        The file is not an adapter, such as a checkpoint.
    UnsupportedError
        All modules belong to an algorithm that is not a Kronecker or low-rank product, such as OFT, or the tensors are
        quantized with scales.
    AmbiguousError
        Two formats fit; the message names the option that decides.

    Examples
    --------
    >>> from importlib.resources import files
    >>> from krona_hub.formats.parsing.adapter_file import open_files
    >>> detect_format(open_files(files("krona_hub.assets") / "zorbi_lokr.safetensors")[0]).name
    'lycoris-lokr'
    """
    if not KRONA.recognizes(file):
        _check_supported(file)
    for format in FORMATS:
        if format.recognizes(file):
            return format
    raise UnrecognisedError("No known adapter format matches.", fix="Run `krona formats` to list supported formats.")


def _check_supported(file: AdapterFile) -> None:
    keys = file.keys
    refuse_whole(file)
    if not keys.modules and not keys.vectors:
        raise not_an_adapter(file)
    scaled = "lora_adapter_metadata" in file.metadata or any("alpha" in m.parts for m in keys.modules)
    if file.config is None and not scaled and any(m.name.startswith("base_model.model.") for m in keys.modules):
        kind = "lokr" if "lokr" in keys.kinds else "lora"
        raise AmbiguousError(
            f"Missing {PEFT_CONFIG} for PEFT tensors: the scale alpha / r is unknown.",
            fix=f"Put {PEFT_CONFIG} beside the file, or use --from diffusers-{kind} to assume scale 1.",
        )


def format_of(source: str | Path, base: str | Path | None = None) -> str:
    """The name of the format an adapter is stored in, for a folder that of its first file. Reads headers only.

    `provenance.source_format` of a native file is the format it was converted from; this is the format it has now.
    """
    return detect_format(open_files(source, base)[0]).name
