"""Merge patches into a stored tensor tile by tile: added in float32, rounded once, emitted in file order.

A tile is a number of whole rows. If a tensor has only one sum, and its kernel rounds once, the sum is added directly to
the base; otherwise the delta of the tile is formed first, so that its parts do not round the base several times.
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

Sink = Callable[
    [int, Tensor], None
]  # (first flat element, contiguous 1-D tensor of the output dtype, valid during the call)


def merge_tensor(
    weight: Tensor,
    patches: Sequence[Patch],
    sink: Sink,
    *,
    out_dtype: torch.dtype,
    rounding: Rounding = NEAREST,
    name: str = "",
) -> Survival:
    """Send W + Σ w·ΔW, rounded once to `out_dtype`, to `sink`: the whole tensor, in tiles, in file order.

    `weight` has its stored shape and dtype, and is only read; vectors are added to it as a flat one. A tile is valid
    until `sink` returns. Untouched rows keep their bits. Threads may run in parallel, each on one tensor. Raises
    BaseMismatchError for a delta of another size, DtypeError for a base that is not floating point, ConflictError for
    two DoRA patches on the same rows, NonFiniteError, naming the tensor, if a finite value of the base overflows.
    """
    if not weight.is_floating_point():
        raise DtypeError(
            f"{name or 'The tensor'} is {str(weight.dtype).removeprefix('torch.')}, not floating point.",
            fix="Merge into the base model before quantization.",
        )
    if not weight.numel():
        return Survival()
    with one_thread(), torch.no_grad():
        return _Merge(weight, patches, out_dtype, rounding, name).run(sink)


class _TileBuffers:
    """Buffers for a tile of a given height. Created once: a view costs as much as a few thousand additions."""

    def __init__(self, height: int, columns: int, wide: torch.dtype, out: torch.dtype) -> None:
        numel = height * columns
        self.sums, self.delta = scratch("sums", numel, wide), scratch("delta", numel, wide)
        self.sum_rows, self.delta_rows = self.sums.view(height, columns), self.delta.view(height, columns)
        self.out = scratch("out", numel, out)


class _Merge:
    """The merge of one tensor."""

    def __init__(
        self, weight: Tensor, patches: Sequence[Patch], out_dtype: torch.dtype, rounding: Rounding, name: str
    ) -> None:
        self._base = weight.detach().reshape(-1)  # a view of the file
        flat = not weight.ndim or (patches and all(len(patch.delta.weight_shape) == 1 for patch in patches))
        self._height = len(self._base) if flat else len(weight)  # vectors are flat
        self._columns = len(self._base) // self._height
        self._out_dtype, self._name = out_dtype, name
        self._wide = torch.float64 if rounding.exact or weight.dtype == torch.float64 else torch.float32
        self._round = rounder(rounding, self._wide, out_dtype, name)
        self._additions = additions(patches, (self._height, self._columns), self._wide, name)
        self._segments = segments(self._additions, self._height, name)
        self._doras: dict[Addition, Dora] = {}
        self._buffers: dict[int, _TileBuffers] = {}
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
        """Return the flat output rows, ‖w·ΔW‖² (0 if known for the whole tensor), and the squared loss."""
        stored = self._base.narrow(0, rows.start * self._columns, len(rows) * self._columns)
        if not segment.parts:
            return self._untouched(stored), 0.0, 0.0
        if self._direct:
            return self._added_to_base(segment.parts[0], rows, stored)
        return self._added_as_a_whole(segment, rows, stored)

    def _untouched(self, stored: Tensor) -> Tensor:
        if stored.dtype == self._out_dtype:
            return stored
        buffers = self._buffers_for(stored.numel() // self._columns)
        self._round(buffers.sums.copy_(stored), buffers.out)
        self._check_finite(stored, buffers.out)
        return buffers.out

    def _added_to_base(self, part: PatchRows, rows: range, stored: Tensor) -> tuple[Tensor, float, float]:
        buffers = self._buffers_for(len(rows))
        buffers.sums.copy_(stored)
        part.add_to(buffers.sum_rows, rows.start)
        self._round(buffers.sums, buffers.out)
        lost = buffers.delta.copy_(buffers.out).sub_(buffers.sums)
        return buffers.out, 0.0, self._squared(lost, stored, buffers.out)

    def _added_as_a_whole(self, segment: Segment, rows: range, stored: Tensor) -> tuple[Tensor, float, float]:
        buffers = self._buffers_for(len(rows))
        buffers.sums.copy_(stored)
        self._form_delta(segment, rows, buffers)
        wanted = torch.dot(buffers.delta, buffers.delta).item()
        if self._out_dtype in WIDE:
            self._add_equals(buffers, stored)
        else:
            self._round(buffers.sums.add_(buffers.delta), buffers.out)
            buffers.delta.copy_(buffers.out).sub_(buffers.sums)
        return buffers.out, wanted, self._squared(buffers.delta, stored, buffers.out)

    def _form_delta(self, segment: Segment, rows: range, buffers: _TileBuffers) -> None:
        """Form Σ w·ΔW of these rows while `sums` is still the base. DoRA comes first, since it scales the buffer."""
        buffers.delta.zero_()
        for part in sorted(segment.parts, key=lambda p: p.addition not in self._doras):
            part.add_to(buffers.delta_rows, rows.start)
            if part.addition in self._doras:
                self._doras[part.addition].scale(buffers.delta_rows, buffers.sum_rows, part.row(rows.start))

    def _add_equals(self, buffers: _TileBuffers, stored: Tensor) -> None:
        """Add and measure the loss (W′ − W) − ΔW, nearly exact, if the stored dtype is as wide as the sums."""
        self._round(buffers.sums.add_(buffers.delta), buffers.out)
        base = scratch("base", stored.numel(), self._wide).copy_(stored)
        buffers.delta.sub_(buffers.sums.copy_(buffers.out).sub_(base))

    def _buffers_for(self, height: int) -> _TileBuffers:
        if height not in self._buffers:
            self._buffers[height] = _TileBuffers(height, self._columns, self._wide, self._out_dtype)
        return self._buffers[height]

    # ── errors ───────────────────────────────────────────────────────────────────────────────────

    def _squared(self, lost: Tensor, stored: Tensor, out: Tensor) -> float:
        """Return ‖lost‖²; if it is not finite, check the tile and sum over finite weights."""
        squared = torch.dot(lost, lost).item()
        if isfinite(squared):
            return squared
        finite = self._check_finite(stored, out)
        return lost[finite].double().square().sum().item()

    def _check_finite(self, stored: Tensor, out: Tensor) -> Tensor:
        """Return where the base is finite. Raises NonFiniteError if the result is not finite there."""
        finite = _is_finite(stored)
        broken = int((finite & ~_is_finite(out)).sum())
        if broken:
            raise NonFiniteError(
                f"{self._name or 'The tensor'} overflows: at least {broken} values exceed the range of "
                f"{str(self._out_dtype).removeprefix('torch.')}.",
                fix="Use a smaller strength, or a wider dtype (--out-dtype bf16 or fp32-touched).",
            )
        return finite

    # ── DoRA, the first pass ─────────────────────────────────────────────────────────────────────

    def _observed(self, addition: Addition) -> Dora:
        dora = Dora(addition, self._columns, self._wide)
        for part in parts_of(addition, self._height):
            for rows in _tiles(Segment(part.rows, (part,)), self._columns):
                stored = self._base.narrow(0, rows.start * self._columns, len(rows) * self._columns)
                buffers = self._buffers_for(len(rows))
                buffers.sums.copy_(stored)
                part.add_to(buffers.sum_rows, rows.start)
                dora.observe(buffers.sum_rows, part.row(rows.start))
        dora.finish()
        return dora


def _is_finite(numbers: Tensor) -> Tensor:
    return numbers.float().isfinite() if numbers.element_size() == 1 else numbers.isfinite()


def _tiles(segment: Segment, columns: int) -> Iterator[range]:
    """Yield the rows of a segment, about TILE numbers at a time: whole blocks of a sum, or equal shares of one."""
    step = max(1, TILE // columns)
    if segment.parts:
        block = segment.parts[0].addition.block
        step = step // block * block or -(-block // -(-block // step))
    for start in range(segment.rows.start, segment.rows.stop, step):
        yield range(start, min(start + step, segment.rows.stop))
