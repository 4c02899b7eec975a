"""Train Kronecker adapters: settings, images, model families, the training loop and its outputs.

`check_training` is imported on first use, because settings and presets do not need torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from krona_hub.training.api import check_training as check_training

LAZY = ("check_training",)


def __getattr__(name: str) -> Any:
    if name not in LAZY:
        raise AttributeError(f"module 'krona_hub.training' has no attribute {name!r}")
    from krona_hub.training import api

    return getattr(api, name)
