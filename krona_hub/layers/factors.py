"""One Kronecker sum inside a torch module: its factors as tensors that move with the model.

A 1×1 factor is multiplied into the other side, so that a LoRA, [[1]] ⊗ (up·down), costs no more than a LoRA.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor, nn

from krona_hub.kron.hadamard import expanded
from krona_hub.kron.terms import Factor, KronTerms, LowRank, Rows, dense_factor
from krona_hub.layers.chain import Sizes, cheaper_beside, cheapest_chain
from krona_hub.layers.chain_step import Window
from krona_hub.layers.contraction import Contraction


class KronSum(nn.Module):
    """Σ Aₖ ⊗ Bₖ of one layer, with trainable factors or the fixed factors of a file."""

    def __init__(self, terms: KronTerms, window: Window | None, like: Tensor, trainable: bool) -> None:
        """Create it on the device of `like`, and in its type unless trainable."""
        super().__init__()
        self.rows: Rows = terms.rows
        self.shape = terms.shape
        sides = essential(terms, None if trainable else like.dtype)
        self.names = tuple(name for name, _ in sides)
        for name, tensor in sides:
            if trainable:
                self.register_parameter(name, nn.Parameter(tensor.detach().to(like.device, wide(tensor), copy=True)))
            else:
                self.register_buffer(name, tensor.detach().to(like.device, like.dtype, copy=True), persistent=False)
        self.contraction = self._contraction(window)

    def _contraction(self, window: Window | None) -> Contraction | None:
        """The chain of products; None if the columns of a block of A would end inside a kernel of B."""
        kernel = prod(window.kernel) if window else 1
        lefts, rights = self._sizes("left"), self._sizes("right")
        if kernel > 1 and not rights:
            rights, lefts = lefts, []  # a single dense or low-rank matrix counts as B
        if kernel > 1 and rights[0][1] % kernel:
            return None
        first, *rest = rights or [(1, 1)]
        counted = [(first[0], first[1] // kernel), *rest] if rights else []
        chain = cheapest_chain(lefts, counted, self._terms, kernel)
        beside = cheaper_beside(chain, lefts, counted, kernel)
        return Contraction(chain, self.shape.a1, self.rows, window, beside)

    def _sizes(self, side: str) -> Sizes:
        return [(f.shape[1], f.shape[2]) for name, f in zip(self.names, self.factors, strict=True) if side in name]

    @property
    def _terms(self) -> int:
        return len(self.factors[0])

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors in the order of the chain: A before B, down before up."""
        return tuple(getattr(self, name) for name in self.names)

    @property
    def is_trained(self) -> bool:
        return any(factor.requires_grad for factor in self.factors)

    @property
    def value(self) -> KronTerms:
        """The sum, with ones for a side that `essential` dropped. It shares the module's tensors."""
        return KronTerms(self._side("left"), self._side("right"), self.rows)

    def snapshot(self) -> KronTerms:
        """Copy the sum, so that further training does not change it."""
        return self.value.map(lambda factor: factor.detach().clone())

    def _side(self, side: str) -> Factor:
        if side in self.names:
            return self.factors[self.names.index(side)]
        if f"{side}_up" in self.names:
            down = self.names.index(f"{side}_down")
            return LowRank(self.factors[down + 1], self.factors[down])
        return torch.ones(self._terms, 1, 1, dtype=wide(self.factors[0]), device=self.factors[0].device)

    @torch.no_grad()
    def copy_from(self, terms: KronTerms) -> None:
        """Copy terms of the same sizes into the existing tensors."""
        for name, tensor in essential(terms, self.factors[0].dtype):
            getattr(self, name).copy_(tensor)


def wide(tensor: Tensor) -> torch.dtype:
    """Return the type for training, at least float32."""
    return torch.promote_types(tensor.dtype, torch.float32)


def essential(terms: KronTerms, dtype: torch.dtype | None = None) -> list[tuple[str, Tensor]]:
    """Return (name, tensor) of the factors in chain order, without a side of size 1×1.

    An elementwise product becomes a low-rank product or a matrix.

    For float16, the factors are scaled to equal magnitudes: ΔW is the same, and nothing underflows.
    """
    terms, one = expanded(terms), (1, 1)
    left, right = terms.left, terms.right
    if terms.shape[:2] == one:
        named = _named("right", _absorbed(right, left))
    elif terms.shape[2:] == one:
        named = _named("left", _absorbed(left, right))
    else:
        named = _named("left", left) + _named("right", right)
    return _balanced(named) if dtype == torch.float16 else named


def _absorbed(factor: Factor, scalars: Factor) -> Factor:
    """Return Σₖ sₖ Mₖ as one term: dense matrices are added, low-rank ones concatenated."""
    numbers = dense_factor(scalars)
    if isinstance(factor, LowRank):
        up = factor.up.to(wide(factor.up)) * numbers
        return LowRank(torch.cat(list(up), 1)[None], factor.down.flatten(0, 1)[None])
    return (factor.to(wide(factor)) * numbers).sum(0, keepdim=True)


def _named(side: str, factor: Factor) -> list[tuple[str, Tensor]]:
    if isinstance(factor, LowRank):
        return [(f"{side}_down", factor.down), (f"{side}_up", factor.up)]
    return [(side, factor)]


def _balanced(named: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    sizes = [float(t.abs().max()) for _, t in named]
    if not all(sizes):
        return named
    mean = prod(sizes) ** (1 / len(sizes))
    return [(name, t.float() * (mean / size)) for (name, t), size in zip(named, sizes, strict=True)]
