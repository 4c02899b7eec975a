"""One adapter of a merge: which of its modules the base has, and why it lacks the others. Torch-free for files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from krona_hub.bases import detect
from krona_hub.bases.base import DENOISERS
from krona_hub.errors import AmbiguousError, UsageError
from krona_hub.formats.describe import Description, ModuleInfo, describe
from krona_hub.merging.base_tree import BaseTree
from krona_hub.origin import BaseModel
from krona_hub.schema import layout
from krona_hub.sources import resolve

if TYPE_CHECKING:
    from krona_hub.adapter import Adapter

TEXT = ("lora_te", "lycoris_text_encoder", "text_encoder", "te.", "te1.", "te2.")  # how names of text encoders start


class Module(NamedTuple):
    """A module of an adapter that the base has."""

    name: str  # as the file spells it
    layers: tuple[str, ...]  # canonical; several where it is fused
    dora: bool


@dataclass(frozen=True, eq=False)
class Part:
    """One adapter of a merge."""

    said: str  # its path as given; "adapter 1" for one in memory
    source: Adapter | Path
    weight: float
    format: str | None
    component: str | None  # that reading it needs to be told
    modules: tuple[Module, ...]
    missing: Mapping[str, str]  # module -> why it cannot be merged
    base: BaseModel | None  # that it says it was made for
    candidates: tuple[str, ...]  # catalogue names that it fits
    nbytes: int
    notes: tuple[str, ...]

    @property
    def total(self) -> int:
        return len(self.modules) + len(self.missing)

    @property
    def doras(self) -> frozenset[str]:
        """The layers with a DoRA magnitude."""
        return frozenset(layer for m in self.modules if m.dora for layer in m.layers)


def part_of(
    source: Adapter | str | Path, weight: float, tree: BaseTree, component: str | None, from_format: str | None
) -> Part:
    """What of an adapter the base has; with `component`, of its modules for that part."""
    if not isfinite(weight):
        raise UsageError(f"a weight of {weight} cannot be merged.", fix="Give a finite number.")
    if isinstance(source, (str, Path)):
        return _of_file(source, weight, tree, component, from_format)
    return _of_adapter(source, weight, tree, component)


def _of_adapter(adapter: Adapter, weight: float, tree: BaseTree, component: str | None) -> Part:
    wanted = {n: d for n, d in adapter.layers.items() if component in (None, n.split(".", 1)[0])}
    reasons = {name: _why_not(name, delta.weight_shape, tree) for name, delta in wanted.items()}
    return Part(
        said="the adapter",
        source=adapter,
        weight=weight,
        format=adapter.provenance.source_format,
        component=None,
        modules=tuple(Module(n, (n,), d.magnitude is not None) for n, d in wanted.items() if not reasons[n]),
        missing={name: why for name, why in reasons.items() if why},
        base=adapter.base,
        candidates=adapter.base.names if adapter.base else (),
        nbytes=sum(t.numel() * t.element_size() for d in wanted.values() for t in d.tensors),
        notes=tuple(_extras(tuple(adapter.extras))),
    )


def _of_file(source: str | Path, weight: float, tree: BaseTree, component: str | None, from_format: str | None) -> Part:
    path = resolve(source)
    found, told = _described(path, tree, component, from_format)
    kept = [m for m in found.modules if component is None or _owner(m) in (None, component)]
    reasons = {m.name: _why_no_module(m, tree) for m in kept}
    unread = {name: why for name, why in found.unmatched.items() if component is None or _may_be(name, component)}
    return Part(
        said=str(source),
        source=path,
        weight=weight,
        format=found.format,
        component=told,
        modules=tuple(Module(m.name, m.layers, m.dora_axis is not None) for m in kept if not reasons[m.name]),
        missing={name: why for name, why in reasons.items() if why} | unread,
        base=_recorded_base(found),
        candidates=_candidates(found),
        nbytes=found.bytes,
        notes=tuple(_extras(found.extras)),
    )


def _described(
    path: Path, tree: BaseTree, component: str | None, from_format: str | None
) -> tuple[Description, str | None]:
    """The adapter, and the component that it had to be told: only where its names do not say it."""
    try:
        found = describe(path, base=tree.base, format=from_format)
    except AmbiguousError:
        if component is None:
            raise
        return describe(path, base=tree.base, format=from_format, component=component), component
    return found, None


def _owner(module: ModuleInfo) -> str | None:
    return module.layers[0].split(".", 1)[0] if module.layers else None


def _may_be(name: str, component: str) -> bool:
    """Whether a module that the base does not have may belong to the component."""
    return (component in DENOISERS) != name.startswith(TEXT)


def _why_no_module(module: ModuleInfo, tree: BaseTree) -> str:
    if not module.layers:
        return f"{tree.root.name} has no such module."
    if len(module.layers) > 1:  # the reader has compared the fused module with the base
        return next((f"{name} has no weight there." for name in module.layers if name not in tree.places), "")
    return _why_not(module.layers[0], module.weight_shape, tree)


def _why_not(layer: str, weight_shape: tuple[int, ...], tree: BaseTree) -> str:
    """Why a layer cannot be merged; "" where it can."""
    module = tree.base.module(layer)
    if module is None or layer not in tree.places:
        return f"{tree.root.name} has no such module."
    out, in_ = weight_shape[0], 1
    for size in weight_shape[1:]:
        in_ *= size
    if module.matrix == (out, in_):
        return ""
    return f"its delta is {out}x{in_}, the weight {module.matrix[0]}x{module.matrix[1]}."


def _recorded_base(found: Description) -> BaseModel | None:
    """The base that a native file names; other formats name none that could be trusted."""
    return layout.examine(found.header)[0].header.base if found.format == "krona" else None


def _candidates(found: Description) -> tuple[str, ...]:
    """Catalogue names that the adapter fits, whatever base was given."""
    recorded = _recorded_base(found)
    if recorded is not None and recorded.names:
        return recorded.names
    shapes = {m.name: m.weight_shape for m in found.modules} | dict.fromkeys(found.unmatched)
    best = [c for c in detect.candidates(shapes, found.header.metadata) if c.matched]
    return tuple(dict.fromkeys(c.base for c in best if c.score >= 0.99 * best[0].score))


def _extras(names: tuple[str, ...]) -> Iterator[str]:
    if names:
        yield (
            f"{len(names)} tensors that are no weight deltas (embeddings, norms, biases), such as {names[0]}, are not "
            "merged"
        )
