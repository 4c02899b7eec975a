"""Factors of the strength for parts of a model: regular expressions of layer names. Torch-free."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from krona_hub.checkpoints.os_errors import fault
from krona_hub.errors import UsageError

_FORM = "Write lines such as `unet\\.mid_block = 0.5`, or a TOML or JSON table of them."


class BlockWeights:
    """Patterns that are searched for in canonical layer names; the first that is found gives the factor.

    >>> factors = BlockWeights({r"mid_block": 0.5, r"attn2\\.to_[kv]$": 0.0})
    >>> factors.of("unet.mid_block.attentions.0.proj_in"), factors.of("unet.conv_in")
    (0.5, 1.0)
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = {pattern: (_compiled(pattern), _number(pattern, w)) for pattern, w in weights.items()}
        self._used: set[str] = set()

    def of(self, layer: str) -> float:
        """The factor of a layer, 1 where no pattern is found in its name."""
        for pattern, (compiled, weight) in self._weights.items():
            if compiled.search(layer):
                self._used.add(pattern)
                return weight
        return 1.0

    def check_used(self) -> None:
        """Raise UsageError for a pattern that gave no layer its factor."""
        unused = [pattern for pattern in self._weights if pattern not in self._used]
        if unused:
            raise UsageError(
                f"the block weight {unused[0]!r} is found in no layer of the adapters, or earlier ones hide it.",
                fix="Patterns are searched for in names such as unet.mid_block.attentions.0.proj_in; the first found "
                "counts.",
            )


def read_block_weights(path: str | Path) -> dict[str, float]:
    """The factors in a file: TOML, JSON, or lines `regex = weight` with `#` before a comment.

    Raises UsageError for a line that is none of them, NotFoundError without the file.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise fault(error, path) from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text.", fix=_FORM) from None
    table = _table(path, text)
    if not table:
        raise UsageError(f"{path} holds no block weight.", fix=_FORM)
    return {pattern: _number(pattern, weight) for pattern, weight in table.items()}


def _table(path: Path, text: str) -> dict[str, Any]:
    if path.suffix in (".toml", ".json"):
        try:
            found = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
        except ValueError as error:
            raise UsageError(f"{path}: {error}.", fix=_FORM) from None
        return found if isinstance(found, dict) else {}
    return dict(_line(path, n, line) for n, line in enumerate(text.splitlines(), 1) if line.split("#")[0].strip())


def _line(path: Path, number: int, line: str) -> tuple[str, str]:
    pattern, equals, weight = line.split("#")[0].rpartition("=")
    if not equals or not pattern.strip():
        raise UsageError(f"line {number} of {path} is no `regex = weight`: {line.strip()!r}.", fix=_FORM)
    return pattern.strip().strip("\"'"), weight.strip()


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(f"the block weight {pattern!r} is no regular expression: {error}.", fix=_FORM) from None


def _number(pattern: str, weight: Any) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise UsageError(f"the block weight of {pattern!r} is {weight!r}, no finite number.", fix=_FORM)
    return number
