"""Encode a LayerDelta as the tensors that a format stores for one module: exactly, or raise an error with the reason.

The inverse of `krona_hub.formats.reading.decode`. alpha is written equal to the rank, so that every reader scales by 1,
and the tensors of a product have one dtype, which AUTOMATIC1111 needs to multiply them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.errors import InexpressibleError, NonFiniteError
from krona_hub.formats.compatibility.applications import APPLICATIONS
from krona_hub.formats.compatibility.factorizations import why_not_form
from krona_hub.formats.compatibility.form_rules import keeps_product_for_lycoris
from krona_hub.formats.forms.delta_form import is_factored
from krona_hub.formats.forms.normal_forms import Lora, form_of, lora_of, term_of, without_hadamard
from krona_hub.formats.known.diffusekrona import DIFFUSEKRONA
from krona_hub.formats.known.format import Storage
from krona_hub.formats.known.native import KRONA
from krona_hub.formats.known.registry import storage_of
from krona_hub.kron.balance import balanced, loses_values
from krona_hub.kron.hadamard import Hadamard
from krona_hub.kron.terms import KronTerms, LowRank, as_lora, dense_factor, wide


def why_not(delta: LayerDelta, format_name: str, tool: str | None = None, *, layer: str = "") -> str | None:
    """Why a delta cannot be written exactly in a format (for an application), as a clause; None if it can.

    >>> why_not(LayerDelta((KronTerms(torch.ones(1, 2, 2), torch.ones(1, 4, 3)),), (8, 6)), "kohya-lora")
    'it is a Kronecker sum (2x2 ⊗ 4x3, 1 term), not a product up·down'
    """
    targets = [name for name in (tool, format_name) if name is not None]
    collected = None if _keeps_its_sums(format_name) else _as_one(delta)
    form = form_of(delta if collected is None else collected, layer)
    return next((why for name in targets if (why := why_not_form(form, name))), None)


def _keeps_its_sums(format_name: str) -> bool:
    """Whether sums are stored unchanged rather than first combined into one term: their rows may be shuffled."""
    return format_name in (KRONA.name, DIFFUSEKRONA.name)


def _as_one(delta: LayerDelta) -> LayerDelta:
    term = term_of(delta)
    return delta if term is None else replace(delta, sums=(term,))


def normalized(delta: LayerDelta, format_name: str, tool: str | None = None, *, layer: str = "") -> LayerDelta:
    """The same delta in the normal form of the format.

    Raises InexpressibleError if the format (or the application) cannot store it exactly.
    """
    why = why_not(delta, format_name, tool, layer=layer)
    if why:
        where = APPLICATIONS[tool].title if tool else format_name
        raise InexpressibleError(f"{layer or 'The layer'} cannot be written for {where}: {why}.", fix=_offer(delta))
    kind = storage_of(format_name).kind
    if kind == "any":
        return without_hadamard(delta)
    if format_name == DIFFUSEKRONA.name:
        return replace(delta, sums=tuple(_dense_factors(s) for s in delta.sums))
    if kind == "kronecker":
        one = _as_one(delta)
        return replace(one, sums=tuple(_stored(s, one, tool) for s in one.sums))
    if _is_one_pair(delta):
        return delta
    lora = lora_of(delta)
    sums = tuple(map(_whole, _as_one(delta).sums)) if lora is None else (as_lora(*lora),)
    return replace(delta, sums=sums)


def _is_one_pair(delta: LayerDelta) -> bool:
    """Return whether a delta is [[1]] ⊗ up·down already, as most LoRAs are."""
    if len(delta.sums) != 1:
        return False
    (s,) = delta.sums
    if s.rows != "kron" or not isinstance(s.right, LowRank) or isinstance(s.right, Hadamard):
        return False
    return isinstance(s.left, Tensor) and s.left.shape == (1, 1, 1) and float(s.left) == 1


def _offer(delta: LayerDelta) -> str:
    if delta.magnitude is not None:
        return "Merge it into the base weights, or convert it with --base to use its actual weight delta."
    return "Write it as a LoRA with --to lora (exact at full rank), or keep every term with --to krona."


def _stored(term: KronTerms, delta: LayerDelta, tool: str | None) -> KronTerms:
    """The term with factors as stored in the file: a product of small rank, or dense."""
    shape = term.shape
    kernel = form_of(delta).kernel if delta.weight_shape[1] % shape.a2 == 0 else 1
    left, right = term.left, term.right
    rules = () if tool is None else APPLICATIONS[tool].rules
    all_full = "runtime-lokr" in rules and len(delta.weight_shape) == 2
    dense_w1 = "dense-w1" in rules or "runtime-lokr" in rules
    dense_for_lycoris = tool == "lycoris" and not keeps_product_for_lycoris(form_of(delta))
    kept = isinstance(right, LowRank) and is_factored(right.rank, (shape.b1, shape.b2 // kernel))
    if isinstance(right, LowRank) and (dense_for_lycoris or all_full or not kept):
        right = right.dense()
    if isinstance(left, LowRank) and not (
        isinstance(right, LowRank)
        and right.rank == left.rank
        and is_factored(left.rank, (shape.a1, shape.a2))
        and not dense_w1
    ):
        left = left.dense()
    return replace(term, left=left, right=right)


def _dense_factors(s: KronTerms) -> KronTerms:
    return replace(s, left=dense_factor(s.left), right=dense_factor(s.right))


def _whole(term: KronTerms) -> KronTerms:
    """[[c]] ⊗ B as [[1]] ⊗ cB, with c = 1 unchanged: a full matrix is stored without A."""
    scale, right = wide(dense_factor(term.left)), dense_factor(term.right)
    return term if bool((scale == 1).all()) else KronTerms(torch.ones_like(scale), wide(right) * scale)


def cast(delta: LayerDelta, dtype: torch.dtype | None) -> LayerDelta:
    """Cast every tensor to `dtype` (None: no change), the last step before a delta is stored.

    Where factors have numbers out of the range of `dtype`, powers of two move between them first. A DoRA magnitude is
    never rounded: its rounding changes the whole weight, which is often more than the adapter itself does. Raises
    NonFiniteError if a number overflows all the same.
    """
    if dtype is None:
        return delta
    magnitude = delta.magnitude
    if magnitude is not None:
        magnitude = magnitude.to(torch.promote_types(magnitude.dtype, dtype))
    return replace(delta, sums=tuple(_cast_sum(s, dtype) for s in delta.sums), magnitude=magnitude)


def _cast_sum(s: KronTerms, dtype: torch.dtype) -> KronTerms:
    small = s.to(dtype)
    return balanced(s).map(lambda t: cast_tensor(t, dtype)) if loses_values(s, small) else small


def cast_tensor(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Cast one tensor (None: no change). Raises NonFiniteError if a number overflows."""
    if dtype is None:
        return tensor
    small = tensor.to(dtype)
    if not bool(torch.isfinite(small).all()):
        raise NonFiniteError(
            f"The value {float(tensor.abs().max()):.3g} overflows {str(dtype).removeprefix('torch.')}.",
            fix="Use --dtype float32 or bfloat16.",
        )
    return small


