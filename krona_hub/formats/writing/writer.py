"""Adapter → file: names, tensors and metadata of the target, whole or not at all, and read back before it counts."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from krona_hub.adapters.adapter import Adapter
from krona_hub.bases.base import Base
from krona_hub.checkpoints.atomic import atomic_folder, atomic_text, check_output
from krona_hub.checkpoints.writer import write_tensors
from krona_hub.formats.writing.readback import checked
from krona_hub.formats.writing.write_plan import WritePlan, aim_at, planned


@dataclass(frozen=True)
class WriteReport:
    """What was written, and what reading it back showed."""

    path: Path  # the file, or the folder of a PEFT adapter
    format: str  # a name of FORMATS
    files: tuple[Path, ...]
    modules: int  # in the file; fused projections count once
    layers: int  # rebuilt and compared
    parameters: int  # alpha not counted
    bytes: int
    worst_difference: float  # relative, Frobenius, over all layers: what was read back against what was meant
    notes: tuple[str, ...] = ()  # what the target could not hold, and what a reader of the file must know

    def __str__(self) -> str:
        worst = f"worst relative difference {self.worst_difference:.0e}" if self.worst_difference else "no difference"
        return f"checked: {self.layers}/{self.layers} modules rebuilt, {worst}"


def write(
    adapter: Adapter,
    path: str | Path,
    *,
    format: str = "krona",
    base: str | Path | Base | None = None,
    tool: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    split_qkv: bool = False,
) -> WriteReport:
    """Write `adapter` in `format`, or in what `tool` loads, and check the result by reading it back.

    `base` (a catalogue name, a folder, a checkpoint or a Base; default: what the adapter says) settles names that
    depend on it. `dtype` casts every tensor but alpha. `split_qkv` writes q, k and v apart where names fuse them.
    Raises InexpressibleError where the target cannot hold a layer exactly, ConflictError where `path` exists and
    `overwrite` is not given, IntegrityError (and no file) where reading back gives something else.
    """
    path, aim = Path(path), aim_at(adapter, format, tool, split_qkv)
    if not aim.is_folder:
        check_output(path, overwrite=overwrite)
    plan = planned(adapter, aim, base, dtype)
    return _write_file(plan, path, overwrite) if plan.package.is_file else _write_folder(plan, path, overwrite)


def _write_file(plan: WritePlan, path: Path, overwrite: bool) -> WriteReport:
    """Write beside the target, check there, and move it only then."""
    with tempfile.TemporaryDirectory(prefix=".krona-", dir=path.parent) as folder:
        staged = Path(folder) / path.name
        write_tensors(staged, *plan.package.files[""])
        worst = checked(plan, staged)
        check_output(path, overwrite=overwrite)
        staged.replace(path)
    return _report(plan, path, (path,), worst)


def _write_folder(plan: WritePlan, path: Path, overwrite: bool) -> WriteReport:
    with atomic_folder(path, overwrite=overwrite) as staged:
        for name, (tensors, metadata) in plan.package.files.items():
            (staged / name).parent.mkdir(exist_ok=True)
            write_tensors(staged / name, tensors, metadata)
        for name, text in plan.package.texts.items():
            atomic_text(staged / name, text)
        worst = checked(plan, staged)
    return _report(plan, path, tuple(path / n for n in (*plan.package.files, *plan.package.texts)), worst)


def _report(plan: WritePlan, path: Path, files: tuple[Path, ...], worst: float) -> WriteReport:
    stored = [t for f in plan.package.files.values() for name, t in f.tensors.items() if not name.endswith(".alpha")]
    return WriteReport(
        path=path,
        format=plan.aim.format,
        files=files,
        modules=len(plan.modules),
        layers=len(plan.adapter),
        parameters=sum(t.numel() for t in stored),
        bytes=sum(f.stat().st_size for f in files),
        worst_difference=worst,
        notes=plan.notes,
    )
