"""Resolve the output options of a conversion: format, dtype and default path. Torch-free."""

from __future__ import annotations

from pathlib import Path

from krona_hub.errors import UsageError
from krona_hub.formats.known.registry import by_name, storage_of
from krona_hub.sources import is_remote, parse_hub_id

ALIASES = {"lora": "kohya-lora", "lokr": "lycoris-lokr", "native": "krona"}
DTYPES = {
    name: dtype
    for dtype, names in {
        "float32": ("fp32", "float32", "f32"),
        "float16": ("fp16", "float16", "f16"),
        "bfloat16": ("bf16", "bfloat16"),
        "float64": ("fp64", "float64", "f64"),
    }.items()
    for name in names
}


def format_named(name: str) -> str:
    """Return the name of a writable format, resolving aliases. Raises UsageError with the nearest name."""
    format = by_name(ALIASES.get(name, name))
    if not format.writes:
        raise UsageError(f"Format {format.name} is read-only.", fix="Choose another --to; `krona formats` lists them.")
    return format.name


def default_out(source: str | Path, format_name: str, application: str | None = None) -> Path:
    """Return `<stem>.<format or application>.safetensors` beside the source; for PEFT, a folder without the suffix.

    For a Hub id the output goes to the current folder rather than the client's cache.

    >>> str(default_out("a/style.safetensors", "kohya-lora")), str(default_out("hf://ana/style@v1", "krona"))
    ('a/style.kohya-lora.safetensors', 'style.krona.safetensors')
    >>> str(default_out("style.safetensors", "lycoris-lokr", "comfyui"))
    'style.comfyui.safetensors'
    """
    path = _named(source)
    stem = path.name.removesuffix(".safetensors")
    suffix = "" if storage_of(format_name).folder else ".safetensors"
    return path.with_name(f"{stem}.{application or format_name}{suffix}")


def _named(source: str | Path) -> Path:
    hub_id = parse_hub_id(str(source)) if is_remote(source) else None
    if hub_id is not None:
        return Path((hub_id.file or hub_id.repo).rpartition("/")[2])
    path = Path(source).expanduser()
    return path if path.name not in ("", "..") else path.resolve()


def optional_dtype(dtype: object | None) -> str | None:
    """Return the torch name of a dtype given as an option, None for None. Raises as `dtype_named` does."""
    return None if dtype is None else dtype_named(str(dtype).removeprefix("torch."))


def dtype_named(name: str) -> str:
    """Return torch's name of a dtype such as `fp16`. Raises UsageError for one that adapters are not stored in.

    >>> dtype_named("BF16")
    'bfloat16'
    """
    if name.lower() not in DTYPES:
        raise UsageError(f"Unsupported dtype {name!r}.", fix="Choose fp32, fp16, bf16 or fp64.")
    return DTYPES[name.lower()]
