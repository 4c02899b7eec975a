"""What a file without readable modules is instead: a foreign algorithm, a checkpoint, an embedding. Torch-free."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

from krona_hub.bases import detection
from krona_hub.bases.loading import base_in_file
from krona_hub.bases.weight_files import has_ema
from krona_hub.errors import KronaError, UnrecognisedError, UnsupportedError, counted
from krona_hub.formats.parsing.adapter_file import EXTRACT, AdapterFile
from krona_hub.formats.parsing.foreign import is_whole_weight, refuse_scaled, unsupported

MOST_WEIGHTS = 0.5  # share of tensors named like parameters above which a file is a model


class OtherFile(NamedTuple):
    """A kind of file that is often beside adapters."""

    sign: re.Pattern[str]  # start of one of its keys
    cause: str
    fix: str


OTHER_FILES = (
    OtherFile(
        re.compile(r"lora_controlnet$"),
        "This is a Control-LoRA of Stability AI: a ControlNet, stored as low-rank differences and weights of its own.",
        "Load it as a ControlNet, for example in ComfyUI.",
    ),
    OtherFile(
        re.compile(r"controlnet_|control_model\.|input_hint_block\."),
        "This is a ControlNet, a model of its own, not an adapter of weights.",
        "Load it as a ControlNet, for example with ControlNetModel of diffusers.",
    ),
    OtherFile(
        re.compile(r"(image_proj|ip_adapter|ip-adapter)\."),
        "This is an IP-Adapter, which adds layers to the model instead of changing weights.",
        "Load it with load_ip_adapter of diffusers.",
    ),
    OtherFile(
        re.compile(r"(clip_[lgh]|emb_params|string_to_param|<.*>|bundle_emb\..*)$"),
        "This is a textual-inversion embedding, not an adapter of weights.",
        "Load it with load_textual_inversion of diffusers.",
    ),
    OtherFile(
        re.compile(r"((first_stage_model|vae)\.)?decoder\.(conv_in|mid|up_blocks)\b"),
        "This is an autoencoder (VAE), which adapters do not change.",
        "Specify the file of an adapter.",
    ),
)


def refuse_whole(file: AdapterFile) -> None:
    """Raise for a file no part of which can be read rightly, with any format. Raises UnsupportedError."""
    refuse_scaled(file.keys.unknown)


def not_an_adapter(file: AdapterFile) -> KronaError:
    """Return the error for a file without a module that krona reads: what the file is instead, and the way out."""
    foreign = file.keys.foreign or {}
    if foreign:
        return _foreign(foreign)
    tensors = file.header.tensors
    if not tensors:
        return UnrecognisedError("The file contains no tensors.", fix="Choose the file of an adapter.")
    model = _model(file)
    if model:
        ema = ", with EMA copies (model_ema)" if has_ema(tensors) else ""
        return UnrecognisedError(f"This is a checkpoint of {model}{ema}, not an adapter.", fix=EXTRACT)
    for other in OTHER_FILES:
        if any(other.sign.match(key) for key in tensors):
            return UnsupportedError(other.cause, fix=other.fix)
    count = f"{counted(len(tensors), 'tensor')}, e.g. {min(tensors)!r}"
    weights = sum(map(is_whole_weight, file.keys.unknown))
    if weights > MOST_WEIGHTS * len(tensors):
        return UnrecognisedError(f"The file contains whole weights ({count}), as a model does.", fix=EXTRACT)
    return UnrecognisedError(
        f"The keys belong to no adapter format that krona knows ({count}).",
        fix="Run `krona formats` for the supported formats; save the adapter with the application that trained it.",
    )


def _foreign(foreign: Mapping[str, str]) -> UnsupportedError:
    name, count = Counter(foreign.values()).most_common(1)[0]
    example = next(module for module, algorithm in foreign.items() if algorithm == name)
    others = len(foreign) - count
    rest = f", and {others} of other algorithms" if others else ""
    return unsupported(name, f" ({counted(count, 'module')}, e.g. {example!r}{rest})")


def _model(file: AdapterFile) -> str:
    """The base model whose weights the file contains, "" if none is recognized."""
    try:
        base = base_in_file(file.path, listed_only=True)
    except KronaError:
        return _part_of_model(file)
    names = " or ".join((base.family,) if base.family else base.candidates[:3])
    return names or f"an unknown model with the names of diffusers ({', '.join(base.components)})"


def _part_of_model(file: AdapterFile) -> str:
    """The base model of a shard, which has only some of its layers."""
    shapes = {
        key.removesuffix(".weight"): info.shape
        for key, info in file.header.tensors.items()
        if key.endswith(".weight") and len(info.shape) > 1
    }
    found = detection.candidates(shapes, file.metadata) if shapes else ()
    if not found or found[0].matched < MOST_WEIGHTS * len(shapes):
        return ""
    best = detection.settled(found) or found[0]
    return f"{best.base} ({best.matched} of its layers)"
