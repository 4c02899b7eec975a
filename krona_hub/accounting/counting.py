"""Count the parameters of an adapter before training, and of existing files. Needs neither weights nor torch.

KronA a1xa2, K terms    K · (a1·a2 + out·in / (a1·a2))     per layer; in = channels · k… for a convolution
LoKr factor f, full     a·c + b·d·k…                       (a, b) and (c, d): factor pairs of out and in
LoKr factor f, rank r   a·c + r·(b + d·k…)                 where r < max(b, d)/2, else full
LoRA rank r             r · (out + in)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

from krona_hub.accounting.costs import AdapterKind, adapter_kinds, lora_parameters
from krona_hub.bases import catalog, loading
from krona_hub.bases.base import Base
from krona_hub.bases.families import FAMILIES
from krona_hub.bases.module_spec import ModuleSpec
from krona_hub.bases.target_sets import choose, sets_of
from krona_hub.errors import ShapeError, UsageError
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.description import Description, ModuleInfo

BOTH = "all"  # as a component: all components of the base
TEXT = "text"  # as a component: all text encoders


@dataclass(frozen=True)
class CountRow:
    """The size of one adapter."""

    method: str
    parameters: int
    modules: int  # layers counted
    lora_rank: float  # rank of a LoRA on the same layers with as many parameters
    undivided: tuple[str, ...] = ()  # layers that the shape does not divide, not counted

    @property
    def bytes_fp16(self) -> int:
        return 2 * self.parameters


@dataclass(frozen=True)
class ComponentCount:
    """An adapted component of the base model."""

    component: str
    modules: int
    weights: int  # parameters in the weights of those modules
    total_parameters: int | None = None  # of the whole component, if the catalog records it
    config_status: str | None = None  # verification status of the catalog's configuration
    total_status: str | None = None

    @property
    def checked(self) -> str:
        """Verification status of the catalog entry; empty for a base read from a folder."""
        if not (self.config_status and self.total_status):
            return ""
        config, total = catalog.CONFIG_STATUS[self.config_status], catalog.TOTAL_STATUS[self.total_status]
        return f"configuration {self.config_status} ({config}), total {self.total_status} ({total})"


@dataclass(frozen=True)
class Accounting:
    """Parameter counts of adapters on one base model, as `krona params` prints them."""

    base: str
    targets: str  # a named set or a regular expression
    parts: tuple[ComponentCount, ...]
    rows: tuple[CountRow, ...]
    target_sets: tuple[str, ...]  # named sets available for `targets`
    uncovered: tuple[str, ...] = ()  # pipeline components that the base does not list

    @property
    def modules(self) -> int:
        return sum(part.modules for part in self.parts)


def account(
    base: Base | str,
    *,
    targets: str = "attn",
    component: str | Sequence[str] | None = None,
    shapes: Iterable[str] = ("64x4", "64x8", "64x16"),
    factors: Iterable[int] = (8, 16),
    ranks: Iterable[int] = (4, 16),
    terms: int = 1,
    kernels: bool = True,
) -> Accounting:
    """Count the parameters of KronA, LoKr and LoRA adapters of a base model, from shapes alone.

    Parameters
    ----------
    base : base model or its name.
    targets : named set of layers, or regular expression of layer names.
    component : one or several component names, "text" or "all" (default: the denoiser).
    shapes, terms : sizes `a1xa2` of A, and terms, of the KronA adapters.
    factors : LoKr factors of LyCORIS; -1 chooses one near the square root.
    ranks : ranks of the LoRA and LoKr adapters.
    kernels : whether to include convolutions larger than 1×1.

    Returns
    -------
    Accounting : one row per adapter, with the rank of the LoRA of equal size.

    Raises
    ------
    UsageError : unknown component or target, or an invalid factor, rank or number of terms.

    Examples
    --------
    >>> [(row.method, row.parameters) for row in account("sdxl", shapes=["64x4"], factors=[], ranks=[4]).rows]
    [('KronA by width', 1443840), ('KronA 64x4', 3874560), ('LoRA rank 4', 5806080)]
    """
    base = base if isinstance(base, Base) else loading.load_base(base)
    chosen = {c: _layers(base, c, targets, kernels) for c in components_of(base, component)}
    layers = {name: module for modules in chosen.values() for name, module in modules.items()}
    rows = tuple(_row(method, layers) for method in adapter_kinds(shapes, factors, ranks, terms))
    parts = tuple(_part(base, component, modules) for component, modules in chosen.items())
    return Accounting(base.name, targets, parts, rows, _set_names(base, chosen), base.uncovered)


def account_file(
    source: str | Path,
    *,
    base: Base | str | None = None,
    component: str | None = None,
    shapes: Iterable[str] = ("64x4", "64x8", "64x16"),
    factors: Iterable[int] = (8, 16),
    ranks: Iterable[int] = (4, 16),
    terms: int = 1,
) -> Accounting:
    """Count the parameters of an adapter file (first row) and of other adapters on the same layers.

    Each module of the file counts as one layer, fused ones too; its vectors have a row of their own. Only headers are
    read.
    """
    about = describe(source, base=base, component=component)
    layers = {m.name: ModuleSpec(m.weight_shape) for m in about.modules}
    own = [CountRow(f"this file, {about.format}", _in_layers(about), len(layers), lora_rank_of(about))]
    if about.vectors:
        own.append(CountRow("this file, vectors", about.parameters - _in_layers(about), 0, 0.0))
    rows = (*own, *(_row(method, layers) for method in adapter_kinds(shapes, factors, ranks, terms)))
    return Accounting(about.base or "unknown", f"the layers of {about.path.name}", _file_parts(about.modules), rows, ())


def lora_rank_of(about: Description) -> float:
    """Return the rank of a LoRA on the layers of a file with as many parameters, without vectors; 0 without layers."""
    return _as_lora(_in_layers(about), [ModuleSpec(m.weight_shape) for m in about.modules])


def _in_layers(about: Description) -> int:
    """Return the parameters of a file without its vectors."""
    return about.parameters - sum(vector.values for vector in about.vectors)


def _file_parts(modules: Iterable[ModuleInfo]) -> tuple[ComponentCount, ...]:
    """Return what the file adapts, per component; `unknown` for modules that no base resolves."""
    owned: dict[str, list[ModuleInfo]] = {}
    for module in modules:
        owned.setdefault(module.layers[0].partition(".")[0] if module.layers else "unknown", []).append(module)
    return tuple(ComponentCount(c, len(group), sum(prod(m.weight_shape) for m in group)) for c, group in owned.items())


def components_of(base: Base, wanted: str | Sequence[str] | None) -> tuple[str, ...]:
    """Resolve component names, in the order of the base. Raises UsageError for an unknown one."""
    names = [wanted] if isinstance(wanted, str) else list(wanted or [base.denoiser or BOTH])
    groups = {BOTH: tuple(base.components), TEXT: base.text_encoders}
    chosen = {c for name in names for c in groups.get(name, (name,))}
    missing = sorted(chosen - set(base.components))
    if missing or not chosen:
        raise UsageError(
            f"Unknown component {' or '.join(missing) or TEXT} of {base.name}.",
            fix=f"Choose from {', '.join(base.components)}, {TEXT} (all text encoders) or {BOTH}.",
        )
    return tuple(c for c in base.components if c in chosen)


def _layers(base: Base, component: str, wanted: str, kernels: bool) -> dict[str, ModuleSpec]:
    picked = choose(base, component, wanted)
    return {name: module for name, module in picked.items() if kernels or not module.has_kernel}


def _set_names(base: Base, components: Iterable[str]) -> tuple[str, ...]:
    """Return the named sets that all components share."""
    names = [[s.name for s in sets_of(base.components[c])] for c in components]
    return tuple(name for name in names[0] if all(name in others for others in names))


def _part(base: Base, component: str, layers: Mapping[str, ModuleSpec]) -> ComponentCount:
    part = ComponentCount(component, len(layers), sum(prod(module.shape) for module in layers.values()))
    if base.family != base.name:  # read from a folder, not in the catalog
        return part
    entry = catalog.component(FAMILIES[base.name].components[component])
    return replace(
        part,
        total_parameters=entry.total_parameters,
        config_status=entry.config_status,
        total_status=entry.total_status,
    )


def _row(method: AdapterKind, layers: Mapping[str, ModuleSpec]) -> CountRow:
    costs = {module: _cost(method, module) for module in set(layers.values())}  # few sizes, many layers
    counted = [module for module in layers.values() if costs[module] is not None]
    undivided = tuple(name for name, module in layers.items() if costs[module] is None)
    total = sum(costs[module] or 0 for module in counted)
    return CountRow(method.label, total, len(counted), _as_lora(total, counted), undivided)


def _as_lora(parameters: int, modules: Iterable[ModuleSpec]) -> float:
    """Return the rank of the LoRA of the same size; 0 without layers."""
    per_rank = sum(lora_parameters(module, 1) for module in modules)
    return parameters / per_rank if per_rank else 0.0


def _cost(method: AdapterKind, module: ModuleSpec) -> int | None:
    """Return the parameters of one layer, None if the shape does not divide it."""
    try:
        return method.cost(module)
    except ShapeError:
        return None
