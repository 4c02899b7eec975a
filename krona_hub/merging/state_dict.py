"""`apply_to_state_dict`: merge adapters into weights in memory."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.bases.base import COMPONENTS
from krona_hub.bases.loading import landed, landed_vectors, load_base, placed
from krona_hub.bases.module_spec import Placement
from krona_hub.bases.weight_files import StoredTensor, WeightPlaces, weights_by_module
from krona_hub.errors import AmbiguousError, BaseMismatchError, UnknownBaseError, abbreviated
from krona_hub.formats.reading.reader import read
from krona_hub.kron.parallel import in_parallel
from krona_hub.merging.arithmetic.layer_changes import LayerChange, patches_of
from krona_hub.merging.arithmetic.patches import Patch
from krona_hub.merging.arithmetic.rounding import NEAREST, Rounding
from krona_hub.merging.arithmetic.tiles import merge_tensor
from krona_hub.merging.merge_input import matched_counts

Source = Adapter | str | Path


class StateDictSlot(NamedTuple):
    """Location of a layer or parameter in a state dict."""

    tensor: str
    placement: Placement


Places = Mapping[str, tuple[StateDictSlot, ...]]  # by canonical layer or parameter; several that fill its rows


def apply_to_state_dict(
    state_dict: Mapping[str, Tensor],
    adapters: Source | Sequence[tuple[Source, float]],
    *,
    base: str | Path | None = None,
    component: str | None = None,
    out_dtype: torch.dtype | None = None,
    rounding: Rounding = NEAREST,
    allow_missing: bool = False,
) -> dict[str, Tensor]:
    """Return a new state dict with strength · ΔW of every adapter added; untouched tensors are shared with the old one.

    Vectors are added to their parameters likewise, found by the model's own names or by those that `base` resolves.

    Parameters
    ----------
    state_dict : name -> tensor. Names are a model's own (`unet.state_dict()`), those of a pipeline with the component
        as prefix, or those of a checkpoint that `base` or the catalog resolves.
    adapters : adapter, file or Hub id at strength 1, or pairs (adapter, strength).
    base : catalog name, folder or file of the base model, to resolve the names.
    component : component that the weights belong to; layers of the adapters for other components are ignored.
    out_dtype, rounding : dtype of changed tensors (default: their own); rounding to it, once.
    allow_missing : apply the matching layers only.

    Returns
    -------
    dict of str to Tensor : changed tensors stay on their device.

    Raises
    ------
    BaseMismatchError : a layer has no weight in `state_dict`, or none matches.

    Examples
    --------
    >>> from krona_hub.kron.terms import KronTerms
    >>> delta = LayerDelta((KronTerms(torch.ones(1, 2, 2), torch.ones(1, 1, 2)),), (2, 4))
    >>> adapter = Adapter({"unet.proj": delta})
    >>> apply_to_state_dict({"proj.weight": torch.zeros(2, 4)}, [(adapter, 0.5)])["proj.weight"][0]
    tensor([0.5000, 0.5000, 0.5000, 0.5000])
    """
    pairs = [(adapters, 1.0)] if isinstance(adapters, Adapter | str | Path) else list(adapters)
    loaded = [(_loaded(source, base, component), weight) for source, weight in pairs]
    places = _places(state_dict, [adapter for adapter, _ in loaded], base, component)
    for adapter, _ in loaded:
        _check_matched(adapter, places, allow_missing)
    patches = _patches(loaded, places)

    def merged(name: str) -> Tensor:
        return _merged(state_dict[name], patches[name], out_dtype or state_dict[name].dtype, rounding, name)

    return {**state_dict, **dict(in_parallel(merged, list(patches)))}


def _loaded(source: Source, base: str | Path | None, component: str | None) -> Adapter:
    """Load the adapter, restricted to the component if there is one."""
    adapter = source if isinstance(source, Adapter) else read(source, base=base, component=component)
    if component is None:
        return adapter
    own = f"{component}."
    return replace(
        adapter,
        layers={name: delta for name, delta in adapter.layers.items() if name.startswith(own)},
        vectors={name: vector for name, vector in adapter.vectors.items() if name.startswith(own)},
    )


# --- names -----------------------------------------------------------------------------------------------------------


def _places(
    state_dict: Mapping[str, Tensor], adapters: Sequence[Adapter], base: str | Path | None, component: str | None
) -> Places:
    """Locate the layers and parameters that the adapters change."""
    stored = {name: StoredTensor(Path("the state dict"), name, tuple(t.shape)) for name, t in state_dict.items()}
    layers = {name for adapter in adapters for name in adapter.layers}
    vectors = {name for adapter in adapters for name in adapter.vectors}
    present = {name.partition(".")[0] for name in layers | vectors}
    owners = [component] if component else [c for c in COMPONENTS if c in present]
    return {
        **_layer_places(stored, layers, owners, base, component),
        **_vector_places(stored, vectors, owners, base),
    }


def _layer_places(
    stored: Mapping[str, StoredTensor],
    wanted: Collection[str],
    owners: Sequence[str],
    base: str | Path | None,
    component: str | None,
) -> Places:
    """Locate the layers: by their own names if all are there, else as `base` or the catalog resolves them."""
    plain = _by_own_names({name: w.tensor for name, w in weights_by_module(stored).items()}, wanted, owners)
    if len(plain) == len(wanted):
        return plain
    known = _by_base(stored, base, component) if base is not None else _by_catalog(stored)
    return max(plain, known, key=lambda places: len(places.keys() & wanted))


def _vector_places(
    stored: Mapping[str, StoredTensor], wanted: Collection[str], owners: Sequence[str], base: str | Path | None
) -> Places:
    """Locate the parameters of vectors: by their own names if all are there, else as `base` resolves them."""
    plain = _by_own_names({name: name for name in stored}, wanted, owners)
    if len(plain) == len(wanted) or base is None:
        return plain
    known = _slots(landed_vectors(load_base(base), stored))
    return {**{name: slots for name, slots in known.items() if name in wanted}, **plain}


def _by_own_names(tensors: Mapping[str, str], wanted: Collection[str], owners: Sequence[str]) -> Places:
    """Locate what has its canonical name, with or without the component as prefix; `tensors`: name -> its tensor."""
    found: dict[str, tuple[StateDictSlot, ...]] = {}
    for name, tensor in tensors.items() if wanted else ():
        path = name.removeprefix("text_model.")
        head, _, tail = path.partition(".")
        whole = f"{head}.{tail.removeprefix('text_model.')}"
        readings = [whole] if head in COMPONENTS else [f"{owner}.{path}" for owner in owners]
        here = [reading for reading in readings if reading in wanted]
        if len(here) > 1:
            raise AmbiguousError(f"{name} may be {' or '.join(here)}.", fix="Specify component=.")
        found |= {reading: (StateDictSlot(tensor, Placement(reading)),) for reading in here}
    return found


def _by_base(stored: Mapping[str, StoredTensor], base: str | Path, component: str | None) -> Places:
    return _slots(landed(load_base(base), stored, component))


def _by_catalog(stored: Mapping[str, StoredTensor]) -> Places:
    try:
        found = placed(Path("the state dict"), stored)
    except UnknownBaseError:
        return {}
    return _slots(found)


def _slots(places: Mapping[str, WeightPlaces]) -> Places:
    return {name: tuple(StateDictSlot(p.tensor, p.placement) for p in own) for name, own in places.items()}


def _check_matched(adapter: Adapter, places: Places, allow_missing: bool) -> None:
    names = (*adapter.layers, *adapter.vectors)
    missing = [name for name in names if name not in places]
    if not missing or (allow_missing and len(missing) < len(names)):
        return
    counts = {
        kind: (len(own.keys() & places.keys()), len(own))
        for kind, own in {"layers": adapter.layers, "vectors": adapter.vectors}.items()
    }
    raise BaseMismatchError(
        f"{matched_counts(**counts)} of the adapter are in the state dict; missing: {abbreviated(missing)}.",
        fix="Identify the weights with base= and component=, or apply the matching layers with allow_missing=True.",
    )


# --- arithmetic ------------------------------------------------------------------------------------------------------


def _patches(loaded: Sequence[tuple[Adapter, float]], places: Places) -> dict[str, list[Patch]]:
    """Return, by tensor name, what is added to it."""
    changes: dict[str, list[LayerChange]] = {}
    for number, (adapter, weight) in enumerate(loaded):
        for name in (*adapter.layers, *adapter.vectors) if weight else ():
            for slot in places.get(name, ()):
                changes.setdefault(slot.tensor, []).append((number, name, slot.placement, weight))

    def delta_of(number: int, name: str) -> LayerDelta:
        return _on_cpu(loaded[number][0].delta(name))

    return {tensor: patches_of(own, delta_of, tensor) for tensor, own in changes.items()}


def _merged(weight: Tensor, patches: Sequence[Patch], dtype: torch.dtype, rounding: Rounding, name: str) -> Tensor:
    base = weight.detach().cpu().contiguous()
    out = torch.empty(base.shape, dtype=dtype)
    flat = out.reshape(-1)

    def keep(first: int, tile: Tensor) -> None:
        flat[first : first + tile.numel()] = tile

    merge_tensor(base, patches, keep, out_dtype=dtype, rounding=rounding, name=name)
    return out.to(weight.device)


def _on_cpu(delta: LayerDelta) -> LayerDelta:
    if all(t.device.type == "cpu" for t in delta.tensors):
        return delta
    return delta.map(Tensor.cpu)
