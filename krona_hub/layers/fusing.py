"""Fuse adapters into the base weights of a model, and restore the weights bit by bit: `fuse`, `unfuse`.

W' = W + Σ scale · ΔW in float64, rounded once to the type of the weight, as `krona_hub.merge` does with exact rounding.
Vectors are added to their parameters in the same way. The originals are kept in CPU memory, and `unfuse` restores them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.errors import ConflictError, KronaError, NonFiniteError, UnsupportedError
from krona_hub.layers.adapter_branch import COMPUTED
from krona_hub.layers.attachment import Attachments, attachments
from krona_hub.layers.kron_layer import KronLayer
from krona_hub.layers.module_tree import models_of
from krona_hub.layers.parameter_vectors import ParameterVectors

WIDE = (torch.float32, torch.float64)


def fuse(model: Any, *, component: str | None = None) -> int:
    """Add every attached adapter, at its strength, to the base weights, biases and norms: all of them or none.

    The model then costs as much as its base, and its `state_dict` is that of the merged model.

    Parameters
    ----------
    model : diffusers pipeline or model
    component : component of a lone model, or the only component of a pipeline to change

    Returns
    -------
    int
        Number of weights, biases and other parameters that changed.

    Raises
    ------
    ConflictError
        Adapters are already fused.
    UnsupportedError
        A parameter is quantized, packed or offloaded.
    NonFiniteError
        A sum overflows the type of the weight.

    Examples
    --------
    >>> from torch import nn
    >>> from krona_hub.layers import KronLinear
    >>> model = nn.Sequential(KronLinear(nn.Linear(4, 2), shape=(2, 2)))
    >>> fuse(model)
    1
    >>> unfuse(model)
    """
    own = attachments(models_of(model, component))
    own.check_not_fused()
    weights = {path: _weight(path, layer) for path, layer in zip(own.slots, own.layers, strict=True)}
    for vectors in own.vectors:
        _check_changeable(vectors)
    try:
        layers = zip(weights, own.layers, strict=True)
        changed = sum(_fuse(path, layer, weights[path]) for path, layer in layers)
        return changed + sum(_fuse_vectors(vectors) for vectors in own.vectors)
    except KronaError:
        restore(own)
        raise


def unfuse(model: Any, *, component: str | None = None) -> None:
    """Restore the base weights bit by bit, and apply the adapters beside them again.

    If the model was cast after `fuse`, the weights are restored in the new type.

    Parameters
    ----------
    model : diffusers pipeline or model
    component : component of a lone model, or the only component of a pipeline to change

    Raises
    ------
    ConflictError
        No adapter is fused.

    Examples
    --------
    >>> from torch import nn
    >>> from krona_hub.layers import KronLinear
    >>> model = nn.Sequential(KronLinear(nn.Linear(4, 2), shape=(2, 2)))
    >>> before = model[0].weight.clone()
    >>> _ = fuse(model)
    >>> unfuse(model)
    >>> torch.equal(model[0].weight, before)
    True
    """
    own = attachments(models_of(model, component))
    if not own.is_fused:
        raise ConflictError("No adapter is fused.", fix="Call fuse first.")
    restore(own)


@torch.no_grad()
def restore(own: Attachments) -> None:
    """Undo `fuse` in every layer and parameter."""
    for layer in own.layers:
        if layer.original is not None:
            _weight("", layer).copy_(layer.original)
        layer.fused, layer.original = (), None
    for vectors in own.vectors:
        if vectors.original is not None:
            vectors.parameter.copy_(vectors.original)
        vectors.fused, vectors.original = False, None


def _weight(path: str, layer: KronLayer) -> Tensor:
    weight = layer.readable_weight
    if weight is None:
        raise _unchangeable(path, "weight")
    return weight


def _check_changeable(vectors: ParameterVectors) -> None:
    if vectors.parameter.is_meta or vectors.parameter.dtype not in COMPUTED:
        path, _, key = vectors.name.rpartition(".")
        raise _unchangeable(path, key)


def _unchangeable(path: str, key: str) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: its {key} is quantized, packed or offloaded, and cannot be changed.",
        fix="Load the model in fp32, fp16 or bf16 and without offloading, or do not fuse the adapters.",
    )


@torch.no_grad()
def _fuse(path: str, layer: KronLayer, weight: Tensor) -> bool:
    """Fuse one layer; return whether there was anything to add."""
    layer.fused = tuple(name for name, _ in layer.adapters())
    parts = [(branch.value, branch.scale) for _, branch in layer.adapters() if branch.scale]
    if not parts:
        return False
    base = weight.to(_exact_device(weight), torch.float64)
    total = base.clone()
    for delta, scale in parts:
        total.add_(exact(delta, base.device).dense(base).reshape(base.shape), alpha=scale)
    layer.original = _replace(path, weight, base, total)
    return True


@torch.no_grad()
def _fuse_vectors(vectors: ParameterVectors) -> bool:
    """Fuse the vectors of one parameter; return whether there was anything to add."""
    vectors.fused = True
    if not vectors.is_active:
        return False
    parameter = vectors.parameter
    base = parameter.to(_exact_device(parameter), torch.float64)
    vectors.original = _replace(vectors.name, parameter, base, base + vectors.exact_sum(base.device))
    return True


def _exact_device(weight: Tensor) -> torch.device:
    return torch.device("cpu") if weight.device.type == "mps" else weight.device  # MPS has no float64


def _replace(path: str, weight: Tensor, base: Tensor, total: Tensor) -> Tensor:
    """Write the sum into the weight, rounded once; return a copy of the old one, in CPU memory."""
    merged = rounded_once(total, weight.dtype)
    if not bool(merged.isfinite().all()) and bool(base.isfinite().all()):
        raise NonFiniteError(f"{path} overflows {weight.dtype}.", fix="Use smaller strengths, or a wider type.")
    original = weight.detach().to("cpu", copy=True)
    weight.copy_(merged)
    return original


def exact(delta: LayerDelta, device: torch.device) -> LayerDelta:
    """Convert the factors to float64."""
    return delta.map(lambda tensor: tensor.to(device, torch.float64))


def rounded_once(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 to `dtype` once: torch itself converts through float32, and rounds twice.

    First round to float32, setting the last bit of inexact values ("round to odd"); rounding the result again equals
    rounding once (Boldo & Melquiond, "Emulation of FMA and correctly rounded sums", 2008).

    >>> tie = torch.tensor([1 + 2.0**-8 + 2.0**-40], dtype=torch.float64)  # just above the midpoint of two bfloat16
    >>> rounded_once(tie, torch.bfloat16), tie.to(torch.bfloat16)
    (tensor([1.0078], dtype=torch.bfloat16), tensor([1.], dtype=torch.bfloat16))
    """
    if dtype in WIDE:
        return numbers.to(dtype)
    near = numbers.to(torch.float32)
    error = near.double() - numbers
    away = (error * numbers.sign() > 0) & near.isfinite()
    bits = near.view(torch.int32) - away.to(torch.int32)
    return (bits | ((error != 0) & near.isfinite()).to(torch.int32)).view(torch.float32).to(dtype)