class Convention(NamedTuple):
    """What applications want differently in a LoKr."""

    full_alpha: float = 1.0  # alpha where both factors are full; only OneTrainer does not ignore it
    unit_alpha: bool = True  # whether rank 1 has an alpha, by which stable-diffusion.cpp scales wrongly
    flat_conv3d: bool = True  # w2 of a Conv3d as a matrix, which all loaders but LyCORIS and PEFT need


CONVENTION = Convention()


def tensors_of(delta: LayerDelta, format_name: str, convention: Convention = CONVENTION) -> dict[str, Tensor]:
    """Parameter name -> tensor of one module, for a delta returned by `normalized` for the same format."""
    storage = storage_of(format_name)
    parts = _magnitude(delta, storage)
    if format_name == DIFFUSEKRONA.name:
        return parts | _diffusekrona(delta.sums[0])
    if storage.kind == "kronecker":
        return parts | _lokr(delta, delta.sums[0], storage, convention)
    lora = lora_of(delta)
    return parts | (_dense(delta) if lora is None else _lora(delta, lora, storage, convention))


def _lora(delta: LayerDelta, lora: Lora, storage: Storage, convention: Convention) -> dict[str, Tensor]:
    up_key, down_key = storage.lora_keys
    rank, kernel = len(lora.down), delta.weight_shape[2:]
    up, down = _alike(lora.up, lora.down)
    up = up.reshape(-1, rank, *(1 for _ in kernel))
    down = down.reshape(rank, *delta.weight_shape[1:])
    return {up_key: up, down_key: down} | _alpha(rank, storage, convention)


