"""Training: settings, pictures, the kinds of models, the loop and what it leaves behind.

`check_training` and `train` are imported when they are first used: settings and presets need no torch.
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
