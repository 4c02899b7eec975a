"""Decode the tensors of one module into a Kronecker sum with the scale folded in.

Factors keep their stored dtype and low-rank products stay products; a factor with a scale folded in is at least
float32. `parsing.module_layout` has already checked every shape.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import isfinite

import torch
from torch import Tensor

from krona_hub.errors import NonFiniteError, ScaleError
from krona_hub.formats.parsing.module_layout import ModuleLayout
from krona_hub.kron.hadamard import Hadamard
from krona_hub.kron.terms import Factor, KronTerms, LowRank, as_lora, wide

Parts = Mapping[str, Tensor]


def decode(parts: Parts, layout: ModuleLayout, scale: float) -> KronTerms:
    """Decode scale · ΔW of a module as a sum of Kronecker products, a convolution flattened from dimension 1.

    Convolutions need no special case: kron(w1 (a, c, 1, 1), w2 (b, d, k, k)) flattened from dimension 1 is kron(w1, w2
    flattened from dimension 1), because the kernel is the innermost axis of both. Raises NonFiniteError for NaN or
    infinity in a tensor, ScaleError if scaling produces one.
    """
    for part, tensor in parts.items():
        if part != "alpha" and not is_finite(tensor):
            raise NonFiniteError(f"{part!r} contains NaN or infinity.", fix="Use an earlier checkpoint.")
    terms = DECODERS[layout.kind](parts)
    return terms if scale == 1 else _scaled(terms, scale, layout)


def is_finite(tensor: Tensor) -> bool:
    """Whether all elements are finite: NaN propagates through aminmax. One pass, many times faster than isfinite."""
    low, high = tensor.aminmax()
    return isfinite(low.item()) and isfinite(high.item())


def magnitude_of(parts: Parts) -> Tensor | None:
    """The DoRA magnitude, one number per row or column; None without one."""
    magnitude = parts.get("magnitude", parts.get("dora_scale"))
    return None if magnitude is None else magnitude.flatten()


def _scaled(terms: KronTerms, scale: float, layout: ModuleLayout) -> KronTerms:
    """Fold the scale in as LyCORIS does: into up of a LoRA, into w1 or w1_a of a LoKr or a LoHa."""
    if layout.kind in ("lora", "loha") and isinstance(terms.right, LowRank):
        scaled = KronTerms(terms.left, terms.right.map_up(lambda up: wide(up) * scale))
    else:
        scaled = terms.scaled(scale)
    if not all(is_finite(t) for t in scaled.tensors if t.dtype in (torch.float32, torch.float64)):
        raise ScaleError(
            f"A scale of {scale:g} makes the factors infinite.",
            fix="Check that alpha is the value the adapter was saved with.",
        )
    return scaled


def _lora(parts: Parts) -> KronTerms:
    up, down = parts["up"].flatten(1), parts["down"]
    if "mid" in parts:  # einsum('mn...,im,nj->ij...', mid, up, down), flattened into up · core
        return as_lora(up, _tucker(parts["mid"], down.flatten(1)))
    return as_lora(up, down.flatten(1))


def _tucker(core: Tensor, inner: Tensor) -> Tensor:
    """Σₙ core[m, n, k…] · inner[n, j] as a matrix (m, j·k…), in float32 at least."""
    flat = wide(core).reshape(*core.shape[:2], -1)  # (m, n, k·k…)
    return torch.einsum("mnk,nj->mjk", flat, wide(inner)).flatten(1)


def _lokr(parts: Parts) -> KronTerms:
    return KronTerms(_lokr_left(parts), _lokr_right(parts))


def _lokr_left(parts: Parts) -> Factor:
    if "w1" in parts:
        return parts["w1"].flatten(1)[None]
    return LowRank(parts["w1_a"].flatten(1)[None], parts["w1_b"].flatten(1)[None])


def _lokr_right(parts: Parts) -> Factor:
    if "w2" in parts:
        return parts["w2"].flatten(1)[None]
    return _product(parts, "w2_a", "w2_b", "t2")


def _product(parts: Parts, up: str, down: str, middle: str) -> LowRank:
    first, second = parts[up].flatten(1), parts[down].flatten(1)
    if middle in parts:  # here the first tensor is (r, b)
        return LowRank(first.mT.contiguous()[None], _tucker(parts[middle], second)[None])
    return LowRank(first[None], second[None])


def _loha(parts: Parts) -> KronTerms:
    both = Hadamard(*(_product(parts, f"w{i}_a", f"w{i}_b", f"t{i}") for i in (1, 2)))
    return KronTerms(torch.ones(1, 1, 1), both)


def _peft_conv1d(parts: Parts) -> KronTerms:
    """Σₖ w2[:, :, k] ⊗ (w1 ⊗ eₖ): torch.kron of a 2-D and a 3-D tensor, reshaped to (out, in, k)."""
    w2 = parts["w2"]  # (b, d, k)
    left = _lokr_left(parts)
    w1 = wide(left.dense() if isinstance(left, LowRank) else left)[0]  # (a, c)
    unit = torch.eye(w2.shape[2], dtype=w1.dtype)
    return KronTerms(w2.permute(2, 0, 1).contiguous(), torch.einsum("ac,kl->kacl", w1, unit).flatten(2))


def _cdka(parts: Parts) -> KronTerms:
    return KronTerms(parts["cdka_b"], parts["cdka_a"])


def _dense(parts: Parts) -> KronTerms:
    return _whole(parts["diff"])


def _value(parts: Parts) -> KronTerms:
    return _whole(parts["weight"])


def _whole(weight: Tensor) -> KronTerms:
    return KronTerms(torch.ones(1, 1, 1), weight.flatten(1)[None])


def _diffusekrona(parts: Parts) -> KronTerms:
    return KronTerms(parts["down"].flatten(1).mT.contiguous()[None], parts["up"].flatten(1)[None], rows="shuffled")


DECODERS: Mapping[str, Callable[[Parts], KronTerms]] = {
    "lora": _lora, "lokr": _lokr, "loha": _loha, "cdka": _cdka, "dense": _dense, "diffusekrona": _diffusekrona,
    "peft-conv1d": _peft_conv1d, "value": _value,
}  # fmt: skip
