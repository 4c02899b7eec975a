"""Map layers of an adapter to modules of a file: reorder, transpose, or fuse q, k and v that share one weight.

FORMATS.md §13: LoRAs always fuse exactly (stacked downs, block-sparse up). Kronecker sums fuse into one term if their
right factors are multiples of one another, or if they are the rows of one term, as after reading a fused module.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.bases.module_spec import Placement
from krona_hub.errors import InexpressibleError
from krona_hub.formats.forms.normal_forms import Lora, lora_of, multiples, term_of
from krona_hub.formats.writing.split_modules import check_equal
from krona_hub.kron.norms import norm
from krona_hub.kron.row_stack import as_single_term
from krona_hub.kron.terms import KronTerms, LowRank, as_lora, dense_factor, transpose_factor

Part = tuple[Placement, LayerDelta]


def fused(module: str, parts: Sequence[Part], placements: Sequence[Placement]) -> LayerDelta:
    """The delta of a module that consists of `placements`, of which `parts` are adapted; blocks in row order.

    Raises InexpressibleError for Kronecker terms that do not fuse into a single term, and for layers that share the
    module but differ.
    """
    if placements[0].shared_with:
        check_equal(module, parts)
        return _in_stored_order(module, *parts[0])
    stored = [(p, _in_stored_order(module, p, delta)) for p, delta in parts]
    ordered = sorted(stored, key=lambda part: part[0].rows or (0, 0))
    if len(placements) == 1 and placements[0].rows is None:
        return ordered[0][1]
    height = max(p.rows[1] for p in placements if p.rows)
    shape = (height, *ordered[0][1].weight_shape[1:])
    magnitude = _magnitudes(module, ordered, len(placements))
    lora = _fused_lora(ordered, height)
    return LayerDelta((_fused_term(module, ordered, height) if lora is None else lora,), shape, magnitude)


def _fused_lora(parts: Sequence[Part], height: int) -> KronTerms | None:
    """The parts as one LoRA; None if one of them is not a LoRA."""
    pairs = [lora_of(delta) for _, delta in parts]
    known = [pair for pair in pairs if pair is not None]
    if len(known) < len(pairs):
        return None
    return as_lora(*fused_lora(known, [p.rows or (0, height) for p, _ in parts], height))


def fused_lora(pairs: Sequence[Lora], rows: Sequence[tuple[int, int]], height: int) -> Lora:
    """One LoRA of `height` rows from LoRAs of row ranges; LoRAs with equal downs share columns.

    >>> q, k = (Lora(torch.ones(2, 1), torch.ones(1, 3)) for _ in range(2))
    >>> fused_lora([q, k], [(0, 2), (2, 4)], 6).up.T
    tensor([[1., 1., 1., 1., 0., 0.]])
    """
    downs: list[Tensor] = []
    blocks: list[list[tuple[int, Tensor]]] = []
    for pair, (start, _) in zip(pairs, rows, strict=True):
        index = next((i for i, d in enumerate(downs) if torch.equal(d, pair.down)), len(downs))
        if index == len(downs):
            downs.append(pair.down)
            blocks.append([])
        blocks[index].append((start, pair.up))
    return Lora(torch.cat([_column(b, height) for b in blocks], 1), torch.cat(downs))


def _column(blocks: Sequence[tuple[int, Tensor]], height: int) -> Tensor:
    """The blocks at their rows, with zeros in between."""
    wide = blocks[0][1].dtype
    for _, up in blocks:
        wide = torch.promote_types(wide, up.dtype)
    column = torch.zeros(height, blocks[0][1].shape[1], dtype=wide)
    for start, up in blocks:
        column[start : start + len(up)] = up.to(wide)
    return column


def _fused_term(module: str, parts: Sequence[Part], height: int) -> KronTerms:
    """The parts as one term, or as one LoRA if all other parts are zero."""
    term = _stacked_lefts(parts, height)
    if term is not None:
        return term
    nonzero = [(p, delta) for p, delta in parts if norm(delta.sums) > 0]
    if 0 < len(nonzero) < len(parts):
        term = _fused_lora(nonzero, height)
    if term is None:
        term = as_single_term([(p.rows[0] if p.rows else 0, delta.sums) for p, delta in parts], height)
    if term is None:
        raise InexpressibleError(
            f"{module} fuses {len(parts)} projections, whose Kronecker terms do not form a single term.",
            fix="Use --to lora, or --split-qkv for an application that loads separate projections as well.",
        )
    return term


def _stacked_lefts(parts: Sequence[Part], height: int) -> KronTerms | None:
    """(stacked cⱼAⱼ) ⊗ B for terms Aⱼ ⊗ cⱼB, with zeros for the rows in between; None for other terms."""
    terms = [term_of(delta) for _, delta in parts]
    known = [t for t in terms if t is not None]
    starts = [p.rows[0] if p.rows else 0 for p, _ in parts]
    right = known[0].shape[2:] if known else (1, 1)
    fits = len(known) == len(parts) and all(t.shape[2:] == right for t in known)
    scales = multiples([t.right for t in known]) if fits else None
    if scales is None or any(n % right[0] for n in (*starts, height)):
        return None
    left = torch.zeros(height // right[0], known[0].shape.a2)
    for term, start, scale in zip(known, starts, scales, strict=True):
        left[start // right[0] :][: term.shape.a1] = dense_factor(term.left)[0].float() * scale
    return KronTerms(left[None], known[0].right)


def _magnitudes(module: str, parts: Sequence[Part], wanted: int) -> Tensor | None:
    """The DoRA magnitudes of all rows of a fused weight; every part must have one per output row."""
    found = [delta.magnitude for _, delta in parts if delta.magnitude is not None]
    if not found:
        return None
    if len(found) < wanted or any(delta.magnitude_axis == "in" for _, delta in parts):
        raise InexpressibleError(
            f"{module} fuses {wanted} projections, and only some are a DoRA per output row.",
            fix="Use --split-qkv for an application that loads separate projections as well.",
        )
    return torch.cat(found)


def _in_stored_order(module: str, place: Placement, delta: LayerDelta) -> LayerDelta:
    """The delta in the order of the file: halves swapped, or transposed."""
    if not (place.swap_halves or place.transpose):
        return delta
    if delta.magnitude is not None:
        raise InexpressibleError(
            f"{module} stores its weight in another order, which DoRA does not support.",
            fix="Merge the DoRA into the base weights.",
        )
    if place.swap_halves:
        delta = replace(delta, sums=tuple(_halves_swapped(module, s) for s in delta.sums))
    if place.transpose:
        delta = LayerDelta(tuple(_transposed(module, s) for s in delta.sums), delta.weight_shape[::-1])
    return delta


def _halves_swapped(module: str, s: KronTerms) -> KronTerms:
    """Swap the two halves of the rows: roll the rows of A, or those of B if A has one row."""
    if s.rows == "kron" and s.shape.a1 % 2 == 0:
        return replace(s, left=_rolled(s.left, s.shape.a1 // 2))
    if s.shape.a1 == 1 and s.shape.b1 % 2 == 0:
        return replace(s, right=_rolled(s.right, s.shape.b1 // 2))
    raise InexpressibleError(
        f"{module} stores the halves of its rows swapped, which shape {s.shape} does not allow.",
        fix="Use --to lora.",
    )


def _rolled(factor: Tensor | LowRank, rows: int) -> Tensor | LowRank:
    if isinstance(factor, LowRank):
        return factor.map_sides(lambda up: up.roll(rows, 1))
    return factor.roll(rows, 1)


def _transposed(module: str, s: KronTerms) -> KronTerms:
    if s.rows == "shuffled":
        raise InexpressibleError(f"{module} is stored transposed, but its rows are shuffled.", fix="Use --to lora.")
    return KronTerms(transpose_factor(s.left), transpose_factor(s.right))
