"""What an adapter holds beside its layers, as tensors of a file: vectors (FORMATS §18) and embeddings.

A format holds all vectors (krona), those of LyCORIS (`w_norm`, `b_norm`, `diff_b`), the biases of adapted layers (PEFT
with `lora_bias`), or none. Vectors of zeros change nothing and are not written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.adapters.adapter import Adapter, vector_delta
from krona_hub.bases.base import Base
from krona_hub.bases.module_spec import Placement
from krona_hub.formats.compatibility.applications import Application
from krona_hub.formats.compatibility.verdicts import held_vectors
from krona_hub.formats.forms.left_out import LeftOut
from krona_hub.formats.forms.vector_kinds import LORA_BIAS, kind_of
from krona_hub.formats.known.registry import storage_of
from krona_hub.formats.parsing.keys import EMBEDDINGS
from krona_hub.formats.writing.module_names import FileNames, Home
from krona_hub.formats.writing.split_modules import check_equal, check_equal_norms, split_vector


class Beside(NamedTuple):
    """What a file holds beside its layers, and what it leaves out."""

    vectors: Mapping[str, Tensor]  # parameter -> vector
    embeddings: Mapping[str, Tensor]  # key -> tensor
    left_out: LeftOut


def held_beside(adapter: Adapter, format_name: str, tool: Application | None, base: Base | None) -> Beside:
    """Return the vectors and embeddings that the format has a place for, and that the application loads from it."""
    nonzero = {name: v for name, v in adapter.vectors.items() if bool(v.any())}
    held, storage = held_vectors(format_name, tool), storage_of(format_name)
    if held == LORA_BIAS and _adapts_layers_without_bias(adapter, base):
        held = ()
    vectors = {name: v for name, v in nonzero.items() if kind_of(name, v.ndim, adapter.layers, nonzero, base) in held}
    loaded = storage.embeddings and (tool is None or tool.embeddings)
    whole = storage.layout == "krona"
    embeddings = {key: t for key, t in adapter.extras.items() if whole or (loaded and key.startswith(EMBEDDINGS))}
    left_out = LeftOut(
        adapter.provenance.skipped,
        (*adapter.provenance.skipped_vectors, *(name for name in nonzero if name not in vectors)),
        tuple(key for key in adapter.extras if key not in embeddings),
    )
    return Beside(vectors, embeddings, left_out)


def _adapts_layers_without_bias(adapter: Adapter, base: Base | None) -> bool:
    """Whether `lora_bias` of PEFT does not fit: it is for every adapted layer, and PEFT merges none into these."""
    return base is not None and any(base.parameter(f"{layer}.bias") is None for layer in adapter.layers)


def lycoris_tensors(vectors: Mapping[str, Tensor], names: FileNames, base: Base | None) -> dict[str, Tensor]:
    """Return key -> tensor in LyCORIS's names: `w_norm` and `b_norm` of a norm, `diff_b` of a layer.

    A norm with a bias always has both, since AUTOMATIC1111 ignores one alone.
    """
    modules = dict.fromkeys(name.rpartition(".")[0] for name in vectors)
    layers = [m for m in modules if f"{m}.weight" not in vectors and (base is None or base.module(m) is not None)]
    gathered = _gathered(layers, vectors, names)
    tensors = {f"{name}.diff_b": biases for name, biases in gathered.items()}
    for module in modules:
        if module not in layers:
            name = names.vector_name(module)
            if names.table is not None:
                check_equal_norms(name, module, vectors, names.table)
            weight, bias = vectors.get(f"{module}.weight"), vectors.get(f"{module}.bias")
            has_bias = base is None or base.parameter(f"{module}.bias") is not None
            tensors |= _norm(name, weight, bias, has_bias)
    return tensors


def _norm(name: str, weight: Tensor | None, bias: Tensor | None, has_bias: bool) -> dict[str, Tensor]:
    known = weight if weight is not None else bias
    if known is None:
        return {}
    zeros = torch.zeros_like(known)
    tensors = {f"{name}.w_norm": zeros if weight is None else weight}
    return tensors | ({f"{name}.b_norm": zeros if bias is None else bias} if bias is not None or has_bias else {})


def _gathered(layers: Sequence[str], vectors: Mapping[str, Tensor], names: FileNames) -> dict[str, Tensor]:
    """Module of the file -> the biases of its layers, in the order of its rows."""
    places = names.homes(layers)
    members: dict[str, list[tuple[Home, Tensor]]] = {}
    for layer in layers:
        for home, bias in split_vector(vectors[f"{layer}.bias"], places[layer]):
            members.setdefault(home.module, []).append((home, bias))
    return {name: _stacked(own) for name, own in members.items()}


def _stacked(parts: Sequence[tuple[Home, Tensor]]) -> Tensor:
    """The biases of the layers of one module, zero where a layer has none."""
    home, first = parts[0]
    if home.placement.shared_with:
        check_equal(home.module, [(h.placement, vector_delta(bias)) for h, bias in parts])
    if home.placement.rows is None:
        return _in_stored_order(home.placement, first)
    height = max(p.rows[1] for p in home.siblings if p.rows)
    whole = torch.zeros(height, dtype=first.dtype)
    for place, bias in ((h.placement, b) for h, b in parts):
        start, stop = place.rows or (0, height)
        whole[start:stop] = _in_stored_order(place, bias)
    return whole


def _in_stored_order(place: Placement, bias: Tensor) -> Tensor:
    return torch.cat(bias.chunk(2)[::-1]) if place.swap_halves else bias
