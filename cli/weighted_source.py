"""`FILE:w` on the command line: an adapter and its strength."""

from __future__ import annotations

import re
from math import isfinite
from pathlib import Path
from typing import NamedTuple

import click
from click.shell_completion import CompletionItem

from krona_hub.errors import UsageError

NUMBER = re.compile(r"[+-]?(?:(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?|nan|inf(?:inity)?)", re.IGNORECASE)


class WeightedArgument(NamedTuple):
    """An adapter, as a path or a Hub id, with its strength."""

    source: str
    weight: float = 1.0  # any sign; 0 adds nothing

    def __str__(self) -> str:
        return self.source if self.weight == 1 else f"{self.source}:{self.weight:g}"


def parse_weighted(text: str) -> WeightedArgument:
    """Parse `FILE:w`: w is the number after the last colon, if there is one. An existing path is not split.

    >>> parse_weighted("style.safetensors:0.6"), parse_weighted("hf://ns/name@v1:-1")
    (WeightedArgument(source='style.safetensors', weight=0.6), WeightedArgument(source='hf://ns/name@v1', weight=-1.0))
    >>> parse_weighted("C:/style.safetensors")
    WeightedArgument(source='C:/style.safetensors', weight=1.0)
    """
    source, _, tail = text.rpartition(":")
    if not source or not NUMBER.fullmatch(tail) or Path(text).exists():
        return WeightedArgument(text)
    weight = float(tail)
    if not isfinite(weight):
        raise UsageError(
            f"Invalid strength {tail!r} in {text}.", fix="Use a finite number after the colon, e.g. :0.8 or :-1."
        )
    return WeightedArgument(source, weight)


class WeightedSource(click.ParamType):
    """The click type of `FILE:w`; the shell completes file names."""

    name = "FILE[:w]"

    def convert(
        self, value: str | WeightedArgument, param: click.Parameter | None, ctx: click.Context | None
    ) -> WeightedArgument:
        return parse_weighted(value) if isinstance(value, str) else value

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        return [CompletionItem(incomplete, type="file")]
