"""Strict parser for untrusted JSON: rejects duplicate keys, NaN, lone surrogates and deep nesting. Torch-free."""

from __future__ import annotations

import json
from math import isinf
from typing import Any, NoReturn

from krona_hub.checkpoints.findings import quoted
from krona_hub.errors import StructureError

MAX_DEPTH = 64  # levels of nesting; a header has three


def parse(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises StructureError, with the cause only, for anything else.

    >>> parse('{"a": [1, 2]}')
    {'a': [1, 2]}
    >>> parse('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    krona_hub.errors.StructureError: the key 'a' occurs twice.
    """
    try:
        decoded = text if isinstance(text, str) else text.decode("utf-8")
        value = json.loads(decoded, object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite)
        _check_depth(value)
        if "\\u" in decoded:  # only an escape can produce a lone surrogate
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeError:
        raise StructureError("it is not valid UTF-8.") from None
    except RecursionError:
        raise StructureError("it is nested too deeply.") from None
    except json.JSONDecodeError as error:
        raise StructureError(f"it is not valid JSON ({error.msg} at character {error.pos}).") from None
    except StructureError:
        raise
    except ValueError:  # int() refuses numbers of thousands of digits
        raise StructureError("it contains a number with too many digits.") from None
    if not isinstance(value, dict):
        raise StructureError("it is not a JSON object.")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in result if names.count(name) > 1)
        raise StructureError(f"the key {quoted(twice)} occurs twice.")
    return result


def _no_constant(name: str) -> NoReturn:
    raise StructureError(f"it is not valid JSON ({name} is not allowed).")


def _check_depth(value: Any) -> None:
    """Limit the nesting, iteratively: deeply nested files are an attack on recursion."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [child for item in level for child in _children(item)]
        if not level:
            return
    raise StructureError("it is nested too deeply.")


def _children(item: Any) -> list[Any]:
    values = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return [v for v in values if isinstance(v, dict | list)]


def _finite(text: str) -> float:
    """Parse a number and reject those that overflow a float, such as 1e999."""
    number = float(text)
    if isinf(number):
        raise StructureError("it contains a number that is too large.")
    return number
