"""A stored tensor with its patches, tile by tile: added in float32, rounded once, handed on in file order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor

from krona_hub.errors import ConflictError, NonFiniteError
from krona_hub.merging.patches import Patch
from krona_hub.merging.rounding import NEAREST, Rounding, Survival

Sink = Callable[[int, Tensor], None]  # first flat element, 1-D contiguous numbers of the output type; used at once

TILE = 1 << 17  # elements


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

    `weight` has the shape and type that it is stored in. A tile is valid until `sink` returns. Raises ConflictError
    for two DoRA patches on the same rows, NonFiniteError naming the tensor where the sum overflows `out_dtype`.
    """
    wide = torch.float64 if rounding.exact or weight.dtype == torch.float64 else torch.float32
    base = weight.to(wide).reshape(len(weight), -1)
    delta, touched = torch.zeros_like(base), torch.zeros(len(base), dtype=torch.bool)
    dora = torch.zeros(len(base), dtype=torch.bool)
    for patch in patches:
        start, stop = patch.placement.rows or (0, len(base))
        if not patch.weight:
            continue
        if patch.delta.magnitude is not None:
            if bool(dora[start:stop].any()):
                raise ConflictError(f"{name} gets two DoRA adapters.", fix="Merge one after the other.")
            dora[start:stop] = True
        delta[start:stop] += _stored_delta(patch, base[start:stop]).to(wide)
        touched[start:stop] = True
    summed = torch.where(touched[:, None], base + delta, base)
    out = weight.reshape(base.shape).to(out_dtype).clone()
    out[touched] = summed[touched].to(out_dtype)
    if bool((~out.float().isfinite() & base.isfinite()).any()):
        raise NonFiniteError(f"{name} overflows {out_dtype}.", fix="Use a smaller weight, or --out-dtype fp32-touched.")
    for first in range(0, out.numel(), TILE):
        sink(first, out.reshape(-1)[first : first + TILE])
    lost = ((out.to(wide) - base) - delta)[touched]
    return Survival(float(delta.square().sum()), float(lost.square().sum()))


def _stored_delta(patch: Patch, part: Tensor) -> Tensor:
    """w·ΔW as the file lays it out."""
    place, shape = patch.placement, patch.delta.weight_shape
    base = part.mT if place.transpose else part
    halves = torch.cat(base.chunk(2)[::-1]) if place.swap_halves else base
    delta = patch.delta.dense(halves.reshape(shape)).reshape(shape[0], prod(shape[1:])) * patch.weight
    back = torch.cat(delta.chunk(2)[::-1]) if place.swap_halves else delta
    return back.mT if place.transpose else back
