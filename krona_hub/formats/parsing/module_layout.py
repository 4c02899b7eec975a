"""Derive the layout of one module's delta from the shapes of its tensors, and check those shapes. Torch-free.

`krona inspect` and the readers share these layouts, and the decoder relies on their checks.

    ΔW = Σₖ Aₖ ⊗ Bₖ     A: (a1, a2)   B: (b1, b2)   out = a1·b1   in·k… = a2·b2
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from krona_hub.checkpoints.header import READABLE, TensorInfo
from krona_hub.errors import AmbiguousError, DtypeError, IncompleteError, ShapeError, UnsupportedError
from krona_hub.formats.parsing.keys import ModuleTensors
from krona_hub.kron.shapes import KronShape

Size = tuple[int, ...]
Sizes = Mapping[str, Size]  # part -> shape of its tensor
MAX_KERNEL = 1024  # largest kernel of a Conv1d; the unit vectors eₖ take k² entries
_AGAIN = "Save the adapter again with the application that trained it."


@dataclass(frozen=True)
class ModuleLayout:
    """Kronecker shape, ranks and row order of a module's delta; for a LoHa those of the equal LoRA."""

    kind: str  # a key of KINDS
    shape: KronShape
    weight_shape: Size  # as implied by the tensors: a flattened convolution looks linear
    terms: int = 1
    left_rank: int | None = None  # rank of A = up·down; None: A is dense
    right_rank: int | None = None  # rank of B = up·down; None: B is dense
    rows: Literal["kron", "shuffled"] = "kron"
    rank: int | None = None  # r in alpha / r; None if alpha has no effect
    dora: Literal["out", "in"] | None = None


def layout_of(group: ModuleTensors, tensors: Mapping[str, TensorInfo], kind: str | None = None) -> ModuleLayout:
    """Derive the layout of a module; `kind` (a key of KINDS) overrides the kind that its keys imply.

    Raises IncompleteError, ShapeError, DtypeError or AmbiguousError; the caller adds the module name.
    """
    infos = {part: tensors[key] for part, key in group.parts.items()}
    for part, info in infos.items():
        _check_dtype(part, info)
    sizes = {part: info.shape for part, info in infos.items()}
    _check(prod(sizes.get("alpha", ())) == 1, f"'alpha' must be a single number, not {list(sizes.get('alpha', ()))}.")
    layout = KINDS[kind or group.kind](sizes)
    return replace(layout, dora=_dora_axis(sizes, layout.weight_shape))


def _check_dtype(part: str, info: TensorInfo) -> None:
    if info.dtype not in READABLE:
        raise DtypeError(
            f"Unsupported dtype {info.dtype} of {part!r}; supported are F64, F32, F16, BF16 and unscaled fp8.",
            fix="Use the original file; a quantized adapter cannot be read exactly.",
        )
    if info.numel == 0:
        raise ShapeError(f"Tensor {part!r} is empty: {list(info.shape)}.", fix=_AGAIN)


def _need(sizes: Sizes, *parts: str) -> tuple[Size, ...]:
    missing = [part for part in parts if part not in sizes]
    if missing:
        have = ", ".join(sorted(sizes))
        raise IncompleteError(f"Missing {' and '.join(map(repr, missing))} (found: {have}).", fix=_AGAIN)
    return tuple(sizes[part] for part in parts)


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ShapeError(message, fix=_AGAIN)


def _matrix(part: str, size: Size) -> tuple[int, int]:
    """(rows, columns) of a tensor that must be a matrix; trailing dimensions of size 1 are allowed."""
    _check(len(size) >= 2 and prod(size[2:]) == 1, f"{part!r} must be a matrix, not {list(size)}.")
    return size[0], size[1]


