"""A stored tensor with its patches, tile by tile: added in float32, rounded once, handed on in file order.

A tile is some whole rows. Where a tensor gets one sum that adds in one rounding, the sum is added to the base itself;
elsewhere the whole delta of the tile is formed first, so that its parts do not round the base several times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isfinite

import torch
from torch import Tensor

from krona_hub.errors import DtypeError, NonFiniteError
from krona_hub.kron.parallel import one_thread
from krona_hub.merging.arithmetic.dora import Dora
from krona_hub.merging.arithmetic.kernels import TILE
from krona_hub.merging.arithmetic.patches import Addition, Patch, PatchRows, Segment, additions, parts_of, segments
from krona_hub.merging.arithmetic.rounding import NEAREST, WIDE, Rounding, Survival, rounder
from krona_hub.merging.arithmetic.scratch import scratch

Sink = Callable[[int, Tensor], None]  # first flat element, 1-D contiguous numbers of the output type; used at once


def merge_tensor(
    weight: Tensor,
    patches: Sequence[Patch],
    sink: Sink,
    *,
    out_dtype: torch.dtype,
    rounding: Rounding = NEAREST,
    name: str = "",
) -> Survival:
    """Send W + Σ w·ΔW, rounded once to `out_dtype`, to `sink`: all of the tensor, in tiles, in file order.

    `weight` has the shape and type that it is stored in, and is only read. A tile is valid until `sink` returns. Rows
    that nothing is added to keep their bits. Threads may work side by side, on a tensor each. Raises BaseMismatchError
    for a delta of another size, DtypeError for a base that is no floating point, ConflictError for two DoRA patches on
    the same rows, NonFiniteError naming the tensor where a finite number of the base becomes infinite.
    """
    if not weight.is_floating_point():
        raise DtypeError(
            f"{name or 'the tensor'} holds {str(weight.dtype).removeprefix('torch.')}, which is no plain weight.",
            fix="Merge into the base before it was quantised.",
        )
    if not weight.numel():
        return Survival()
    with one_thread(), torch.no_grad():
        return _Merge(weight, patches, out_dtype, rounding, name).run(sink)


class _Desk:
    """What a thread works on for a tile of so many rows. Views cost as much as some thousand additions: made once."""

    def __init__(self, height: int, columns: int, wide: torch.dtype, out: torch.dtype) -> None:
        numel = height * columns
        self.sums, self.delta = scratch("sums", numel, wide), scratch("delta", numel, wide)
        self.sum_rows, self.delta_rows = self.sums.view(height, columns), self.delta.view(height, columns)
        self.out = scratch("out", numel, out)


class _Merge:
    """One tensor on its way through the tiles."""

    def __init__(
        self, weight: Tensor, patches: Sequence[Patch], out_dtype: torch.dtype, rounding: Rounding, name: str
    ) -> None:
        self._height = len(weight) if weight.ndim else 1
        self._base = weight.detach().reshape(-1)  # a view of what a file holds
        self._columns = len(self._base) // self._height
        self._out_dtype, self._name = out_dtype, name
        self._wide = torch.float64 if rounding.exact or weight.dtype == torch.float64 else torch.float32
        self._round = rounder(rounding, self._wide, out_dtype, name)
        self._additions = additions(patches, (self._height, self._columns), self._wide, name)
        self._segments = segments(self._additions, self._height, name)
        self._doras: dict[Addition, Dora] = {}
        self._desks: dict[int, _Desk] = {}
        self._direct = out_dtype not in WIDE and all(
            len(s.parts) < 2 and all(p.addition.one_rounding for p in s.parts) for s in self._segments
        )

    def run(self, sink: Sink) -> Survival:
        self._doras = {a: self._observed(a) for a in self._additions if a.patch.delta.magnitude is not None}
        wanted = sum(a.squared_norm() for a in self._additions) if self._direct else 0.0
        lost = 0.0
        for segment in self._segments:
            for rows in _tiles(segment, self._columns):
                out, added, missing = self._tile(segment, rows)
                sink(rows.start * self._columns, out)
                wanted, lost = wanted + added, lost + missing
        return Survival(wanted, lost)

    # ── one tile ─────────────────────────────────────────────────────────────────────────────────

    def _tile(self, segment: Segment, rows: range) -> tuple[Tensor, float, float]:
        """The rows as they are stored, flat; ‖w·ΔW‖² here, 0 where it is known for the whole; what rounding cost."""
        stored = self._base.narrow(0, rows.start * self._columns, len(rows) * self._columns)
        if not segment.parts:
            return self._untouched(stored), 0.0, 0.0
        if self._direct:
            return self._added_to_base(segment.parts[0], rows, stored)
        return self._added_as_a_whole(segment, rows, stored)

    def _untouched(self, stored: Tensor) -> Tensor:
        if stored.dtype == self._out_dtype:
            return stored
        desk = self._desk(stored.numel() // self._columns)
        self._round(desk.sums.copy_(stored), desk.out)
        self._check_finite(stored, desk.out)
        return desk.out

    def _added_to_base(self, part: PatchRows, rows: range, stored: Tensor) -> tuple[Tensor, float, float]:
        desk = self._desk(len(rows))
        desk.sums.copy_(stored)
        part.add_to(desk.sum_rows, rows.start)
        self._round(desk.sums, desk.out)
        lost = desk.delta.copy_(desk.out).sub_(desk.sums)
        return desk.out, 0.0, self._squared(lost, stored, desk.out)

    def _added_as_a_whole(self, segment: Segment, rows: range, stored: Tensor) -> tuple[Tensor, float, float]:
        desk = self._desk(len(rows))
        desk.sums.copy_(stored)
        self._form_delta(segment, rows, desk)
        wanted = torch.dot(desk.delta, desk.delta).item()
        if self._out_dtype in WIDE:
            self._add_equals(desk, stored)
        else:
            self._round(desk.sums.add_(desk.delta), desk.out)
            desk.delta.copy_(desk.out).sub_(desk.sums)
        return desk.out, wanted, self._squared(desk.delta, stored, desk.out)

    def _form_delta(self, segment: Segment, rows: range, desk: _Desk) -> None:
        """Σ w·ΔW of these rows, where the desk's sums still are the base. DoRA first: it scales what is there."""
        desk.delta.zero_()
        for part in sorted(segment.parts, key=lambda p: p.addition not in self._doras):
            part.add_to(desk.delta_rows, rows.start)
            if part.addition in self._doras:
                self._doras[part.addition].scale(desk.delta_rows, desk.sum_rows, part.row(rows.start))

    def _add_equals(self, desk: _Desk, stored: Tensor) -> None:
        """Sum and loss, where the stored type is as wide as the sums: (W′ − W) − ΔW, which is nearly exact."""
        self._round(desk.sums.add_(desk.delta), desk.out)
        base = scratch("base", stored.numel(), self._wide).copy_(stored)
        desk.delta.sub_(desk.sums.copy_(desk.out).sub_(base))

    def _desk(self, height: int) -> _Desk:
        if height not in self._desks:
            self._desks[height] = _Desk(height, self._columns, self._wide, self._out_dtype)
        return self._desks[height]

    # ── what went wrong ──────────────────────────────────────────────────────────────────────────

    def _squared(self, lost: Tensor, stored: Tensor, out: Tensor) -> float:
        """‖lost‖², which is finite unless something in the tile is not."""
        squared = torch.dot(lost, lost).item()
        if isfinite(squared):
            return squared
        finite = self._check_finite(stored, out)
        return lost[finite].double().square().sum().item()

    def _check_finite(self, stored: Tensor, out: Tensor) -> Tensor:
        """Where the base is finite: there the result must be."""
        finite = _is_finite(stored)
        broken = int((finite & ~_is_finite(out)).sum())
        if broken:
            raise NonFiniteError(
                f"{self._name or 'the tensor'} overflows: {broken} numbers or more are beyond what "
                f"{str(self._out_dtype).removeprefix('torch.')} holds.",
                fix="Take smaller weights, or store it in a wider type (--out-dtype bf16 or fp32-touched).",
            )
        return finite

    # ── DoRA, the first pass ─────────────────────────────────────────────────────────────────────

    def _observed(self, addition: Addition) -> Dora:
        dora = Dora(addition, self._columns, self._wide)
        for part in parts_of(addition, self._height):
            for rows in _tiles(Segment(part.rows, (part,)), self._columns):
                stored = self._base.narrow(0, rows.start * self._columns, len(rows) * self._columns)
                desk = self._desk(len(rows))
                desk.sums.copy_(stored)
                part.add_to(desk.sum_rows, rows.start)
                dora.observe(desk.sum_rows, part.row(rows.start))
        dora.finish()
        return dora


def _is_finite(numbers: Tensor) -> Tensor:
    return numbers.float().isfinite() if numbers.element_size() == 1 else numbers.isfinite()


def _tiles(segment: Segment, columns: int) -> Iterator[range]:
    """The rows of a segment, TILE numbers at a time or a row: whole blocks of a sum, or even shares of one."""
    step = max(1, TILE // columns)
    if segment.parts:
        block = segment.parts[0].addition.block
        step = step // block * block or -(-block // -(-block // step))
    for start in range(segment.rows.start, segment.rows.stop, step):
        yield range(start, min(start + step, segment.rows.stop))
