"""Numbers as text, for the screen and for HTML reports. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from math import isfinite
from typing import Any


def human_bytes(count: int) -> str:
    """Format a number of bytes with a decimal unit.

    >>> human_bytes(512), human_bytes(3_227_336), human_bytes(5_500_000_000)
    ('512 B', '3.2 MB', '5.5 GB')
    """
    size, units = float(count), ["B", "kB", "MB", "GB"]
    while size >= 999.95 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{count} B" if units[0] == "B" else f"{size:.1f} {units[0]}"


def percent(share: float) -> str:
    """Format a share as a percentage that keeps values near 0 % and near 100 % distinguishable from them.

    >>> percent(0.5), percent(0.0123), percent(0.00004), percent(0.0)
    ('50 %', '1.2 %', '0.004 %', '0 %')
    >>> percent(0.99884), percent(1.0)
    ('99.9 %', '100 %')
    """
    if share > 0.99:
        return f"{100 - float(f'{100 * (1 - share):.1g}'):.9g} %"
    return f"{100 * share:.2g} %" if share < 0.0995 else f"{100 * share:.0f} %"


def relative(error: float) -> str:
    """Format a relative error with two significant digits.

    >>> relative(0.0), relative(3.2e-7), relative(0.0487)
    ('0', '3.2e-07', '0.049')
    """
    return "0" if error == 0 else f"{error:.2g}"


def rate(nbytes: int, seconds: float) -> str:
    """Format a duration, with the throughput if there were enough bytes to measure it.

    >>> rate(5_100_000_000, 3.4), rate(20_000, 0.003)
    ('3.4 s, 1.5 GB/s', '0.0 s')
    """
    speed = f", {human_bytes(round(nbytes / seconds))}/s" if nbytes > 100_000_000 and seconds > 0 else ""
    return f"{seconds:.1f} s{speed}"


def plain(value: Any) -> Any:
    """Convert a value for JSON: dataclasses and named tuples become objects, paths text, NaN and infinity null.

    >>> from pathlib import Path
    >>> from krona_hub.kron.shapes import KronShape
    >>> plain({"shape": KronShape(1, 2, 3, 4), "path": Path("a/b"), "error": float("nan")})
    {'shape': {'a1': 1, 'a2': 2, 'b1': 3, 'b2': 4}, 'path': 'a/b', 'error': None}
    """
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if isfinite(value) else None
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: plain(v) for name, v in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(v) for v in value]
    return plain(value.value) if isinstance(value, Enum) else str(value)
