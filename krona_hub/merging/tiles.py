"""A stored tensor with its patches, tile by tile: added in float32, rounded once, handed on in file order.

A tile is some whole rows. Where a tensor gets one sum that adds in one rounding, the sum is added to the base itself;
elsewhere the whole delta of the tile is formed first, so that its parts do not round the base several times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isfinite

import torch
from torch import Tensor

from krona_hub.errors import NonFiniteError
from krona_hub.kron.parallel import one_thread
from krona_hub.merging.dora import Dora
from krona_hub.merging.patches import Addition, Patch, Segment, additions, parts_of, segments
from krona_hub.merging.rounding import NEAREST, WIDE, Rounding, Survival, rounder
from krona_hub.merging.scratch import scratch
from krona_hub.merging.ways import TILE

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
    for a delta of another size, ConflictError for two DoRA patches on the same rows, NonFiniteError naming the tensor
    where a finite number of the base becomes infinite: all tiles of such a tensor may have been sent by then.
    """
    if not weight.numel():
        return Survival()
    with one_thread(), torch.no_grad():
        return _Merge(weight, patches, out_dtype, rounding, name).run(sink)


class _Merge:
    """One tensor on its way through the tiles."""

    def __init__(
        self, weight: Tensor, patches: Sequence[Patch], out_dtype: torch.dtype, rounding: Rounding, name: str
    ) -> None:
        height = len(weight) if weight.ndim else 1
        self._base = weight.detach().reshape(height, -1)  # a view, of what a file holds
        self._columns = self._base.shape[1]
        self._out_dtype, self._name = out_dtype, name
        self._wide = torch.float64 if rounding.exact or weight.dtype == torch.float64 else torch.float32
        self._round = rounder(rounding, self._wide, out_dtype, name)
        self._additions = additions(patches, (height, self._columns), self._wide, name)
        self._segments = segments(self._additions, height, name)
        self._doras: dict[Addition, Dora] = {}
        self._direct = out_dtype not in WIDE and all(
            len(s.parts) < 2 and all(p.addition.one_rounding for p in s.parts) for s in self._segments
        )

    def run(self, sink: Sink) -> Survival:
        self._doras = {a: self._observed(a) for a in self._additions if a.patch.delta.magnitude is not None}
        survival = Survival(sum(a.squared_norm() for a in self._additions) if self._direct else 0.0)
        for segment in self._segments:
            for rows in _tiles(segment, self._columns):
                tile, here = self._tile(segment, rows)
                sink(rows.start * self._columns, tile)
                survival += here
        return survival

    # ── one tile ─────────────────────────────────────────────────────────────────────────────────

    def _tile(self, segment: Segment, rows: range) -> tuple[Tensor, Survival]:
        """The rows as they are stored, flat, and what rounding cost them (in a direct merge, `lost` alone)."""
        if not segment.parts:
            return self._untouched(rows), Survival()
        if self._direct:
            return self._added_to_base(segment, rows)
        return self._added_as_a_whole(segment, rows)

    def _untouched(self, rows: range) -> Tensor:
        stored = self._base[rows.start : rows.stop].reshape(-1)
        if stored.dtype == self._out_dtype:
            return stored
        sums = self._widened(rows)
        out = self._rounded(sums)
        self._check_finite(out, rows)
        return out

    def _added_to_base(self, segment: Segment, rows: range) -> tuple[Tensor, Survival]:
        sums = self._widened(rows)
        (part,) = segment.parts
        part.addition.add_to(sums.view(len(rows), -1), part.first + rows.start - part.rows.start)
        out = self._rounded(sums)
        lost = self._buffer("delta", rows).copy_(out).sub_(sums)
        return out, Survival(0.0, self._squared(lost, out, rows))

    def _added_as_a_whole(self, segment: Segment, rows: range) -> tuple[Tensor, Survival]:
        sums = self._widened(rows)
        delta = self._delta(segment, rows, sums)
        wanted = float(torch.dot(delta, delta))
        if self._out_dtype in WIDE:
            out, lost = self._sum_of_equals(sums, delta)
        else:
            out = self._rounded(sums.add_(delta))
            lost = delta.copy_(out).sub_(sums)
        return out, Survival(wanted, self._squared(lost, out, rows))

    def _delta(self, segment: Segment, rows: range, base: Tensor) -> Tensor:
        """Σ w·ΔW of these rows, flat. DoRA first: it scales what is there."""
        delta = self._buffer("delta", rows).zero_()
        tile, wide_base = delta.view(len(rows), -1), base.view(len(rows), -1)
        for part in sorted(segment.parts, key=lambda p: p.addition not in self._doras):
            first = part.first + rows.start - part.rows.start
            part.addition.add_to(tile, first)
            if part.addition in self._doras:
                self._doras[part.addition].scale(tile, wide_base, first)
        return delta

    def _sum_of_equals(self, base: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """Sum and loss, where the stored type is as wide as the sums: (W′ − W) − ΔW, which is nearly exact."""
        sums = torch.add(base, delta, out=scratch("sums", len(base), base.dtype))
        out = self._rounded(sums)
        lost = delta.sub_(sums.copy_(out).sub_(base))
        return out, lost

    def _widened(self, rows: range) -> Tensor:
        return self._buffer("base", rows).copy_(self._base[rows.start : rows.stop].reshape(-1))

    def _rounded(self, sums: Tensor) -> Tensor:
        out = scratch("out", len(sums), self._out_dtype)
        self._round(sums, out)
        return out

    def _buffer(self, use: str, rows: range) -> Tensor:
        return scratch(use, len(rows) * self._columns, self._wide)

    # ── what went wrong ──────────────────────────────────────────────────────────────────────────

    def _squared(self, lost: Tensor, out: Tensor, rows: range) -> float:
        """‖lost‖², which is finite unless something in the tile is not."""
        squared = float(torch.dot(lost, lost))
        if isfinite(squared):
            return squared
        finite = self._check_finite(out, rows)
        return float(lost[finite].double().square().sum())

    def _check_finite(self, out: Tensor, rows: range) -> Tensor:
        """Where the base is finite: there the result must be."""
        finite = _is_finite(self._base[rows.start : rows.stop].reshape(-1))
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
        dora = Dora(addition, (len(self._base), self._columns), self._wide)
        for part in parts_of(addition, len(self._base)):
            for rows in _tiles(Segment(part.rows, (part,)), self._columns):
                directed = self._widened(rows).view(len(rows), -1)
                first = part.first + rows.start - part.rows.start
                addition.add_to(directed, first)
                dora.observe(directed, first)
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
