"""What an adapted model computes, measured through the forward passes of its modules: W' − W of every parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from krona_hub.adapters.adapter import canonical_name

LAYERS = (nn.Linear, nn.Conv2d)
NORMS = (nn.LayerNorm, nn.GroupNorm)
NOTHING = 1e-12  # differences of float64 forward passes below this are rounding


def deltas(base: nn.Module, adapted: nn.Module, component: str, changed: set[str]) -> dict[str, Tensor]:
    """Return W' − W of every weight and bias that differs, by canonical layer or parameter name, in float64.

    Weights are measured for the modules in `changed`, biases for all of them. Of every other weight it is checked that
    the adapted model still contains the tensor of the base.
    """
    found = {}
    for path, module in base.named_modules():
        if not isinstance(module, LAYERS + NORMS):
            continue
        wrapped = adapted.get_submodule(path)
        name = canonical_name(f"{component}.{path}")
        bias = response_to_zero(wrapped, module) - response_to_zero(module, module)
        if bias.abs().max() > NOTHING:
            found[f"{name}.bias"] = bias
        if path in changed:
            weight = measured_weight(wrapped, module) - measured_weight(module, module)
            if weight.abs().max() > NOTHING:
                found[f"{name}.weight" if isinstance(module, NORMS) else name] = weight
        else:
            kept = getattr(wrapped, "base_layer", wrapped).weight
            assert torch.equal(kept.double(), module.weight.double()), path
    return found


def measured_weight(module: Callable[[Tensor], Tensor], like: nn.Module) -> Tensor:
    """The weight with which `module`, of the kind and size of `like`, multiplies its input."""
    if isinstance(like, nn.Linear):
        eye = torch.eye(like.in_features, dtype=torch.float64)
        return (module(eye) - response_to_zero(module, like)).T.contiguous()
    if isinstance(like, nn.Conv2d):
        return _kernel(module, like)
    signs, normalized = _norm_input(like)
    bias = response_to_zero(module, like).reshape(1, -1, *[1] * (signs.ndim - 2))
    return ((module(signs) - bias) / normalized).movedim(1, 0).flatten(1).mean(1)


def response_to_zero(module: Callable[[Tensor], Tensor], like: nn.Module) -> Tensor:
    """What `module` returns for an input of zeros, which is its bias; norms of zeros are zeros."""
    if isinstance(like, nn.Linear):
        return module(torch.zeros(1, like.in_features, dtype=torch.float64))[0]
    if isinstance(like, nn.LayerNorm):
        return module(torch.zeros(1, *like.normalized_shape, dtype=torch.float64))[0]
    channels = like.in_channels if isinstance(like, nn.Conv2d) else like.num_channels
    return module(torch.zeros(1, channels, 8, 8, dtype=torch.float64))[0, :, 0, 0]


def _kernel(module: Callable[[Tensor], Tensor], conv: nn.Conv2d) -> Tensor:
    """Impulses at every place that the second output pixel looks at, one input channel at a time."""
    bias = response_to_zero(module, conv)
    weight = torch.empty(conv.weight.shape, dtype=torch.float64)
    corner = [s - p for s, p in zip(conv.stride, conv.padding, strict=True)]
    for y in range(conv.kernel_size[0]):
        for x in range(conv.kernel_size[1]):
            impulses = torch.zeros(conv.in_channels, conv.in_channels, 8, 8, dtype=torch.float64)
            channel = torch.arange(conv.in_channels)
            impulses[channel, channel, corner[0] + y, corner[1] + x] = 1
            weight[:, :, y, x] = (module(impulses)[:, :, 1, 1] - bias).T
    return weight


def _norm_input(norm: nn.LayerNorm | nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Return an input of mean 0 and variance 1 in every group, and the same after normalization without weights."""
    if isinstance(norm, nn.LayerNorm):
        signs = torch.ones(1, norm.normalized_shape[0], dtype=torch.float64)
        signs[:, 1::2] = -1
    else:
        signs = torch.ones(1, norm.num_channels, 2, 1, dtype=torch.float64)
        signs[:, :, 1] = -1
    return signs, signs / (1 + norm.eps) ** 0.5


def perturb(parameters: Mapping[str, nn.Parameter], seed: int, dtype: torch.dtype, std: float = 0.1) -> None:
    """Add noise to every parameter, so that no factor is zero, and round it to the dtype that is saved."""
    random = torch.Generator().manual_seed(seed)
    for _, parameter in sorted(parameters.items()):
        noise = torch.randn(parameter.shape, generator=random) * std
        parameter.data = (parameter.data + noise).to(dtype).to(parameter.dtype)
