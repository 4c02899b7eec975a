"""Block weights: factors of the strength by regular expressions of layer names. Torch-free."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from krona_hub.checkpoints.os_errors import fault
from krona_hub.errors import UsageError

_FORM = "Use lines such as `unet\\.mid_block = 0.5`, or a TOML or JSON table."


class BlockWeights:
    """Regular expressions searched for in canonical layer names; the first match determines the factor.

    >>> factors = BlockWeights({r"mid_block": 0.5, r"attn2\\.to_[kv]$": 0.0})
    >>> factors.of("unet.mid_block.attentions.0.proj_in"), factors.of("unet.conv_in")
    (0.5, 1.0)
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = {pattern: (_compiled(pattern), _number(pattern, w)) for pattern, w in weights.items()}
        self._used: set[str] = set()

    def of(self, layer: str) -> float:
        """Return the factor of a layer, 1 if no pattern matches its name."""
        for pattern, (compiled, weight) in self._weights.items():
            if compiled.search(layer):
                self._used.add(pattern)
                return weight
        return 1.0

    def check_used(self) -> None:
        """Raise UsageError for a pattern that determined the factor of no layer."""
        unused = [pattern for pattern in self._weights if pattern not in self._used]
        if unused:
            raise UsageError(
                f"Block weight pattern {unused[0]!r} matches no layer of the adapters, or only after others.",
                fix="Match names such as unet.mid_block.attentions.0.proj_in; the first matching pattern counts.",
            )


def read_block_weights(path: str | Path) -> dict[str, float]:
    """Read the factors from a file: TOML, JSON, or lines `regex = weight` with `#` comments.

    Raises UsageError for an invalid line, NotFoundError if the file does not exist.
    """
    path = Path(path)
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise fault(error, path) from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not a text file.", fix=_FORM) from None
    table = _table(path, text)
    if not table:
        raise UsageError(f"{path} contains no block weights.", fix=_FORM)
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
        raise UsageError(f"Line {number} of {path} is not of the form `regex = weight`: {line.strip()!r}.", fix=_FORM)
    return pattern.strip().strip("\"'"), weight.strip()


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise UsageError(
            f"Block weight pattern {pattern!r} is not a valid regular expression: {error}.", fix=_FORM
        ) from None


def _number(pattern: str, weight: Any) -> float:
    try:
        number = float(weight)
    except (TypeError, ValueError):
        number = float("nan")
    if not abs(number) < float("inf"):
        raise UsageError(f"Invalid block weight {weight!r} for {pattern!r}: not a finite number.", fix=_FORM)
    return number
