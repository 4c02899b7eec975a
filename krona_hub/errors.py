"""Every error krona_hub raises on purpose.

An error is one line of cause and one line of fix, with a code that never changes its meaning and the
exit status that the command line returns for it. `docs/errors.md` lists them all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

E = TypeVar("E", bound="KronaError")


def abbreviated(names: Iterable[str], most: int = 3) -> str:
    """The first `most` of some names as a message lists them, and how many more there are.

    >>> abbreviated(["a", "b", "c", "d", "e"]), abbreviated(["a", "b"])
    ('a, b, c and 2 more', 'a, b')
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


class KronaError(Exception):
    """Base of all errors a user can fix. Anything else that escapes is a bug in krona_hub.

    >>> error = ShapeError("3 does not divide 4.", fix="Choose 1, 2 or 4.")
    >>> str(error), error.code, error.exit_code
    ('3 does not divide 4. Choose 1, 2 or 4.', 'KH110', 2)
    >>> str(error.within("layer x"))
    'layer x: 3 does not divide 4. Choose 1, 2 or 4.'
    """

    code = "KH100"
    exit_code = 2

    def __init__(self, cause: str, *, fix: str = "") -> None:
        super().__init__(cause, fix)
        self.cause = cause
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.cause} {self.fix}".strip()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """So that an error crosses from one process to another (a keyword is nothing that pickle passes on)."""
        return partial(type(self), fix=self.fix), (self.cause,)

    def within(self: E, context: str) -> E:
        """The same error with the file or the layer in front: inner code states the cause, outer adds where."""
        self.cause = f"{context}: {self.cause}"
        return self


class UsageError(KronaError, ValueError):
    """Options that contradict each other, or an argument that means nothing."""

    code = "KH101"


class ShapeError(KronaError, ValueError):
    """Tensors whose sizes cannot mean what the caller says they mean."""

    code = "KH110"


class FormatError(KronaError, ValueError):
    """A file that is not, or is a broken, adapter of the format asked for."""

    code = "KH120"


class PickleError(FormatError):
    """A pickle (`.pt`, `.ckpt`, `.bin`), whatever its name says. Never opened."""

    code = "KH121"


class WebPageError(FormatError):
    """An HTML page saved in place of a file."""

    code = "KH122"


class LfsPointerError(FormatError):
    """A git-lfs pointer: the text that stands for the real file."""

    code = "KH123"


class TruncatedError(FormatError):
    """An empty file, or one that ends before its header says."""

    code = "KH124"


class StructureError(FormatError):
    """A safetensors file whose header is not what the specification allows."""

    code = "KH125"


class UnrecognisedError(FormatError):
    """A sound safetensors file that holds no adapter krona_hub knows."""

    code = "KH126"


class AmbiguousError(FormatError):
    """A file that two readings fit; `--from`, `--base` or `--component` settles it."""

    code = "KH127"


class UnsupportedError(FormatError):
    """An algorithm that is no Kronecker product (LoHa, OFT, …), or a quantised tensor."""

    code = "KH128"


class IncompleteError(FormatError):
    """A module with a missing half, or keys that belong to nothing."""

    code = "KH129"


class SchemaError(KronaError, ValueError):
    """A krona file whose header breaks its own schema version."""

    code = "KH130"


class NewerSchemaError(SchemaError):
    """A krona file of a newer major version than this krona_hub reads."""

    code = "KH131"


class LossyError(KronaError):
    """A conversion that would lose something the caller did not agree to lose."""

    code, exit_code = "KH140", 3
    report: Any = None  # the ConversionReport of what was not written, where it was measured


class InexpressibleError(LossyError):
    """A delta that the target format cannot hold exactly."""

    code = "KH141"


class NoDifferenceError(KronaError):
    """Two checkpoints that are equal, or differ by nothing but the rounding of their numbers."""

    code = "KH142"


class DtypeError(FormatError):
    """A tensor of a type that adapters do not use."""

    code = "KH150"


class NonFiniteError(FormatError):
    """NaN or infinity in a tensor, or produced by a cast."""

    code = "KH151"


class ScaleError(FormatError):
    """An alpha or a rank that gives no usable scale."""

    code = "KH152"


class BaseMismatchError(KronaError):
    """Layers that the base model does not have, or has with other shapes."""

    code, exit_code = "KH160", 5


class UnknownBaseError(KronaError):
    """A base that is needed and was not given, or a name that is in no catalogue."""

    code = "KH161"


class ConflictError(KronaError):
    """Something is in the way: an output that exists, two adapters on one tensor."""

    code, exit_code = "KH170", 5


class IntegrityError(KronaError):
    """What was read back is not what was written."""

    code, exit_code = "KH180", 6


class NotFoundError(KronaError, FileNotFoundError):
    """A path, a repository or a file that does not exist."""

    code, exit_code = "KH190", 7

    def __str__(self) -> str:  # FileNotFoundError formats its own arguments
        return KronaError.__str__(self)


class ResourceError(KronaError):
    """The disk is full, the place is not writable, memory or a limit is exceeded."""

    code, exit_code = "KH200", 8


class AuthError(KronaError):
    """The Hub wants a token, or the token has no access."""

    code, exit_code = "KH220", 4


class OfflineError(KronaError):
    """The network is needed and cannot be reached."""

    code, exit_code = "KH210", 10


class RateLimitError(KronaError):
    """The Hub wants fewer requests."""

    code, exit_code = "KH230", 9


class DataError(KronaError):
    """Training pictures or captions that cannot be used: each bad file is named."""

    code = "KH240"


class DivergedError(KronaError):
    """A training whose loss is no number any more."""

    code, exit_code = "KH241", 8


class NoDeviceError(KronaError):
    """A device that this machine does not have, or a package for it that is not installed."""

    code, exit_code = "KH242", 8


class StoppedError(KronaError):
    """A training that was stopped on purpose; its last state is saved."""

    code, exit_code = "KH243", 130
