"""Second moments of the layers of an adapter: what conversion needs to know about the data.

For every layer, ΔW = up·down (`krona_hub.kron.weighted.middle`), and the moments are those of its middle: of down·x for
the inputs x of the layer, and of upᵀ·g for the gradients g at its output. `krona_hub.calibration` gathers them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from torch import Tensor

from krona_hub.adapters.adapter import Adapter
from krona_hub.errors import IntegrityError


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """The second moments of one layer.

    Attributes
    ----------
    inputs : (r, r) float64 Tensor
        E[d dᵀ] with d = down·x, over samples and positions.
    outputs : (r, r) float64 Tensor
        Σ over positions of E[h hᵀ] with h = upᵀ·g, over samples; g is the gradient of a random projection of the
        output of the network at the output of the layer.
    """

    inputs: Tensor
    outputs: Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.inputs, self.outputs))


@dataclass(frozen=True, eq=False)
class Moments:
    """The moments of an adapter on a base model, with a record of how they were gathered."""

    layers: Mapping[str, LayerMoments]
    adapter: str  # `delta_digest` of the adapter
    record: Mapping[str, Any] = field(default_factory=dict)  # prompts, seed, samples, steps, …; JSON

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers.values())

    def check_adapter(self, adapter: Adapter) -> None:
        """Raise IntegrityError unless the moments are those of this adapter."""
        if self.adapter != delta_digest(adapter):
            raise IntegrityError(
                "The moments belong to another adapter, or to another version of it.",
                fix="Gather them again with krona calibrate.",
            )


def delta_digest(adapter: Adapter) -> str:
    """Return the sha256 of the deltas: names, shapes and values of all layers, whatever file they come from.

    Values are compared in float32, so that a file in another format that stores the same factors has the same digest.
    """
    digest = sha256()
    for name in sorted(adapter.layers):
        delta = adapter.layers[name]
        digest.update(f"{name} {tuple(delta.weight_shape)}\n".encode())
        for tensor in delta.tensors:
            digest.update(f"{tuple(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
