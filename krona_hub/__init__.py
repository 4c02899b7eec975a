"""Krona Hub: read, convert, merge, validate and account for Kronecker adapters of diffusion models.

Public names are imported on first use, so `import krona_hub` stays fast and does not import torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from krona_hub.version import __version__ as __version__

if TYPE_CHECKING:
    from krona_hub.adapters.adapter import Adapter as Adapter
    from krona_hub.adapters.adapter import LayerDelta as LayerDelta
    from krona_hub.adapters.provenance import BaseModel as BaseModel
    from krona_hub.calibration.api import calibrate as calibrate
    from krona_hub.calibration.api import convert_calibrated as convert_calibrated
    from krona_hub.combining import combine as combine
    from krona_hub.conversion import convert as convert
    from krona_hub.errors import KronaError as KronaError
    from krona_hub.extraction import extract as extract
    from krona_hub.formats.reading.reader import read as read
    from krona_hub.formats.writing.writer import write as write
    from krona_hub.hub import pull as pull
    from krona_hub.hub import push as push
    from krona_hub.images import generate as generate
    from krona_hub.kron.shapes import KronShape as KronShape
    from krona_hub.kron.terms import KronTerms as KronTerms
    from krona_hub.kron.terms import nearest_kron as nearest_kron
    from krona_hub.layers import KronConv2d as KronConv2d
    from krona_hub.layers import KronLinear as KronLinear
    from krona_hub.layers import attach as attach
    from krona_hub.layers import detach as detach
    from krona_hub.layers import extract_adapter as extract_adapter
    from krona_hub.layers import fuse as fuse
    from krona_hub.layers import set_scales as set_scales
    from krona_hub.layers import unfuse as unfuse
    from krona_hub.merging.api import merge as merge
    from krona_hub.merging.plan import plan_merge as plan_merge
    from krona_hub.merging.state_dict import apply_to_state_dict as apply_to_state_dict
    from krona_hub.merging.undo import unmerge as unmerge
    from krona_hub.pipelines.load_adapter import load_into as load_into
    from krona_hub.pipelines.load_adapter import unload as unload
    from krona_hub.training.api import train as train
    from krona_hub.verification import verify as verify

PUBLIC = {  # name -> defining module
    "read": "krona_hub.formats.reading.reader",
    "write": "krona_hub.formats.writing.writer",
    "convert": "krona_hub.conversion",
    "calibrate": "krona_hub.calibration.api",
    "convert_calibrated": "krona_hub.calibration.api",
    "plan_merge": "krona_hub.merging.plan",
    "merge": "krona_hub.merging.api",
    "unmerge": "krona_hub.merging.undo",
    "apply_to_state_dict": "krona_hub.merging.state_dict",
    "extract": "krona_hub.extraction",
    "combine": "krona_hub.combining",
    "verify": "krona_hub.verification",
    "train": "krona_hub.training.api",
    "generate": "krona_hub.images",
    "attach": "krona_hub.layers",
    "detach": "krona_hub.layers",
    "fuse": "krona_hub.layers",
    "unfuse": "krona_hub.layers",
    "set_scales": "krona_hub.layers",
    "extract_adapter": "krona_hub.layers",
    "load_into": "krona_hub.pipelines.load_adapter",
    "unload": "krona_hub.pipelines.load_adapter",
    "push": "krona_hub.hub",
    "pull": "krona_hub.hub",
    "KronLinear": "krona_hub.layers",
    "KronConv2d": "krona_hub.layers",
    "nearest_kron": "krona_hub.kron.terms",
    "Adapter": "krona_hub.adapters.adapter",
    "LayerDelta": "krona_hub.adapters.adapter",
    "BaseModel": "krona_hub.adapters.provenance",
    "KronShape": "krona_hub.kron.shapes",
    "KronTerms": "krona_hub.kron.terms",
    "KronaError": "krona_hub.errors",
}


def __getattr__(name: str) -> object:
    if name not in PUBLIC:
        raise AttributeError(f"module 'krona_hub' has no attribute {name!r}")
    value = getattr(import_module(PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*PUBLIC, "__version__"])
