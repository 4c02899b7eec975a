"""Gather the second moments of the middle of every layer, in one pass forward and backward over recorded calls.

d = down·x is computed where a layer is entered and h = upᵀ·g where the gradient of its output arrives, so that no
matrix larger than r×r is kept. The gradient is that of ⟨v, output⟩ with v ~ N(0, 1), so that E[g gᵀ] = E[Jᵀ J] for the
Jacobian J of the network's output. Independent samples, positions, d and h are assumed, as in K-FAC (Martens & Grosse,
2015).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.adapters.moments import LayerMoments
from krona_hub.calibration.denoiser_calls import DenoiserCall, RepeatedCall, outputs_of
from krona_hub.errors import NonFiniteError, UnsupportedError, abbreviated
from krona_hub.kron.weighted.middle import middle_of
from krona_hub.layers.kron_layer import core
from krona_hub.layers.module_tree import Slot, parts_of, slots_of, unwrapped
from krona_hub.pipelines.randomness import generator

PROJECTIONS = 2  # of every output: with one, chance decides between ranks (0.72 to 0.82 of the effect at 1/16)
CONVOLUTIONS = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}


@dataclass
class _LayerSums:
    """Running sums of the moments of one layer."""

    slot: Slot
    up: Tensor  # (out, r)
    down: Tensor  # (r, in·k…)
    kernel: tuple[int, ...]  # () for a linear layer
    inputs: Tensor = field(init=False)  # (r, r) float64
    outputs: Tensor = field(init=False)
    positions: int = 0

    def __post_init__(self) -> None:
        rank = self.up.shape[1]
        self.inputs, self.outputs = (torch.zeros(rank, rank, dtype=torch.float64) for _ in range(2))

    def square(self, x: Tensor) -> tuple[Tensor, int]:
        """Return the sum of d dᵀ with d = down·x over the positions of the inputs x of the layer, and their number."""
        d = self._middle(x.detach().float())
        return (d.mT @ d).double().cpu(), len(d)

    def see(self, square: tuple[Tensor, int]) -> None:
        """Add the second moment of the middle."""
        self.inputs += square[0]
        self.positions += square[1]

    def feel(self, g: Tensor) -> None:
        """Add the second moment of upᵀ·g for the gradients g at the output of the layer."""
        rows = self._rows(g.detach().float())
        if self.slot.rows is not None:
            rows = rows[:, self.slot.rows[0] : self.slot.rows[1]]
        h = rows @ self.up.to(rows)
        self.outputs += (h.mT @ h).double().cpu()

    def _middle(self, x: Tensor) -> Tensor:
        """Return d for every sample and position, (n, r)."""
        if not self.kernel:
            return x.reshape(-1, x.shape[-1]) @ self.down.mT.to(x)
        module: Any = core(unwrapped(self.slot.module))
        kernel = self.down.to(x).reshape(len(self.down), -1, *self.kernel)
        out = CONVOLUTIONS[len(self.kernel)](x, kernel, None, module.stride, module.padding, module.dilation)
        return self._rows(out)

    def _rows(self, y: Tensor) -> Tensor:
        """Return outputs (n, …, out), or (n, out, …) of a convolution, as (positions, out)."""
        return (y.movedim(1, -1) if self.kernel else y).reshape(-1, y.shape[1 if self.kernel else -1])

    def moments(self, projections: int) -> LayerMoments:
        return LayerMoments(self.inputs / max(1, self.positions), self.outputs / max(1, projections))


class MomentGatherer:
    """Adds up the moments of every layer of an adapter that is attached to the pipeline, call by call.

    Parameters
    ----------
    how : pipeline, device and dtype
    adapter : the adapter, whose layers must be in the pipeline
    seed : of the random projections
    """

    def __init__(self, how: RepeatedCall, adapter: Adapter, seed: int) -> None:
        slots = slots_of(parts_of(how.pipe, adapter.components))
        self.how, self.seed, self.samples = how, seed, 0
        self.sums = {name: _sums(slots[name], delta, how) for name, delta in adapter.layers.items()}

    def add(self, calls: Sequence[DenoiserCall], number: int) -> None:
        """Add calls of one prompt, with the projections of that number.

        Raises NonFiniteError if an output is NaN or infinite.
        """
        source = generator(self.seed, "calibrate projection", number)
        with _observed(self.how, self.sums):
            outputs = outputs_of(self.how, calls)
            if not all(bool(y.isfinite().all()) for y in outputs):
                raise NonFiniteError(
                    "The output of the base model with the adapter is NaN or infinite.",
                    fix="Use --dtype float32 or bfloat16, or check the adapter.",
                )
            for left in reversed(range(PROJECTIONS)):
                projected = torch.stack([(y.float() * _normal(y, source)).sum() for y in outputs]).sum()
                projected.backward(retain_graph=left > 0)  # type: ignore[no-untyped-call]
        self.samples += len(calls)

    def moments(self) -> dict[str, LayerMoments]:
        """Return the moments of what was added so far. Raises NonFiniteError if a gradient overflowed."""
        found = {name: layer.moments(self.samples * PROJECTIONS) for name, layer in self.sums.items()}
        broken = [
            n for n, own in found.items() if not bool(own.inputs.isfinite().all() and own.outputs.isfinite().all())
        ]
        if broken:
            raise NonFiniteError(
                f"The moments of {len(broken)} layers are NaN or infinite ({abbreviated(broken)}).",
                fix="Use --dtype bfloat16 or float32: gradients in float16 can overflow.",
            )
        return found

    @property
    def state(self) -> dict[str, Tensor]:
        """The sums, which `restore` takes."""
        sums = {f"{n}.{part}": getattr(layer, part) for n, layer in self.sums.items() for part in ("inputs", "outputs")}
        positions = {f"{n}.positions": torch.tensor([layer.positions]) for n, layer in self.sums.items()}
        return {**sums, **positions, "samples": torch.tensor([self.samples])}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from sums of an interrupted run of the same adapter."""
        self.samples = int(state["samples"])
        for name, layer in self.sums.items():
            layer.inputs, layer.outputs = state[f"{name}.inputs"].clone(), state[f"{name}.outputs"].clone()
            layer.positions = int(state[f"{name}.positions"])


