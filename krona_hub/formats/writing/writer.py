"""Write an adapter atomically in any supported format, and verify the output by reading it back."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from krona_hub.adapters.adapter import Adapter
from krona_hub.bases.base import Base
from krona_hub.checkpoints.atomic import atomic_folder, atomic_text, check_output
from krona_hub.checkpoints.writer import write_tensors
from krona_hub.formats.forms.left_out import COMPLETE, LeftOut
from krona_hub.formats.writing.aim import aim_at
from krona_hub.formats.writing.packing import FileSet
from krona_hub.formats.writing.readback import check_it_loads, checked
from krona_hub.formats.writing.write_plan import WritePlan, check_nothing_left_out, planned, without_lost_layers


@dataclass(frozen=True)
class WriteReport:
    """What was written, and the result of reading it back."""

    path: Path  # the file, or the folder of a PEFT adapter
    format: str  # a name of FORMATS
    files: tuple[Path, ...]
    modules: int  # in the file; fused projections count once
    layers: int  # reconstructed and compared
    parameters: int  # alpha not counted
    bytes: int
    worst_difference: float  # largest relative Frobenius difference of a layer after reading back
    notes: tuple[str, ...] = ()  # how to load the file
    vectors: int = 0  # read back and compared
    left_out: LeftOut = COMPLETE

    def __str__(self) -> str:
        worst = f"worst relative difference {self.worst_difference:.0e}" if self.worst_difference else "no difference"
        beside = f", {self.vectors}/{self.vectors} vectors" if self.vectors else ""
        return f"checked: {self.layers}/{self.layers} modules rebuilt{beside}, {worst}"


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
    allow_missing: bool = False,
) -> WriteReport:
    """Write an adapter in a format, or for an application, and verify the output by reading it back.

    Parameters
    ----------
    adapter : Adapter
        The adapter to write; its kind (LoRA or LoKr) does not change.
    path : str or Path
        Output file, or output folder of a PEFT format.
    format : str, default "krona"
        Name of a writable format, see `FORMATS`.
    base : str, Path or Base, optional
        Base model that module names depend on: a catalog name, a folder, a checkpoint file or a `Base`.
        Default: the base model recorded in the adapter.
    tool : str, optional
        Application that loads the file (a key of `TOOLS`); selects format and module names.
    dtype : torch.dtype, optional
        Cast every tensor except alpha. Default: keep the dtypes.
    overwrite : bool, default False
        Replace existing output.
    split_qkv : bool, default False
        Write q, k and v as separate modules where the module names would fuse them.
    allow_missing : bool, default False
        Leave out vectors and embeddings that the target has no place for, and layers that the application does not
        find, instead of raising.

    Returns
    -------
    WriteReport
        Paths, sizes, notes and the largest relative difference after reading back.

    Raises
    ------
    InexpressibleError
        The target cannot store a layer exactly, or has no place for a vector or an embedding.
    ConflictError
        `path` exists and `overwrite` is False.
    IntegrityError
        Reading back differs from the adapter; no output is kept.

    Examples
    --------
    >>> import tempfile
    >>> from krona_hub.adapters.adapter import LayerDelta
    >>> from krona_hub.kron.terms import KronTerms
    >>> delta = LayerDelta((KronTerms(torch.ones(1, 2, 2), torch.ones(1, 4, 3)),), (8, 6))  # A ⊗ B: (8, 6)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     print(write(Adapter({"unet.conv_in": delta}), f"{folder}/adapter.safetensors"))
    checked: 1/1 modules rebuilt, no difference
    """
    path, aim = Path(path), aim_at(adapter, format, tool, split_qkv)
    if not aim.is_folder:
        check_output(path, overwrite=overwrite)
    if allow_missing:
        adapter = without_lost_layers(adapter, aim, base)
    plan = planned(adapter, aim, base, dtype)
    return write_planned(plan, path, overwrite=overwrite, allow_missing=allow_missing)


def write_planned(plan: WritePlan, path: Path, *, overwrite: bool = False, allow_missing: bool = False) -> WriteReport:
    """Write and verify the files of a plan. Raises the errors of `write`."""
    check_nothing_left_out(plan, allow_missing=allow_missing)
    if not plan.aim.is_folder:
        check_output(path, overwrite=overwrite)
    package = plan.packed()
    store = _write_file if package.is_file else _write_folder
    return store(plan, package, path, overwrite)


def _write_file(plan: WritePlan, package: FileSet, path: Path, overwrite: bool) -> WriteReport:
    """Write to a temporary folder beside the target, verify, then move into place."""
    with tempfile.TemporaryDirectory(prefix=".krona-", dir=path.parent) as folder:
        staged = Path(folder) / path.name
        write_tensors(staged, *package.files[""])
        worst = checked(plan, staged)
        check_it_loads(plan, staged)
        check_output(path, overwrite=overwrite)
        staged.replace(path)
    return _report(plan, package, path, (path,), worst)


def _write_folder(plan: WritePlan, package: FileSet, path: Path, overwrite: bool) -> WriteReport:
    with atomic_folder(path, overwrite=overwrite) as staged:
        for name, (tensors, metadata) in package.files.items():
            (staged / name).parent.mkdir(exist_ok=True)
            write_tensors(staged / name, tensors, metadata)
        for name, text in package.texts.items():
            atomic_text(staged / name, text)
        worst = checked(plan, staged)
        check_it_loads(plan, staged)
    return _report(plan, package, path, tuple(path / n for n in (*package.files, *package.texts)), worst)


def _report(plan: WritePlan, package: FileSet, path: Path, files: tuple[Path, ...], worst: float) -> WriteReport:
    stored = [t for f in package.files.values() for name, t in f.tensors.items() if not name.endswith(".alpha")]
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
        vectors=len(plan.vectors),
        left_out=plan.left_out,
    )
