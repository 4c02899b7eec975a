"""Vectors of adapters at a parameter of a model: biases, weights of norms, bare parameters.

A module whose parameters have vectors gets a subclass of its own class, in which those names are properties:
`self.bias` is then bias + Σ strength · vector, wherever it is read. The parameters themselves are neither changed nor
moved, so that they keep their names in `state_dict`, and removing the last vector restores the module exactly.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

KEPT = "_krona_vectors"  # attribute of a module: parameter -> ParameterVectors


class VectorShare(NamedTuple):
    """A vector of an adapter, and the part of the parameter that it changes."""

    name: str  # canonical name of the parameter, as in Adapter.vectors
    vector: Tensor  # at strength 1, as read from the file
    rows: tuple[int, int] | None = None  # first row, and one past the last, as q has in a fused q|k|v; None: all


class VectorBranch:
    """What one adapter adds to one parameter."""

    def __init__(self, owner: ParameterVectors, shares: tuple[VectorShare, ...], scale: float) -> None:
        self.owner, self.shares, self.scale = owner, shares, float(scale)

    def set_scale(self, scale: float) -> None:
        self.scale = float(scale)
        self.owner.refresh()


class ParameterVectors:
    """The vectors of all adapters at one parameter of a module.

    Their sum is kept at least in float32, whatever type the model is cast to, and rounded once to the type of the
    parameter when it is read. The tensors of the files are kept unchanged.
    """

    def __init__(self, module: nn.Module, key: str) -> None:
        self.module, self.key = module, key
        self.branches: dict[str, VectorBranch] = {}  # by adapter
        self.fused = False
        self.original: Tensor | None = None  # the parameter without the vectors, while they are fused
        device = None if self.parameter.is_meta else self.parameter.device  # offloaded: on meta until it runs
        self.total = torch.zeros(self.parameter.shape, dtype=_sum_type(self.parameter), device=device)
        self.is_active = False  # whether any strength differs from zero

    @property
    def parameter(self) -> Tensor:
        """The parameter of the model, without vectors."""
        found: Tensor = self.module._parameters[self.key]  # type: ignore[assignment]
        return found

    @property
    def name(self) -> str:
        """Canonical name of the parameter, or of the first of several that diffusers fused into it."""
        return next(share.name for branch in self.branches.values() for share in branch.shares)

    def exact_sum(self, device: torch.device | None = None) -> Tensor:
        """Return Σ strength · vector in float64, on the CPU unless requested elsewhere."""
        total = torch.zeros(self.parameter.shape, dtype=torch.float64, device=device)
        for branch in self.branches.values():
            for share in branch.shares if branch.scale else ():
                part = total if share.rows is None else total[share.rows[0] : share.rows[1]]
                part.add_(share.vector.to(total), alpha=branch.scale)
        return total

    @torch.no_grad()
    def refresh(self) -> None:
        """Compute the sum again, in the existing tensor, so that no graph is recompiled."""
        self.is_active = any(branch.scale for branch in self.branches.values())
        self.total.copy_(self.exact_sum())

    def move(self, change: Callable[[Tensor], Tensor]) -> None:
        """Follow the module to another device or type, with an exact sum."""
        like = change(self.total)
        self.total = torch.zeros_like(like, dtype=_sum_type(like))
        self.refresh()

    def added_to(self, parameter: Tensor | None) -> Tensor | None:
        """Return parameter + Σ strength · vector in the type of the parameter, or the parameter if that adds nothing.

        In a compiled graph, the sum is always added, so that changing strengths does not recompile it.
        """
        if parameter is None or parameter.is_meta or self.fused:
            return parameter
        if not (torch.compiler.is_compiling() or self.is_active):  # in this order: a graph depends on what it reads
            return parameter
        total = self.total.to(parameter.device)
        return (parameter.to(total.dtype) + total).to(parameter.dtype)


def add_vectors(
    module: nn.Module, key: str, name: str, shares: tuple[VectorShare, ...], scale: float
) -> ParameterVectors:
    """Add the vectors of an adapter of that name to a parameter of a module."""
    kept: dict[str, ParameterVectors] = vars(module).setdefault(KEPT, {})
    found = kept.get(key) or ParameterVectors(module, key)
    found.branches[name] = VectorBranch(found, shares, scale)
    found.refresh()
    if key not in kept:
        kept[key] = found
        _set_class(module, plain_class(module))
    return found


def replace_vectors(module: nn.Module, key: str, name: str, shares: tuple[VectorShare, ...]) -> None:
    """Replace the vectors of an adapter at a parameter, at the same strength."""
    found: ParameterVectors = vars(module)[KEPT][key]
    found.branches[name].shares = shares
    found.refresh()


def remove_vectors(vectors: ParameterVectors, name: str | None) -> None:
    """Remove the adapter of that name, or all; after the last one, restore the class of the module."""
    if name is None:
        vectors.branches.clear()
    vectors.branches.pop(name or "", None)
    if vectors.branches:
        vectors.refresh()
        return
    module = vectors.module
    plain = plain_class(module)
    del vars(module)[KEPT][vectors.key]
    _set_class(module, plain)
    if not vars(module)[KEPT]:
        del vars(module)[KEPT]


def vectors_in(models: Iterable[nn.Module]) -> Iterator[ParameterVectors]:
    """Yield the parameters with vectors, in the order of the models."""
    for model in models:
        for module in model.modules():
            yield from vars(module).get(KEPT, {}).values()


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of a module without vectors.

    >>> norm = nn.LayerNorm(2)
    >>> add_vectors(norm, "bias", "toy", (VectorShare("unet.norm.bias", torch.ones(2)),), 0.5).name
    'unet.norm.bias'
    >>> norm.bias, plain_class(norm) is nn.LayerNorm, type(norm) is nn.LayerNorm
    (tensor([0.5000, 0.5000], grad_fn=<AddBackward0>), True, False)
    """
    own = type(module)
    return getattr(own, "plain", own) if KEPT in vars(module) else own


# --- the subclass ----------------------------------------------------------------------------------------------------


def _set_class(module: nn.Module, plain: Any) -> None:
    names = tuple(sorted(vars(module)[KEPT]))
    module.__class__ = _class_with(plain, names) if names else plain


@cache
def _class_with(plain: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """Return a subclass that goes by the name of its parent: libraries recognize models by the names of classes."""

    def _apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        plain._apply(self, fn, recurse)
        for vectors in vars(self)[KEPT].values():
            vectors.move(fn)
        return self

    def __reduce_ex__(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        reduced: tuple[Any, ...] = plain.__reduce_ex__(self, protocol)
        return (_empty, (plain, names), *reduced[2:])

    body: dict[str, Any] = {name: _property(name) for name in names}
    body |= {"plain": plain, "_apply": _apply, "__reduce_ex__": __reduce_ex__}
    body |= {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    found: type[nn.Module] = type(plain)(plain.__name__, (plain,), body)
    return found


def _property(name: str) -> property:
    def read(self: nn.Module) -> Tensor | None:
        vectors: ParameterVectors = self.__dict__[KEPT][name]
        return vectors.added_to(self._parameters[name])

    return property(read)


def _empty(plain: Any, names: tuple[str, ...]) -> nn.Module:
    """Create a module for copy and pickle, which then fill in its state."""
    kind = _class_with(plain, names)
    return kind.__new__(kind)


def _sum_type(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32
