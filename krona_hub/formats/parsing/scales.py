"""The scale of a module's factors, by the table of FORMATS §1.1. Torch-free.

Two rules cover all formats. The *tensor rule* of LyCORIS and kohya: alpha / r with r read from the tensors; 1 without
alpha, and 1 if no factor is low-rank, regardless of alpha (ai-toolkit stores 9999999999). The *configuration rule* of
PEFT: always alpha / r from a configuration.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import isfinite, sqrt
from typing import Any

from krona_hub.errors import FormatError, ScaleError, ShapeError, UnsupportedError
from krona_hub.formats.parsing.module_layout import ModuleLayout
from krona_hub.formats.parsing.peft_fields import PLAIN_LORA, initialization

MAX_ALPHA = 1e8  # a larger alpha is a placeholder
_FIX = "Set alpha to its value in training, or convert the file with the application that wrote it."


@dataclass(frozen=True)
class ModuleScale:
    """The scale of a module, and the alpha it comes from."""

    value: float
    alpha: float | None = None
    note: str = ""  # note for the user
    initial: str = ""  # `pissa` or `olora`: first factors that were subtracted from the base weight


@dataclass(frozen=True)
class ScaleConfig:
    """The part of a PEFT configuration that sets scales."""

    kind: str  # lora, lokr or loha
    rank: float
    alpha: float
    rank_pattern: Mapping[str, Any] = field(default_factory=dict)
    alpha_pattern: Mapping[str, Any] = field(default_factory=dict)
    rs_lora: bool = False
    initial: str = ""  # how factors were initialized that were subtracted from the base; "" if none were

    def of(self, path: str) -> tuple[float, float]:
        """(alpha, rank) of the module at `path`, a path without `base_model.model.`."""
        alpha = number(pattern_value(self.alpha_pattern, path, self.alpha), "alpha")
        rank = number(pattern_value(self.rank_pattern, path, self.rank), "rank")
        if not (isfinite(rank) and rank >= 1 and rank == int(rank)):
            raise ScaleError(f"Invalid rank {rank:g} in the configuration.", fix="Set it to a positive integer.")
        return alpha, rank


def pattern_value(patterns: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value of the first pattern that matches `path` as `(.*\\.)?(key)$`, as in PEFT.

    >>> pattern_value({"to_q": 2, "attn1.to_q": 8}, "down.attn1.to_q", 4), pattern_value({"o_q": 2}, "attn1.to_q", 4)
    (2, 4)
    """
    for key, value in patterns.items():
        try:
            if re.match(rf"(.*\.)?({key})$", path):
                return value
        except (re.error, RecursionError, OverflowError):
            raise FormatError(
                f"Invalid regular expression {key!r} in the configuration.",
                fix="Correct rank_pattern and alpha_pattern in the configuration.",
            ) from None
    return default


def number(value: Any, what: str) -> float:
    """A JSON number as float. Raises ScaleError for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ScaleError(f"Invalid {what} {value!r} in the configuration.", fix=_FIX)
    try:
        return float(value)
    except OverflowError:
        raise ScaleError(f"Invalid {what} in the configuration: the number is too large.", fix=_FIX) from None


def config_of(config: Mapping[str, Any], prefix: str = "") -> ScaleConfig:
    """The ScaleConfig of a PEFT configuration whose keys start with `prefix` (`unet.` in diffusers' metadata)."""
    fields = {key.removeprefix(prefix): value for key, value in config.items() if key.startswith(prefix)}
    kind = str(fields.get("peft_type", "LORA")).rpartition(".")[2].lower()
    alpha = fields.get("lora_alpha" if kind == "lora" else "alpha", fields.get("alpha", 8))
    return ScaleConfig(
        kind=kind,
        rank=number(fields.get("r", 8), "rank"),
        alpha=number(alpha, "alpha"),
        rank_pattern=_mapping(fields.get("rank_pattern")),
        alpha_pattern=_mapping(fields.get("alpha_pattern")),
        rs_lora=bool(fields.get("use_rslora")) and kind == "lora",
        initial=initialization(fields.get("init_lora_weights", True)) if kind == "lora" else "",
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def metadata_configs(metadata: Mapping[str, str]) -> Mapping[str, ScaleConfig]:
    """Component ("" if unstated) -> configuration, from diffusers' `lora_adapter_metadata`; {} without it."""
    text = metadata.get("lora_adapter_metadata")
    if text is None:
        return {}
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        config = None
    if not isinstance(config, dict):
        raise FormatError(
            "The metadata entry lora_adapter_metadata is not a JSON object.",
            fix="Save the adapter again with diffusers.",
        )
    prefixes = {key.partition(".")[0] for key in config if key.endswith(".r")}
    found = {p: config_of(config, f"{p}.") for p in prefixes} or {"": config_of(config)}
    changed = next((c.initial for c in found.values() if c.initial), "")
    if changed:
        raise UnsupportedError(f"init_lora_weights is {changed!r}, which changed the base model.", fix=PLAIN_LORA)
    return found


def tensor_scale(layout: ModuleLayout, alpha: float | None) -> ModuleScale:
    """The scale of a module from its own tensors. Raises ScaleError if alpha is needed but not a usable number.

    >>> from krona_hub.kron.shapes import KronShape
    >>> low = ModuleLayout("lora", KronShape(1, 1, 8, 8), (8, 8), rank=4)
    >>> full = ModuleLayout("lokr", KronShape(2, 2, 4, 4), (8, 8))
    >>> tensor_scale(low, 2.0).value, tensor_scale(full, 9999999999.0).value
    (0.5, 1.0)
    """
    if alpha is None:
        return ModuleScale(1.0)
    if layout.rank is None:
        odd = layout.kind == "lokr" and not (isfinite(alpha) and abs(alpha) < MAX_ALPHA)
        return ModuleScale(1.0, alpha, f"alpha {alpha:g} ignored: both factors are full" if odd else "")
    return _scale(alpha, sqrt(layout.rank) if layout.kind == "cdka" else layout.rank)


def config_scale(config: ScaleConfig, path: str, layout: ModuleLayout) -> ModuleScale:
    """The scale of a module from a configuration. Raises ShapeError if its rank differs from that of the tensors."""
    if config.kind != layout.kind.replace("peft-conv1d", "lokr"):
        raise ScaleError(
            f"The configuration is for {config.kind}, but the module is {layout.kind}.",
            fix="Use the configuration saved with this adapter; this one belongs to another file.",
        )
    alpha, rank = config.of(path)
    low = [r for r in (layout.left_rank, layout.right_rank) if r is not None]
    if layout.kind == "loha":
        low = [layout.rank or 0]
    if low and layout.kind in ("lora", "lokr", "loha") and any(r != rank for r in low):
        raise ShapeError(
            f"The tensors have rank {low[0]}, but the configuration states {rank:g}.",
            fix="Use the configuration saved with this adapter; this one belongs to another file.",
        )
    return replace(_scale(alpha, sqrt(rank) if config.rs_lora else rank), initial=config.initial)


def _scale(alpha: float, divisor: float) -> ModuleScale:
    if not (isfinite(alpha) and abs(alpha) <= MAX_ALPHA):
        raise ScaleError(f"Unusable alpha {alpha:g} for the scale alpha / {divisor:g}.", fix=_FIX)
    note = "alpha is 0: the module has no effect" if alpha == 0 else ""
    return ModuleScale(alpha / divisor, alpha, note)
