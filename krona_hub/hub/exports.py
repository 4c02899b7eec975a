"""Companion exports: copies of the adapter for other applications, stored beside the native file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from krona_hub.conversion import convert
from krona_hub.conversion.report import REFUSED_ABOVE, percent
from krona_hub.errors import LossyError
from krona_hub.formats.compatibility.verdicts import loads_in
from krona_hub.formats.reading.describe import describe
from krona_hub.hub.local_adapter import LocalAdapter
from krona_hub.hub.repo_layout import LOKR_EXPORT, LORA_EXPORT


class Export(NamedTuple):
    """A companion export, with its error and its size."""

    name: str
    format: str
    words: str  # "LoRA of rank 16"
    relative_error: float
    parameters: int
    loads_in: tuple[str, ...]  # names of APPLICATIONS

    def document(self) -> dict[str, Any]:
        return {
            **self._asdict(),
            "loads_in": list(self.loads_in),
            "relative_error": float(f"{self.relative_error:.3g}"),
        }


def make_exports(
    adapter: LocalAdapter, folder: Path, with_lora: int | bool, with_lokr: bool, base: str | Path | None
) -> tuple[Export, ...]:
    """Write the requested exports; `with_lora` is True for an exact LoRA, or a rank.

    Raises LossyError or InexpressibleError if the adapter cannot be expressed that way.
    """
    exports = []
    if with_lora:
        exact = with_lora is True
        method: dict[str, Any] = {"exact": True} if exact else {"rank": int(with_lora)}
        words = "LoRA, exact" if exact else f"LoRA of rank {with_lora}"
        exports.append(_export(adapter, folder / LORA_EXPORT, "diffusers-lora", words, base, **method))
    if with_lokr:
        exports.append(_export(adapter, folder / LOKR_EXPORT, "lycoris-lokr", "LyCORIS LoKr", base, exact=True))
    return tuple(exports)


def _export(adapter: LocalAdapter, path: Path, to: str, words: str, base: str | Path | None, **method: Any) -> Export:
    try:
        report = convert(adapter.path, path, to=to, base=base, overwrite=True, **method)
        if report.relative_error > REFUSED_ABOVE:  # allowed with a rank, but whoever downloads it did not choose it
            raise LossyError(f"The relative error would be {percent(report.relative_error)}.")
    except LossyError as refused:
        refused.fix = _fix_for_push(path.name, method.get("rank"))
        raise refused.within(path.name) from None
    return Export(path.name, to, words, report.relative_error, report.parameters_after, _tools(path))


def _fix_for_push(name: str, rank: int | None) -> str:
    """Return what to change when an export is refused: a conversion's fix names options that `push` lacks."""
    if rank is not None:
        return f"Use a higher rank, such as --with-lora={2 * rank}, or --with-lora for an exact LoRA."
    return "Omit --with-lokr; --with-lora adds an exact LoRA." if name == LOKR_EXPORT else "Omit --with-lora."


def _tools(path: Path) -> tuple[str, ...]:
    return tuple(tool for tool, verdict in loads_in(describe(path)).items() if verdict.ok)
