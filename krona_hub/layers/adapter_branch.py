"""The contribution of one adapter to one layer: its Kronecker sums, its strength, and its DoRA magnitude, if any."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from krona_hub.adapters.adapter import LayerDelta, dora_gain
from krona_hub.errors import UnknownBaseError
from krona_hub.layers.chain_step import Window, convolve
from krona_hub.layers.contraction import add_delta
from krona_hub.layers.factors import KronSum, essential, wide

Scale = Tensor | float
COMPUTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # types that products are computed in


class RowShare(NamedTuple):
    """A layer of an adapter that covers only some rows of a module, as q does in a fused q|k|v."""

    layer: str  # canonical name
    rows: tuple[int, int]  # first row, and one past the last
    sums: int  # number of sums of this layer, stored after those of the layers before it


class Branch(nn.Module):
    """scale · ΔW x of one adapter at one layer.

    The factors of a file are kept unchanged beside the tensors that compute, which follow the type of the model: they
    come back unrounded, whatever `pipe.to(dtype)` did in between. Trainable factors are parameters, at least float32.
    """

    strength: Tensor  # () the scale as a tensor, so that changing it does not recompile the graph
    excess: Tensor  # DoRA: m/‖W + D‖ - 1, in the shape that multiplies W; as a difference, it survives bfloat16

    def __init__(
        self,
        delta: LayerDelta,
        like: Tensor,
        *,
        window: Window | None = None,
        groups: int = 1,
        weight: Tensor | None = None,
        trainable: bool = False,
    ) -> None:
        """Create it on the device of `like`, and in its type unless trainable; only DoRA needs the base `weight`."""
        super().__init__()
        self.window, self.groups, self.axis = window, groups, delta.magnitude_axis
        self.weight_shape = delta.weight_shape
        self.layer: str | None = None  # canonical name, if known
        self.parts: tuple[RowShare, ...] = ()  # if diffusers fused several layers into this one
        self.stored = False  # whether it is part of the model's state_dict
        self.scale = 1.0
        self.source = None if trainable else delta
        self.sums = nn.ModuleList(KronSum(s, window, like, trainable) for s in delta.sums)
        self.register_buffer("strength", torch.ones((), device=like.device), persistent=False)
        if delta.magnitude is not None:
            self._set_magnitude(delta, like, weight, trainable)

    def _set_magnitude(self, delta: LayerDelta, like: Tensor, weight: Tensor | None, trainable: bool) -> None:
        if trainable and delta.magnitude is not None:
            kept = delta.magnitude.detach().to(like.device, wide(delta.magnitude), copy=True)
            self.magnitude = nn.Parameter(kept)
            return
        self.exact_excess = excess_of(delta, weight)
        self.register_buffer("excess", self.exact_excess.to(like), persistent=False)

    @property
    def is_dora(self) -> bool:
        return "magnitude" in self._parameters or "excess" in self._buffers

    @property
    def is_dense(self) -> bool:
        """Whether ΔW is formed in every pass: A splits the kernel, or the convolution has groups."""
        return self.groups > 1 or any(s.contraction is None for s in self.kron_sums)

    @property
    def kron_sums(self) -> Iterator[KronSum]:
        yield from (each for each in self.sums if isinstance(each, KronSum))

    @property
    def value(self) -> LayerDelta:
        """The delta at strength 1: the one from the file, or a copy of the factors trained so far."""
        if self.source is not None:
            return self.source
        magnitude = self.magnitude.detach().clone() if self.is_dora else None
        return LayerDelta(tuple(s.snapshot() for s in self.kron_sums), self.weight_shape, magnitude, self.axis)

    def set_scale(self, scale: float) -> None:
        self.scale = float(scale)
        self.strength.fill_(self.scale)

    def fits(self, delta: LayerDelta) -> bool:
        """Whether another delta has tensors of the same sizes, so that `take` accepts it."""
        own = self.value
        sizes = [[(s.rows, [(n, t.shape) for n, t in essential(s)]) for s in d.sums] for d in (own, delta)]
        norms = [(d.magnitude is None, d.magnitude_axis, d.weight_shape) for d in (own, delta)]
        return sizes[0] == sizes[1] and norms[0] == norms[1]

    def take(self, delta: LayerDelta, weight: Tensor | None) -> None:
        """Copy a delta of the same sizes into the existing tensors, so that no graph is recompiled."""
        for each, terms in zip(self.kron_sums, delta.sums, strict=True):
            each.copy_from(terms)
        if "magnitude" in self._parameters and delta.magnitude is not None:
            self.magnitude.data.copy_(delta.magnitude)
        if "excess" in self._buffers:
            self.exact_excess = excess_of(delta, weight)
            self.excess.copy_(self.exact_excess)
        if self.source is not None:
            self.source = delta

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Branch:
        """Move or cast; after a change of type, round again from the exact factors."""
        before = self._dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.source is not None and self._dtype not in (before, None):
            for each, terms in zip(self.kron_sums, self.source.sums, strict=True):
                each.copy_from(terms)
            if self.is_dora:
                self.excess.copy_(self.exact_excess)
        return self

    @property
    def _dtype(self) -> torch.dtype | None:
        return next((s.factors[0].dtype for s in self.kron_sums if not s.factors[0].is_meta), None)

    def add_to(self, out: Tensor, x: Tensor, in_place: bool) -> Tensor:
        """Return out + scale · ΔW x, in place if allowed. Not for DoRA."""
        if self.is_dense:
            return out + self._dense_delta(x, self.scale).to(out.dtype)
        for each in self.kron_sums:
            if each.contraction is not None:
                out = add_delta(out, x, each.contraction, each.factors, self.scale, in_place)
                in_place = True
        return out

    def delta(self, x: Tensor, scale: Scale = 1.0) -> Tensor:
        """Return scale · D x with D = Σ A ⊗ B, as plain differentiable products."""
        if self.is_dense:
            return self._dense_delta(x, scale)
        parts = [s.contraction.delta(x, s.factors, scale) for s in self.kron_sums if s.contraction is not None]
        return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]

    def dora_delta(
        self, out: Tensor, x: Tensor, call: Callable[[Tensor], Tensor], bias: Tensor | None, weight: Tensor | None
    ) -> Tensor:
        """Return (W′ - W) x with W′ = (W + D)·m/‖W + D‖, from the base's output `out` = W x + bias.

        Per output row, that is e·W x + (1 + e)·D x with e = m/‖W + D‖ - 1; per input column, x is weighted instead,
        and the base is called again.
        """
        excess = self._excess(weight).to(out.dtype)
        shift = 0.0 if bias is None else _along_channels(bias, x, self.window).to(out.dtype)
        if self.axis == "out":
            e = _along_channels(excess, x, self.window)
            return e * (out - shift) + (1 + e) * self.delta(x).to(out.dtype)
        weighted = _along_channels(excess.flatten().repeat(self.groups), x, self.window).to(x.dtype) * x
        return call(weighted) - shift + self.delta(x + weighted).to(out.dtype)

    def _excess(self, weight: Tensor | None) -> Tensor:
        """The excess from the file, or with the current norm, treated as a constant (DoRA, section 4.3)."""
        if "excess" in self._buffers:
            return self.excess
        with torch.no_grad():
            directed = _directed(self.value, weight)
        return dora_gain(directed, self.magnitude, self.axis) - 1

    def _dense_delta(self, x: Tensor, scale: Scale) -> Tensor:
        kernel = sum((s.value.dense() for s in self.kron_sums), torch.zeros((), device=x.device)) * scale
        return convolve(x, kernel.reshape(self.weight_shape).to(x.dtype), self.window, self.groups)


def excess_of(delta: LayerDelta, weight: Tensor | None) -> Tensor:
    """Compute m/‖W + D‖ - 1 of a DoRA delta, on the adapter's device. Raises UnknownBaseError without the weight."""
    directed = _directed(delta, weight)
    return dora_gain(directed, delta.tensors[-1].to(directed.dtype), delta.magnitude_axis) - 1


def _directed(delta: LayerDelta, weight: Tensor | None) -> Tensor:
    """W + D, in the shape of the weight."""
    if weight is None:
        raise UnknownBaseError(
            "A DoRA adapter needs the base weight, which this layer does not expose.",
            fix="Load the base without quantization, or convert the adapter to LoRA with its base weights.",
        )
    d = delta.low_rank_delta()
    return d + weight.detach().reshape(d.shape).to(d)


def _along_channels(vector: Tensor, x: Tensor, window: Window | None) -> Tensor:
    """Reshape a vector over channels to multiply rows (N, channels) or images (N, channels, …)."""
    return vector.flatten().reshape(-1, *(1,) * (x.dim() - 2)) if window else vector.flatten()
