"""A base layer wrapped with adapters.

The base is only called; its weight is read for DoRA, for fusing, and to train a small linear layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.errors import ConflictError, NotFoundError, ShapeError, UsageError
from krona_hub.kron.shapes import split
from krona_hub.kron.terms import KronTerms, check_terms
from krona_hub.layers.adapter_branch import COMPUTED, Branch
from krona_hub.layers.chain_step import Window
from krona_hub.layers.parameter_vectors import plain_class

DEFAULT = "default"
NOT_OURS = ("base_layer", "get_base_layer")  # of PEFT, which would unwrap the layer, and remove it, if it found them


class KronLayer(nn.Module):
    """y = base(x) + Σ scale · ΔW x over the adapters of this layer.

    In a state_dict, the base keeps its own names, as if it were not wrapped. Attributes that this module lacks
    (`weight`, `in_features`, …) are looked up on the base.
    """

    base: nn.Module
    branches: nn.ModuleDict

    def __init__(
        self,
        base: nn.Module,
        weight_shape: tuple[int, ...],
        shape: tuple[int, int] | None = None,
        terms: int = 1,
        *,
        name: str = DEFAULT,
    ) -> None:
        """With `shape`, the size (a1, a2) of A, add trainable factors: A ~ N(0, 1/a1²), B = 0.

        The layer thus starts equal to its base, which is not frozen: call `base.requires_grad_(False)`. Raises
        ShapeError if the shape does not divide the weight, or fewer terms are already exact.
        """
        super().__init__()
        self.base, self.weight_shape = base, weight_shape  # (out, in) or (out, in / groups, k, …)
        self.branches = nn.ModuleDict()
        self.fused: tuple[str, ...] = ()  # names of the adapters that are currently fused into the weight
        self.original: Tensor | None = None  # the weight without them, while they are fused
        self.placed = False  # whether `attach` inserted this layer into its model
        self.train(base.training)
        self._register_load_state_dict_pre_hook(self._give_base_its_names)  # type: ignore[no-untyped-call]
        if shape is not None:
            fresh = fresh_terms(self.weight_shape, shape, terms)
            self.add(name, LayerDelta((fresh,), self.weight_shape), trainable=True)
            self.branch(name).stored = True

    @property
    def window(self) -> Window | None:
        """The window of a convolution; None for a linear layer."""
        return None

    @property
    def groups(self) -> int:
        return 1

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base" or name in NOT_OURS or name.startswith("_"):
                raise
            return getattr(self.base, name)

    # adapters of this layer

    def add(
        self, name: str, delta: LayerDelta, *, scale: float = 1.0, layer: str | None = None, trainable: bool = False
    ) -> None:
        """Add an adapter's delta to the layer.

        Raises ShapeError if it is for another weight, ConflictError if the name is taken or two adapters are DoRA.
        """
        self._refuse_conflicts(name, delta)
        branch = Branch(
            self._fitted(delta), self._like(), window=self.window, groups=self.groups, weight=self.readable_weight,
            trainable=trainable,
        )  # fmt: skip
        branch.layer = layer
        branch.set_scale(scale)
        branch.train(self.training)
        self.branches[name] = branch

    def _refuse_conflicts(self, name: str, delta: LayerDelta) -> None:
        check_name(name)
        if name in self.branches:
            raise ConflictError(f"An adapter {name!r} is already attached.", fix="Detach it, or choose another name.")
        if self.fused:
            raise ConflictError("Adapters are fused into the weights.", fix="Call unfuse first.")
        if delta.magnitude is not None and any(b.is_dora for _, b in self.adapters()):
            raise ConflictError(
                "Two DoRA adapters change one layer, and each sets its norm.", fix="Attach one of them at a time."
            )

    def _fitted(self, delta: LayerDelta) -> LayerDelta:
        """Return the delta in the shape of this layer: a 1×1 convolution and a linear layer have the same matrix."""
        shape = self.weight_shape
        if delta.weight_shape == shape:
            return delta
        if delta.weight_shape[:2] != shape[:2] or set(delta.weight_shape[2:] + shape[2:]) - {1}:
            raise ShapeError(
                f"The adapter changes a weight of shape {delta.weight_shape}, but the layer has {shape}.",
                fix="Use the model that the adapter was made for.",
            )
        return LayerDelta(delta.sums, shape, delta.magnitude, delta.magnitude_axis)

    def _like(self) -> Tensor:
        """Return an empty tensor on the device of the base, in its compute type."""
        tensors = [*self.base.parameters(), *self.base.buffers()]
        floats = [t for t in tensors if t.dtype in COMPUTED and t.dim()]
        device = tensors[0].device if tensors and not tensors[0].is_meta else None  # offloaded: on meta until it runs
        return torch.empty(0, device=device, dtype=floats[0].dtype if floats else torch.float32)

    def remove(self, name: str) -> None:
        del self.branches[name]

    def branch(self, name: str) -> Branch:
        found = dict(self.branches.items()).get(name)
        if not isinstance(found, Branch):
            raise NotFoundError(f"No adapter {name!r} is attached.", fix=f"Attached: {', '.join(self.branches)}.")
        return found

    def adapters(self) -> Iterator[tuple[str, Branch]]:
        """Yield (name, branch) in the order of attaching."""
        for name, branch in self.branches.items():
            if isinstance(branch, Branch):
                yield name, branch

    @property
    def readable_weight(self) -> Tensor | None:
        """The base weight if it is a plain tensor of the expected size; None if it is packed or quantized."""
        weight = getattr(self.base, "weight", None)
        if not isinstance(weight, Tensor) or weight.dtype not in COMPUTED or weight.is_meta:
            return None
        return weight if tuple(weight.shape) == self.weight_shape else None

    # the forward pass

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.fused or not len(self.branches):
            result: Tensor = self.base(x, *args, **kwargs)
            return result
        return self._added(x, *args, **kwargs)

    def _added(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Add the adapters to the base's output; in eager mode in place, if no one else holds that tensor."""
        raise NotImplementedError

    def _sum(self, out: Tensor, x: Tensor, in_place: bool) -> Tensor:
        """Add every adapter's contribution to `out` of the base; DoRA first, as it starts from the base alone."""
        for _, branch in sorted(self.adapters(), key=lambda item: not item[1].is_dora):
            if branch.is_dora and branch.scale:
                out = out + branch.scale * self._dora(branch, out, x)
            elif branch.scale:
                out = branch.add_to(out, x, in_place)
            in_place |= bool(branch.scale)
        return out

    def _traced_sum(self, out: Tensor, x: Tensor) -> Tensor:
        """The same for torch.compile: plain products, with the strengths as tensors."""
        total = out
        for _, branch in self.adapters():
            part = branch.strength * self._dora(branch, out, x) if branch.is_dora else branch.delta(x, branch.strength)
            total = total + part.to(out.dtype)
        return total

    def _dora(self, branch: Branch, out: Tensor, x: Tensor) -> Tensor:
        bias = getattr(self.base, "bias", None)
        return branch.dora_delta(out, x, self.base, bias, self.readable_weight)

    def _makes_new_output(self, kind: type[nn.Module]) -> bool:
        """Whether the base's output can be overwritten: an ordinary layer without hooks."""
        base = self.base
        hooked = base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks
        return plain_class(base) is kind and not hooked and "forward" not in vars(base)

    # state_dict: the base under its own names, and the factors that are stored beside it

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        if args:
            raise UsageError("state_dict takes no positional arguments.", fix="Use destination=, prefix=, keep_vars=.")
        destination = self.base.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        for name, branch in self.adapters():
            if branch.stored:
                branch.state_dict(destination=destination, prefix=f"{prefix}branches.{name}.", keep_vars=keep_vars)
        return destination

    def _give_base_its_names(self, state: dict[str, Any], prefix: str, *_: Any) -> None:
        """Before loading, map the base's own names to `base.`; factors that are not stored keep their values."""
        own = f"{prefix}branches."
        for key in [k for k in state if k.startswith(prefix) and not k.startswith((own, f"{prefix}base."))]:
            state[f"{prefix}base.{key[len(prefix) :]}"] = state.pop(key)
        for name, branch in self.adapters():
            if not branch.stored:
                state.update({f"{own}{name}.{k}": v for k, v in branch.state_dict().items()})

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={branch.scale:g}" for name, branch in self.adapters())


def check_name(name: str) -> None:
    """Raise UsageError if torch does not allow a module of this name."""
    if not name or "." in name or hasattr(nn.ModuleDict, name):
        raise UsageError(f"Invalid adapter name {name!r}.", fix="Use letters, digits, '-' and '_'.")


def fresh_terms(weight_shape: tuple[int, ...], shape: tuple[int, int], terms: int) -> KronTerms:
    """Initialize trainable factors as DiffuseKronA does: A ~ N(0, 1/a1²), B = 0.

    >>> str(fresh_terms((320, 768), (64, 4), 2).shape)
    '64x4 ⊗ 5x192'
    """
    matrix = LayerDelta((), weight_shape).matrix_shape
    sizes = split(matrix, *shape)
    check_terms(sizes, terms)
    a = torch.randn(terms, sizes.a1, sizes.a2) / sizes.a1
    return KronTerms(a, torch.zeros(terms, sizes.b1, sizes.b2))


def core(module: nn.Module) -> nn.Module:
    """Return the layer inside another library's wrapper, or the module itself."""
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module
