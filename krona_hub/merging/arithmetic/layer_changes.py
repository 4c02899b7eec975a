"""Turn the layers that change a stored tensor into patches: rows of a layer, and layers that share one weight.

Torch-free but for `patches_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from krona_hub.bases.module_spec import Placement
from krona_hub.errors import InexpressibleError

if TYPE_CHECKING:
    from krona_hub.adapters.adapter import LayerDelta
    from krona_hub.merging.arithmetic.patches import Patch

LayerChange = tuple[int, str, Placement, float]  # number of the adapter, layer, where in the tensor, strength
DeltaOf = Callable[[int, str], "LayerDelta"]  # number of the adapter, layer -> its delta


def patches_of(changes: Sequence[LayerChange], delta_of: DeltaOf, name: str) -> list[Patch]:
    """Return the patches of a stored tensor, one for all layers that share its weight.

    Raises InexpressibleError, naming the tensor, if these layers change differently, UnsupportedError if the tensor has
    only some rows of a layer with a DoRA that has a norm per input.
    """
    from krona_hub.adapters.delta_rows import delta_rows, equal_deltas
    from krona_hub.merging.arithmetic.patches import Patch

    check_strengths(changes, name)
    patches, added = [], set[tuple[int, str]]()
    for adapter, layer, place, weight in changes:
        if (adapter, layer) in added:
            continue
        delta = delta_of(adapter, layer)
        for other in place.shared_with:
            added.add((adapter, other))
            if not equal_deltas(delta, delta_of(adapter, other)):
                raise _unequal(name, layer, other, "their deltas differ")
        if place.part:
            delta, place = delta_rows(delta, [place.part]), place._replace(part=None)
        patches.append(Patch(delta, weight, place))
    return patches


def check_strengths(changes: Sequence[LayerChange], name: str) -> None:
    """Raise InexpressibleError unless every layer that shares the tensor is changed with the same strength."""
    strengths = {(adapter, layer): weight for adapter, layer, _, weight in changes}
    for adapter, layer, place, weight in changes:
        for other in place.shared_with:
            if (adapter, other) not in strengths:
                raise _unequal(name, layer, other, f"an adapter changes only {layer}")
            if strengths[adapter, other] != weight:
                raise _unequal(name, layer, other, "their strengths differ")


def _unequal(name: str, one: str, other: str, why: str) -> InexpressibleError:
    return InexpressibleError(
        f"{name} is the weight of both {one} and {other}, and {why}.",
        fix="Merge into a diffusers folder, which stores both weights.",
    )
