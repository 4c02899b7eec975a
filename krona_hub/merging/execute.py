"""Run a merge, tensor by tensor, into an atomic output."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from krona_hub.adapters.adapter import Adapter
from krona_hub.aliases import Progress
from krona_hub.checkpoints.digest import file_sha256
from krona_hub.checkpoints.header import TensorInfo
from krona_hub.checkpoints.rewrite import ByteSink, TensorChange
from krona_hub.kron.parallel import one_thread
from krona_hub.merging.arithmetic.layer_changes import patches_of
from krona_hub.merging.arithmetic.patches import Patch
from krona_hub.merging.arithmetic.rounding import Rounding, Survival
from krona_hub.merging.arithmetic.tiles import merge_tensor
from krona_hub.merging.merge_input import MergeInput
from krona_hub.merging.merge_record import DATA_HASH, Recipe, RecordedAdapter, is_small, known_sha256, metadata_for
from krona_hub.merging.output.write_model import MergedFile, bytes_to_write, write_merged
from krona_hub.merging.plan import FilePlan, MergePlan, TensorPlan
from krona_hub.merging.report import MergeReport, TensorReport
from krona_hub.merging.request import MergeRequest

TORCH = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip

with warnings.catch_warnings():  # torch warns once per process about read-only buffers; mapped files are only read here
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


def execute(request: MergeRequest, progress: Progress | None = None) -> MergeReport:
    """Run the request; `merge` documents the errors."""
    started, plan, destination = perf_counter(), request.plan, request.destination
    rounding = Rounding(request.rounding, request.seed, request.exact_rounding)
    recipe = _recipe(plan, request.options, request.title)
    work = _Work(plan, rounding, [part.load() for part in plan.parts])
    work.check()
    hashed = [_sha256(file.path, request.hash, destination.undo is not None) for file in plan.files]
    files = [_merged_file(work, file, recipe, sha, request.hash) for file, sha in zip(plan.files, hashed, strict=True)]
    with one_thread():  # the writer has its own threads; torch's would only compete with them
        counted = _counted(progress, bytes_to_write(destination, files))
        written = write_merged(destination, files, threads=request.threads, progress=counted)
    return MergeReport(
        base=plan.tree.root,
        out=destination.out or plan.tree.root,
        adapters=plan.adapters,
        tensors=tuple(work.reports()),
        files=written.files,
        copied=len(written.copied),
        left_out=tuple(path.as_posix() for path in written.left_out),
        bytes_written=written.nbytes,
        bytes_touched=plan.bytes_to_touch,
        seconds=perf_counter() - started,
        undo=destination.undo,
        base_sha256=hashed[0] if len(hashed) == 1 else None,
        notes=(*plan.notes, *_notes(hashed)),
    )


@dataclass(frozen=True, eq=False)
class _Work:
    """State shared by the threads: the plan, the adapters and the result of each tensor."""

    plan: MergePlan
    rounding: Rounding
    adapters: Sequence[Adapter]
    survived: dict[tuple[Path, str], Survival] = field(default_factory=dict)

    def changes(self, file: FilePlan) -> dict[str, TensorChange]:
        return {t.name: TensorChange(t.out_dtype, partial(self._produce, file.path, t)) for t in file.tensors}

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
        return patches_of(tensor.targets, lambda i, layer: self.adapters[i].delta(layer), tensor.name)

    def check(self) -> None:
        """Raise, before anything is written, what `patches_of` raises."""
        for tensor in self.plan.tensors:
            if any(t.placement.part or t.placement.shared_with for t in tensor.targets):
                self._patches(tensor)

    def reports(self) -> Iterator[TensorReport]:
        for file in self.plan.files:
            for tensor in file.tensors:
                if tensor.targets:
                    wanted, lost = self.survived[file.path, tensor.name]
                    layers = tuple(dict.fromkeys(t.layer for t in tensor.targets))
                    where = _name(file.path, self.plan.tree.root)
                    yield TensorReport(where, tensor.name, layers, tensor.out_dtype, wanted**0.5, lost**0.5)


def _name(path: Path, root: Path) -> str:
    """Return the name of the file in the report."""
    return path.name if path == root else path.relative_to(root).as_posix()


def _tensor(old: memoryview, info: TensorInfo) -> torch.Tensor:
    """View the mapped bytes of a tensor as a tensor."""
    if not info.numel:
        return torch.empty(info.shape, dtype=TORCH[info.dtype])
    return torch.frombuffer(old, dtype=TORCH[info.dtype]).view(info.shape)


# --- the output's metadata -------------------------------------------------------------------------------------------


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
        RecordedAdapter(Path(part.label).name, _adapter_sha256(part), part.format, part.weight) for part in plan.parts
    )
    return Recipe(plan.tree.root.name, ingredients, options, title, version("krona-hub"))


def _adapter_sha256(part: MergeInput) -> str | None:
    """Return the sha256 of its file, or a combined one for several files, in order of name."""
    if not part.files:
        return None
    digests = [file_sha256(path) for path in part.files]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def _sha256(path: Path, request: bool | None, undo: bool) -> str | None:
    """Return the sha256 of a base file if the Hub cache records it, or if it is requested, needed or cheap."""
    known = known_sha256(path)
    wanted = is_small([path]) if request is None else request
    return known or (file_sha256(path) if wanted or undo else None)


def _notes(hashed: Sequence[str | None]) -> Iterator[str]:
    if any(sha is None for sha in hashed):
        yield "the sha256 of the base was not recorded, since hashing takes as long as copying; add --hash to record it"


def _counted(progress: Progress | None, total: int) -> Callable[[int], None] | None:
    """Convert the byte increments that the writer reports to a running total."""
    if progress is None:
        return None
    done = 0

    def step(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        progress(min(done, total), total)

    return step
