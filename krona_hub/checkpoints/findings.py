"""Findings of a check: errors as plain values, so that one run can report many. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from krona_hub import errors
from krona_hub.errors import KronaError

Severity = Literal["error", "warning"]


class Finding(NamedTuple):
    """One problem in a file: its cause, its location and a fix."""

    code: str  # code of the corresponding error, KH…
    where: str  # tensor, layer or field; "" for the whole file
    cause: str
    fix: str
    severity: Severity = "error"

    @classmethod
    def of(cls, error: KronaError, where: str = "", severity: Severity = "error") -> Finding:
        """Convert an error to a finding."""
        return cls(error.code, where, error.cause, error.fix, severity)

    def error(self) -> KronaError:
        """Convert this finding to an error.

        >>> str(Finding("KH110", "unet.x", "3 does not divide 4.", "Choose 1, 2 or 4.").error())
        'unet.x: 3 does not divide 4. Choose 1, 2 or 4.'
        """
        error = _CLASSES[self.code](self.cause, fix=self.fix)
        return error.within(self.where) if self.where else error


def raise_first(findings: Iterable[Finding], context: str) -> None:
    """Raise the first finding of severity "error", prefixed with `context`; ignore warnings."""
    for finding in findings:
        if finding.severity == "error":
            raise finding.error().within(context)


def _subclasses(cls: type[KronaError]) -> Iterator[type[KronaError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _subclasses(child)


_CLASSES = {cls.code: cls for cls in _subclasses(errors.KronaError) if cls.__module__ == errors.__name__}


def quoted(name: object, limit: int = 120) -> str:
    """Quote a name from a file for printing: escape control characters and truncate it to `limit` characters.

    >>> quoted("unet.x"), quoted("a\\x1b[31m"), len(quoted("x" * 10_000))
    ("'unet.x'", "'a\\\\x1b[31m'", 120)
    """
    text = ascii(name) if not str(name).isprintable() else repr(name)
    return text if len(text) <= limit else text[: limit - 1] + "…"
