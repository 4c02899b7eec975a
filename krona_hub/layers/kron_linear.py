"""KronLinear: a linear layer, or a module with the same interface, with Kronecker adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from krona_hub.errors import UnsupportedError
from krona_hub.layers.adapter_branch import Branch
from krona_hub.layers.factors import KronSum
from krona_hub.layers.kron_layer import DEFAULT, KronLayer, core

# Size of a weight up to which W + ΔW is formed in training on a CPU. The chain of products needs fewer multiply-adds at
# any size, but more and smaller products, whose overhead exceeds the savings in a small layer: at about this size, both
# cost the same (benchmarks/results/formed.json).
SMALL = 2**17


class KronLinear(KronLayer):
    """Linear layer with Kronecker adapters: y = base(x) + Σ scale · ΔW x, with x (…, in) and ΔW = Σₖ Aₖ ⊗ Bₖ.

    ΔW (out, in) is formed only to train a small layer on a CPU. Factors start as in DiffuseKronA (arXiv:2402.17412):
    A ~ N(0, 1/a1²), B = 0, so that the layer starts equal to its base.

    Parameters
    ----------
    linear : nn.Linear, or a module called like one, such as a quantized layer; left unfrozen
    shape : size (a1, a2) of A, to add trainable factors; a1 divides out, a2 divides in (default: none)
    terms : number of terms of ΔW (default: 1)
    name : name of the adapter (default: "default")
    features : (out, in) of a module without `out_features` and `in_features`

    Raises
    ------
    ShapeError
        `shape` does not divide the weight, or fewer terms are already exact.
    UnsupportedError
        The sizes of `linear` are unknown.

    Examples
    --------
    >>> import torch
    >>> layer = KronLinear(nn.Linear(768, 320), shape=(64, 4))
    >>> layer(torch.ones(2, 77, 768)).shape, layer.branch("default").value.parameters
    (torch.Size([2, 77, 320]), 1216)
    """

    def __init__(
        self,
        linear: nn.Module,
        shape: tuple[int, int] | None = None,
        terms: int = 1,
        *,
        name: str = DEFAULT,
        features: tuple[int, int] | None = None,
    ) -> None:
        """See KronLayer. Raises UnsupportedError if the sizes of the base are unknown."""
        super().__init__(linear, features or _features(linear), shape, terms, name=name)

    def _added(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if torch.compiler.is_compiling():
            out = self.base(x, *args, **kwargs)
            return self._traced_sum(_rows(out), _rows(x)).reshape(out.shape)
        ours = self._makes_new_output(nn.Linear)
        if ours and isinstance(self.base, nn.Linear) and (sums := self._sums_to_form(x, self.base)):
            return functional.linear(x, _formed(self.base.weight, sums), self.base.bias)
        # With more than two dimensions, a linear layer returns a view, and autograd copies the gradient of a view that
        # is written to.
        out = self.base(_rows(x) if ours else x, *args, **kwargs)
        return self._sum(_rows(out), x, ours).reshape(*x.shape[:-1], out.shape[-1])

    def _sums_to_form(self, x: Tensor, base: nn.Linear) -> list[tuple[KronSum, float]]:
        """Return the sums of W + ΔW with their scales, or none if the chain of products is better, or if the weight
        would be rounded to another type.
        """
        if not (torch.is_grad_enabled() and x.is_cpu and _is_small_and_frozen(base)):
            return []
        if torch.is_autocast_enabled("cpu") or any(branch.is_dora for _, branch in self.adapters()):
            return []
        sums = [(kron, branch.scale) for _, branch in self.adapters() if branch.scale for kron in branch.kron_sums]
        factors = [factor for kron, _ in sums for factor in kron.factors]
        alike = all(factor.dtype == x.dtype for factor in factors)
        return sums if alike and any(factor.requires_grad for factor in factors) else []

    def _dora(self, branch: Branch, out: Tensor, x: Tensor) -> Tensor:
        return super()._dora(branch, out, _rows(x))


def _rows(x: Tensor) -> Tensor:
    """(…, channels) → (N, channels)."""
    return x.reshape(-1, x.shape[-1])


def _features(linear: nn.Module) -> tuple[int, int]:
    out, in_ = (getattr(core(linear), name, None) for name in ("out_features", "in_features"))
    if not isinstance(out, int) or not isinstance(in_, int):
        raise UnsupportedError(
            f"A {type(linear).__name__} has no in_features and out_features.",
            fix="Specify features=(out, in).",
        )
    return out, in_


def _formed(weight: Tensor, sums: Sequence[tuple[KronSum, float]]) -> Tensor:
    """W + Σ scale · ΔW."""
    for kron, scale in sums:
        weight = torch.add(weight, kron.value.dense(), alpha=scale)
    return weight


def _is_small_and_frozen(linear: nn.Linear) -> bool:
    weight, bias = linear.weight, linear.bias
    frozen = not weight.requires_grad and (bias is None or not bias.requires_grad)
    return type(weight) is nn.Parameter and weight.numel() <= SMALL and frozen  # a subclass may be quantized
