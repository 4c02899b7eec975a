"""Kinds of vectors, and which of them files and applications have a place for. Torch-free.

ComfyUI and Forge: names measured, keys read in their source; AUTOMATIC1111 and LyCORIS: read in their source.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Literal

from krona_hub.bases.base import DENOISERS, Base

VectorKind = Literal["adapted bias", "bias", "unet norm", "transformer norm", "text norm", "other"]
Kinds = tuple[VectorKind, ...]

NORMS: Kinds = ("unet norm", "transformer norm", "text norm")
LORA_BIAS: Kinds = ("adapted bias",)
LYCORIS: Kinds = ("adapted bias", "bias", *NORMS)
ALL: Kinds = (*LYCORIS, "other")


def kind_of(
    parameter: str, sizes: int, layers: Container[str], vectors: Container[str], base: Base | None
) -> VectorKind:
    """The kind of a vector: the bias of an adapted layer or of another one, part of a norm, or another parameter.

    `sizes` is the number of its dimensions; `layers` and `vectors` are the adapted ones. Without a base model, a bias
    without a weight counts as that of a layer.

    >>> kind_of("unet.conv_in.bias", 1, {"unet.conv_in"}, (), None), kind_of("unet.norm.weight", 1, (), (), None)
    ('adapted bias', 'unet norm')
    """
    module, _, last = parameter.rpartition(".")
    if last == "bias" and module in layers:
        return "adapted bias"
    if last not in ("weight", "bias") or sizes != 1:
        return "other"
    is_norm = last == "weight" or f"{module}.weight" in vectors
    if not is_norm and (base is None or base.module(module) is not None):
        return "bias"
    component = parameter.partition(".")[0]
    if component not in DENOISERS:
        return "text norm"
    return "unet norm" if component == "unet" else "transformer norm"
