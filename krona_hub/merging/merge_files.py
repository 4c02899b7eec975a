"""`merge`: the plan carried out, tensor by tensor, into a file or folder that appears whole."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import torch

from krona_hub.adapter import Adapter
from krona_hub.checkpoints.digest import file_sha256
from krona_hub.checkpoints.header import TensorInfo
from krona_hub.checkpoints.rewrite import ByteSink, Change
from krona_hub.errors import UsageError
from krona_hub.formats.files import read
from krona_hub.kron.parallel import one_thread
from krona_hub.merging.folders import MergedFile, Place, bytes_to_write, check_place, write_merged
from krona_hub.merging.metadata import DATA_HASH, Ingredient, Recipe, is_small, known_sha256, metadata_for
from krona_hub.merging.parts import Part
from krona_hub.merging.patches import Patch
from krona_hub.merging.plan import FilePlan, MergePlan, OutDtype, TensorPlan, plan_merge
from krona_hub.merging.report import MergeReport, TensorReport
from krona_hub.merging.rounding import Rounding, Survival
from krona_hub.merging.tiles import merge_tensor

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
Progress = Callable[[int, int], None]  # bytes done, bytes in all

with warnings.catch_warnings():  # torch says once per process that it would not write to mapped files; nor do we
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def merge(
    base: str | Path,
    adapters: Sequence[tuple[Adapter | str | Path, float]],
    out: str | Path | None = None,
    *,
    component: str | None = None,
    block_weights: Mapping[str, float] | None = None,
    out_dtype: OutDtype = "keep",
    rounding: Literal["nearest", "stochastic"] = "nearest",
    seed: int = 0,
    exact_rounding: bool = False,
    from_format: str | None = None,
    allow_missing: bool = False,
    allow_base_mismatch: bool = False,
    overwrite: bool = False,
    link: bool = False,
    in_place: bool = False,
    undo: str | Path | None = None,
    hash: bool | None = None,
    title: str | None = None,
    threads: int = 2,
    progress: Progress | None = None,
) -> MergeReport:
    """Write `base` with Σ weight · ΔW of the adapters added, in the layout of the base; say what rounding took.

    Every changed number is W + Σ w·ΔW in float32 (float64 with `exact_rounding`), rounded once to the stored type or to
    `out_dtype`; everything else is copied byte for byte. The output appears whole, by rename, when all is done.
    `in_place` changes the base itself and needs `undo`, the file that `unmerge` restores it from. `hash` records the
    sha256 of the base and of the output's data; by default where that costs little. What can be merged, and the other
    options, is said by `plan_merge`, which raises the same errors. Besides: NonFiniteError for a sum that overflows the
    stored type, ConflictError for an output in the way, ResourceError for a full disk; then nothing was written.
    """
    started = perf_counter()
    if (out is None) != in_place:
        raise UsageError("say where to write: to a new place or in place.", fix="Give -o OUT, or --in-place --undo F.")
    plan = plan_merge(
        base,
        adapters,
        component=component,
        block_weights=block_weights,
        out_dtype=out_dtype,
        from_format=from_format,
        allow_missing=allow_missing,
        allow_base_mismatch=allow_base_mismatch,
    )
    place = Place(plan.tree.root, _path(out), _path(undo), overwrite=overwrite, link=link)
    check_place(place, [file.path for file in plan.files])
    how = Rounding(rounding, seed, exact_rounding)
    options = _told(rounding=how, out_dtype=out_dtype, block_weights=block_weights, component=component)
    recipe = _recipe(plan, options, title)
    work = _Work(plan, how, [_loaded(part, plan, from_format) for part in plan.parts])
    hashed = [_sha256(file.path, hash, undo is not None) for file in plan.files]
    files = [_merged_file(work, file, recipe, sha, hash) for file, sha in zip(plan.files, hashed, strict=True)]
    with one_thread():  # the threads here are those of the writer; torch's own would only wait for each other
        counted = _counted(progress, bytes_to_write(place, files))
        written = write_merged(place, files, threads=threads, progress=counted)
    return MergeReport(
        base=plan.tree.root,
        out=place.out or plan.tree.root,
        adapters=plan.adapters,
        tensors=tuple(work.reports()),
        files=written.files,
        copied=len(written.copied),
        left_out=tuple(path.as_posix() for path in written.left_out),
        bytes_written=written.nbytes,
        bytes_touched=plan.bytes_to_touch,
        seconds=perf_counter() - started,
        undo=place.undo,
        base_sha256=hashed[0] if len(hashed) == 1 else None,
        notes=(*plan.notes, *_notes(hashed)),
    )


@dataclass(frozen=True, eq=False)
class _Work:
    """What the threads share: the plan, the adapters, and what came of each tensor."""

    plan: MergePlan
    rounding: Rounding
    adapters: Sequence[Adapter]
    survived: dict[tuple[Path, str], Survival] = field(default_factory=dict)

    def changes(self, file: FilePlan) -> dict[str, Change]:
        return {t.name: Change(t.out_dtype, partial(self._produce, file.path, t)) for t in file.tensors}

    def _produce(self, path: Path, tensor: TensorPlan, old: memoryview, sink: ByteSink) -> None:
        out = TORCH[tensor.out_dtype]

        def send(first: int, tile: torch.Tensor) -> None:
            sink(first * out.itemsize, tile.view(torch.uint8).numpy().data)

        self.survived[path, tensor.name] = merge_tensor(
            _tensor(old, tensor.info),
            self._patches(tensor),
            send,
            out_dtype=out,
            rounding=self.rounding,
            name=tensor.name,
        )

    def _patches(self, tensor: TensorPlan) -> list[Patch]:
        return [Patch(self.adapters[t.adapter].layers[t.layer], t.weight, t.placement) for t in tensor.targets]

    def reports(self) -> Iterator[TensorReport]:
        for file in self.plan.files:
            for tensor in file.tensors:
                if tensor.targets:
                    wanted, lost = self.survived[file.path, tensor.name]
                    layers = tuple(dict.fromkeys(t.layer for t in tensor.targets))
                    yield TensorReport(file.path.name, tensor.name, layers, tensor.out_dtype, wanted**0.5, lost**0.5)


def _tensor(old: memoryview, info: TensorInfo) -> torch.Tensor:
    """The mapped bytes of a tensor as a tensor."""
    if not info.numel:
        return torch.empty(info.shape, dtype=TORCH[info.dtype])
    return torch.frombuffer(old, dtype=TORCH[info.dtype]).view(info.shape)


def _loaded(part: Part, plan: MergePlan, from_format: str | None) -> Adapter:
    """The adapter; what the plan has agreed to leave out does not stop it."""
    if isinstance(part.source, Adapter):
        return part.source
    return read(part.source, base=plan.tree.base, format=from_format, component=part.component, allow_missing=True)


# ── the output's metadata ────────────────────────────────────────────────────────────────────────


def _merged_file(work: _Work, file: FilePlan, recipe: Recipe, sha256: str | None, hash: bool | None) -> MergedFile:
    hashes = is_small([file.path]) if hash is None else hash
    return MergedFile(
        header=file.header,
        changes=work.changes(file),
        metadata=metadata_for(file.header.metadata, recipe, work.plan.tree.base, sha256),
        data_hash=DATA_HASH if hashes else None,
        sha256=sha256,
    )


def _recipe(plan: MergePlan, options: Mapping[str, Any], title: str | None) -> Recipe:
    ingredients = tuple(
        Ingredient(Path(part.said).name, _adapter_sha256(part), part.format, part.weight) for part in plan.parts
    )
    return Recipe(plan.tree.root.name, ingredients, options, title, version("krona-hub"))


def _adapter_sha256(part: Part) -> str | None:
    if isinstance(part.source, Path) and part.source.is_dir():
        return file_sha256(next(iter(sorted(part.source.rglob("*.safetensors")))))
    return file_sha256(part.source) if isinstance(part.source, Path) else None


def _sha256(path: Path, asked: bool | None, undo: bool) -> str | None:
    """Of a base's file: for nothing where the Hub's cache tells it, else where it is asked for, needed or cheap."""
    known = known_sha256(path)
    wanted = is_small([path]) if asked is None else asked
    return known or (file_sha256(path) if wanted or undo else None)


def _told(*, rounding: Rounding, **options: Any) -> dict[str, Any]:
    """The options that differ from their defaults."""
    told = {name: value for name, value in options.items() if value and value != "keep"}
    if rounding.mode != "nearest":
        told |= {"rounding": rounding.mode, "seed": rounding.seed}
    return told | ({"exact_rounding": True} if rounding.exact else {})


def _notes(hashed: Sequence[str | None]) -> Iterator[str]:
    if any(sha is None for sha in hashed):
        yield "the base's sha256 was not taken, which needs as long as copying it: --hash records it"


def _counted(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    """What the writer reports, which is bytes since its last call, as a count of all."""
    if progress is None:
        return None
    done = 0

    def step(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(min(done, total), total)

    return step


def _path(said: str | Path | None) -> Path | None:
    return None if said is None else Path(said).expanduser()