def _normal(y: Tensor, source: torch.Generator) -> Tensor:
    return torch.randn(y.shape, generator=source).to(y.device)


def _sums(slot: Slot, delta: LayerDelta, how: RepeatedCall) -> _LayerSums:
    module: Any = core(unwrapped(slot.module))
    if getattr(module, "groups", 1) != 1:
        raise UnsupportedError(
            "Convolutions with groups cannot be calibrated.", fix="Convert without --calibrate, or leave the layer out."
        )
    up, down = middle_of(delta.sums, delta.matrix_shape)
    kernel = tuple(delta.weight_shape[2:])
    return _LayerSums(slot, up.float().to(how.device), down.float().to(how.device), kernel)


@contextmanager
def _observed(how: RepeatedCall, sums: Mapping[str, _LayerSums]) -> Iterator[None]:
    """Observe inputs and gradients of the layers within the block; nothing in the pipeline is trained."""
    models = [part for part in how.pipe.components.values() if isinstance(part, nn.Module)]
    trained = [p for model in models for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    by_module: dict[int, list[_LayerSums]] = {}
    for layer in sums.values():  # a fused projection holds several layers
        by_module.setdefault(id(layer.slot.module), []).append(layer)
    handles = [layers[0].slot.module.register_forward_hook(_hook(layers)) for layers in by_module.values()]
    try:
        with torch.enable_grad():
            yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)


def _hook(layers: Sequence[_LayerSums]) -> Any:
    def after(_module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        squares = [layer.square(args[0]) for layer in layers]
        if not out.requires_grad:  # no parameter is trained, so that gradients begin at the first layers
            out = out.detach().requires_grad_().clone()

        def arrived(gradient: Tensor) -> None:
            """Add the moments, those of the inputs once: outputs that nothing depends on, such as an unused encoding of
            the empty prompt, do not count."""
            for layer, square in zip(layers, squares, strict=False):
                layer.see(square)
            squares.clear()
            for layer in layers:
                layer.feel(gradient)

        out.register_hook(arrived)  # type: ignore[no-untyped-call]
        return out

    return after
