"""LoRA → Kronecker: the nearest Kronecker sum of a LoRA, through its factors."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from krona_hub.kron.shapes import KronShape
from krona_hub.kron.terms import KronFit, nearest_kron


def nearest_kron_of_lora(up: Tensor, down: Tensor, shape: KronShape | tuple[int, int], terms: int = 1) -> KronFit:
    """The sum of `terms` Kronecker products nearest to up·down: up (out, r), down (r, in)."""
    return nearest_kron(up.double() @ down.double(), shape, terms)


def nearest_kron_of_loras(
    ups: Sequence[Tensor] | Tensor, downs: Sequence[Tensor] | Tensor, shape: KronShape | tuple[int, int], terms: int = 1
) -> list[KronFit]:
    """`nearest_kron_of_lora` of many layers of one size: ups (n, out, r), downs (n, r, in)."""
    return [nearest_kron_of_lora(u, d, shape, terms) for u, d in zip(ups, downs, strict=True)]