def _alike(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Both tensors of a product in the wider of their dtypes: a scale that is folded into one of them widens it."""
    dtype = torch.promote_types(one.dtype, other.dtype)
    return one.to(dtype), other.to(dtype)


def _dense(delta: LayerDelta) -> dict[str, Tensor]:
    """A full matrix, the `.diff` of LyCORIS LoCon, of [[1]] ⊗ B."""
    return {"diff": dense_factor(delta.sums[0].right)[0].reshape(delta.weight_shape)}


def _lokr(delta: LayerDelta, term: KronTerms, storage: Storage, convention: Convention) -> dict[str, Tensor]:
    parts: dict[str, Tensor] = {}
    rank = convention.full_alpha
    if isinstance(term.left, LowRank):
        rank = term.left.rank
        parts["lokr_w1_a"], parts["lokr_w1_b"] = _alike(term.left.up[0], term.left.down[0])
    else:
        parts["lokr_w1"] = term.left[0]
    if isinstance(term.right, LowRank):
        rank = term.right.rank
        parts["lokr_w2_a"], parts["lokr_w2_b"] = _alike(term.right.up[0], term.right.down[0])
    else:
        parts["lokr_w2"] = _with_kernel(term.right[0], delta.weight_shape, term.shape.a2, convention)
    return parts | _alpha(rank, storage, convention)


def _with_kernel(w2: Tensor, weight_shape: tuple[int, ...], a2: int, convention: Convention) -> Tensor:
    """B as (b1, d, k…) if A splits only the channels; flat if A extends into the kernel (FORMATS.md §9)."""
    channels, kernel = weight_shape[1], weight_shape[2:]
    is_flat = bool(channels % a2) or (len(kernel) == 3 and convention.flat_conv3d)
    return w2 if is_flat else w2.reshape(len(w2), channels // a2, *kernel)


def _diffusekrona(term: KronTerms) -> dict[str, Tensor]:
    """up = B, down = Aᵀ in float32, the only dtype its loader supports."""
    a, b = dense_factor(term.left)[0], dense_factor(term.right)[0]  # `normalized` left no products
    return {"up.weight": b.float(), "down.weight": a.float().mT}


def _alpha(rank: float, storage: Storage, convention: Convention) -> dict[str, Tensor]:
    has_alpha = storage.alpha and (rank != 1 or convention.unit_alpha)
    return {"alpha": torch.tensor(float(rank))} if has_alpha else {}


def _magnitude(delta: LayerDelta, storage: Storage) -> dict[str, Tensor]:
    """The DoRA magnitude in the shape of its key: (out, 1, …) and (1, in, …), or PEFT's (out,) and (1, out, 1, 1)."""
    m, ndim = delta.magnitude, len(delta.weight_shape)
    if m is None:
        return {}
    if storage.magnitude_key == "lora_magnitude_vector":
        return {storage.magnitude_key: m if ndim == 2 else m.reshape(1, -1, *[1] * (ndim - 2))}
    ones = [1] * (ndim - 2)
    return {
        storage.magnitude_key: m.reshape(-1, 1, *ones) if delta.magnitude_axis == "out" else m.reshape(1, -1, *ones)
    }