def _lora(sizes: Sizes) -> ModuleLayout:
    """down (r, in[, k…]), up (out, r); with mid (m, n, k…): down (n, in), up (out, m)."""
    down, up = _need(sizes, "down", "up")
    out, rank = _matrix("up", up)
    _check(len(down) >= 2, f"'down' must be a matrix or a kernel, not {list(down)}.")
    if "mid" in sizes:
        return _lora_tucker(sizes["mid"], _matrix("down", down), (out, rank))
    if len(down) > 2 and down[0] > rank and down[0] % rank == 0 and out % (down[0] // rank) == 0:
        raise _grouped(down[0] // rank)
    _check(down[0] == rank, f"'up' {list(up)} and 'down' {list(down)} have different ranks: {rank} and {down[0]}.")
    return ModuleLayout("lora", KronShape(1, 1, out, prod(down[1:])), (out, *down[1:]), right_rank=rank, rank=rank)


def _grouped(groups: int) -> UnsupportedError:
    """PEFT computes down without groups: each output depends on all inputs, which the grouped weight cannot hold."""
    return UnsupportedError(
        f"This is a PEFT LoRA of a convolution with {groups} groups, which cannot be added to the grouped weight.",
        fix="Train without this layer; PEFT can apply the LoRA at run time, but cannot merge it either.",
    )


def _lora_tucker(mid: Size, down: tuple[int, int], up: tuple[int, int]) -> ModuleLayout:
    (n, in_), (out, m) = down, up
    _check(len(mid) >= 2 and mid[:2] == (m, n), f"'mid' {list(mid)} does not fit 'up' {list(up)}, 'down' {list(down)}.")
    weight = (out, in_, *mid[2:])
    return ModuleLayout("lora", KronShape(1, 1, out, prod(weight[1:])), weight, right_rank=m, rank=n)


def _lokr(sizes: Sizes) -> ModuleLayout:
    """w1 (a, c) or w1_a·w1_b; w2 (b, d[, k…]) or w2_a·w2_b, or a Tucker core t2 with w2_a (r, b)."""
    (a, c), left = _lokr_left(sizes)
    (b, *rest), right = _lokr_right(sizes)
    weight = (a * b, c * rest[0], *rest[1:])
    shape = KronShape(a, c, b, prod(rest))
    rank = sizes["w2_b"][0] if right else left
    return ModuleLayout("lokr", shape, weight, left_rank=left, right_rank=right, rank=rank)


def _lokr_left(sizes: Sizes) -> tuple[tuple[int, int], int | None]:
    if "w1" in sizes:
        _only("w1", sizes, "w1_a", "w1_b")
        return _matrix("w1", sizes["w1"]), None
    if "w1_a" not in sizes and "w1_b" not in sizes:
        _need(sizes, "w1")
    first, second = _need(sizes, "w1_a", "w1_b")
    (a, r1), (r2, c) = _matrix("w1_a", first), _matrix("w1_b", second)
    _check(r1 == r2, f"'w1_a' {list(first)} and 'w1_b' {list(second)} have different ranks.")
    return (a, c), r1


def _lokr_right(sizes: Sizes) -> tuple[Size, int | None]:
    """(b, d, k…) and the rank."""
    if "w2" in sizes:
        _only("w2", sizes, "w2_a", "w2_b", "t2")
        _check(len(sizes["w2"]) >= 2, f"'w2' must be a matrix or a kernel, not {list(sizes['w2'])}.")
        return sizes["w2"], None
    if "w2_a" not in sizes and "w2_b" not in sizes:
        _need(sizes, "w2")
    return _product(sizes, "w2_a", "w2_b", "t2")


def _product(sizes: Sizes, up: str, down: str, middle: str) -> tuple[Size, int]:
    """(b, d, k…) and the rank of up (b, r) · down (r, d, k…), or of a Tucker core (r, n, k…) with (r, b) and (n, d)."""
    first, second = _need(sizes, up, down)
    if middle in sizes:
        (r1, b), (r2, d), core = _matrix(up, first), _matrix(down, second), sizes[middle]
        fits = len(core) >= 2 and core[:2] == (r1, r2)
        _check(fits, f"{middle!r} {list(core)} does not fit {up!r} {list(first)} and {down!r} {list(second)}.")
        return (b, d, *core[2:]), r1
    _check(len(second) >= 2, f"{down!r} must be a matrix or a kernel, not {list(second)}.")
    b, rank = _matrix(up, first)
    _check(rank == second[0], f"{up!r} {list(first)} and {down!r} {list(second)} have different ranks.")
    return (b, *second[1:]), rank


def _only(whole: str, sizes: Sizes, *products: str) -> None:
    both = [part for part in products if part in sizes]
    if both:
        raise IncompleteError(f"{whole!r} is stored both dense and as {' and '.join(both)}.", fix=_AGAIN)


def _loha(sizes: Sizes) -> ModuleLayout:
    """(w1_a·w1_b) ∘ (w2_a·w2_b), each w·_b flat or a kernel, or with Tucker cores t1 and t2: a LoRA of rank r²."""
    _need(sizes, "w1_a", "w1_b", "w2_a", "w2_b", *(("t1", "t2") if "t1" in sizes or "t2" in sizes else ()))
    (first, r1), (second, r2) = (_product(sizes, f"w{i}_a", f"w{i}_b", f"t{i}") for i in (1, 2))
    _check(first == second, f"The two products are {list(first)} and {list(second)}, but must have one shape.")
    _check(r1 == r2, f"'w1_a' {list(sizes['w1_a'])} and 'w2_a' {list(sizes['w2_a'])} have different ranks.")
    out, in_ = first[0], prod(first[1:])
    shape, rank = KronShape(1, 1, out, in_), min(r1 * r2, out, in_)
    return ModuleLayout("loha", shape, first, right_rank=rank, rank=sizes["w1_b"][0])


def _cdka(sizes: Sizes) -> ModuleLayout:
    """cdka_b (r, out/r1, r2) ⊗ cdka_a (r, r1, in/r2), summed over r (FORMATS §9)."""
    right, left = _need(sizes, "cdka_a", "cdka_b")
    fits = len(left) == len(right) == 3 and left[0] == right[0]
    _check(fits, f"'cdka_b' {list(left)} and 'cdka_a' {list(right)} must be 3-D with equal first dimensions.")
    shape = KronShape(left[1], left[2], right[1], right[2])
    return ModuleLayout("cdka", shape, shape.full, terms=left[0], rank=left[0] * left[2])


def _dense(sizes: Sizes) -> ModuleLayout:
    (whole,) = _need(sizes, "diff")
    _check(len(whole) >= 2, f"'diff' must have at least two dimensions, not {list(whole)}.")
    return ModuleLayout("dense", KronShape(1, 1, whole[0], prod(whole[1:])), whole)


def _value(sizes: Sizes) -> ModuleLayout:
    """A new weight, from which the weight of the base model is subtracted."""
    return replace(_dense({"diff": _need(sizes, "weight")[0]}), kind="value")


def _diffusekrona(sizes: Sizes) -> ModuleLayout:
    """down (a2, a1) and up (b1, b2): the rows of downᵀ ⊗ up, interleaved (FORMATS §8)."""
    down, up = _need(sizes, "down", "up")
    (a2, a1), (b1, b2) = _matrix("down", down), _matrix("up", up)
    shape = KronShape(a1, a2, b1, b2)
    return ModuleLayout("diffusekrona", shape, shape.full, rows="shuffled")


def _peft_lokr(sizes: Sizes) -> ModuleLayout:
    """As LyCORIS, but a Conv1d with a dense w2 means Σₖ w2[:, :, k] ⊗ (w1 ⊗ eₖ): PEFT does not align the axes."""
    layout = _lokr(sizes)
    if "w2" not in sizes or len(sizes["w2"]) != 3:
        return layout
    (a, c, _, _), (b, d, k) = layout.shape, sizes["w2"]
    _check(k <= MAX_KERNEL, f"'w2' {list(sizes['w2'])} has a kernel of {k}; at most {MAX_KERNEL} is supported.")
    return replace(layout, kind="peft-conv1d", shape=KronShape(b, d, a, c * k), terms=k, left_rank=None)


KINDS: Mapping[str, Callable[[Sizes], ModuleLayout]] = {
    "lora": _lora, "lokr": _lokr, "loha": _loha, "cdka": _cdka, "dense": _dense, "diffusekrona": _diffusekrona,
    "peft-lokr": _peft_lokr, "value": _value,
}  # fmt: skip


def _dora_axis(sizes: Sizes, weight: Size) -> Literal["out", "in"] | None:
    """The axis of the DoRA magnitude, from the name of its key, else from its shape (FORMATS §1.3)."""
    if "magnitude" in sizes and "dora_scale" in sizes:
        raise AmbiguousError("The module has both 'dora_scale' and 'lora_magnitude_vector'.", fix=_AGAIN)
    if "magnitude" in sizes:
        _check(prod(sizes["magnitude"]) == weight[0], _misfit("lora_magnitude_vector", sizes["magnitude"], weight))
        return "out"
    return _axis_of_scale(sizes["dora_scale"], weight) if "dora_scale" in sizes else None


def _axis_of_scale(size: Size, weight: Size) -> Literal["out", "in"]:
    if prod(size) == 1 and len(size) > 1 and 1 in (weight[0], prod(weight[1:])):
        return "out" if weight[0] == 1 else "in"  # the other axis has more numbers, or both are the same
    if prod(size) == 1 or len(size) < 2:
        raise AmbiguousError(
            f"Ambiguous 'dora_scale' {list(size)}: per output or per input.",
            fix="Save the adapter again with its trainer; the shape must be (out, 1) or (1, in).",
        )
    axis: Literal["out", "in"] = "out" if prod(size[1:]) == 1 else "in"
    wanted = weight[0] if axis == "out" else size[1]  # a flattened kernel hides `in`; the base model decides later
    _check(prod(size) == wanted, _misfit("dora_scale", size, weight))
    return axis


def _misfit(part: str, size: Size, weight: Size) -> str:
    return f"{part!r} {list(size)} does not fit a weight of shape {list(weight)}."
