"""Torch modules that apply Kronecker adapters without forming ΔW, and functions that attach them to a model."""

from krona_hub.layers.attaching import AttachReport, attach, detach, swap
from krona_hub.layers.attachment import attached, branches_of, extract_adapter, set_scales
from krona_hub.layers.fusing import fuse, unfuse
from krona_hub.layers.kron_conv import KronConv1d, KronConv2d, KronConv3d
from krona_hub.layers.kron_layer import KronLayer
from krona_hub.layers.kron_linear import KronLinear

__all__ = [
    "AttachReport",
    "KronConv1d",
    "KronConv2d",
    "KronConv3d",
    "KronLayer",
    "KronLinear",
    "attach",
    "attached",
    "branches_of",
    "detach",
    "extract_adapter",
    "fuse",
    "set_scales",
    "swap",
    "unfuse",
]
