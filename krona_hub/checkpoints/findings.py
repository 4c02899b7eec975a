"""What a check found: the same facts as an error, as a value, so that one run can report many. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Literal, NamedTuple

from krona_hub import errors
from krona_hub.errors import KronaError

Severity = Literal["error", "warning"]


class Finding(NamedTuple):
    """One problem of a file: a cause, where it is, and what to do about it."""

    code: str  # of the error that it would be, KH…
    where: str  # tensor, layer or field; "" for the file as a whole
    cause: str
    fix: str
    severity: Severity = "error"

    @classmethod
    def of(cls, error: KronaError, where: str = "", severity: Severity = "error") -> Finding:
        """The finding that says what `error` says."""
        return cls(error.code, where, error.cause, error.fix, severity)

    def error(self) -> KronaError:
        """The error that says what this finding says.

        >>> str(Finding("KH110", "unet.x", "3 does not divide 4.", "Choose 1, 2 or 4.").error())
        'unet.x: 3 does not divide 4. Choose 1, 2 or 4.'
        """
        error = _CLASSES[self.code](self.cause, fix=self.fix)
        return error.within(self.where) if self.where else error


def raise_first(findings: Iterable[Finding], context: str) -> None:
    """Raise the first finding that is an error, with the file in front; warnings pass."""
    for finding in findings:
        if finding.severity == "error":
            raise finding.error().within(context)


def _subclasses(cls: type[KronaError]) -> Iterator[type[KronaError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from _subclasses(child)


_CLASSES = {cls.code: cls for cls in _subclasses(errors.KronaError) if cls.__module__ == errors.__name__}


def quoted(name: object, limit: int = 120) -> str:
    """A name from a file, safe to print: quoted, control characters escaped, cut where it is absurdly long.

    >>> quoted("unet.x"), quoted("a\\x1b[31m"), len(quoted("x" * 10_000))
    ("'unet.x'", "'a\\\\x1b[31m'", 120)
    """
    text = ascii(name) if not str(name).isprintable() else repr(name)
    return text if len(text) <= limit else text[: limit - 1] + "…"
