"""The errors that krona_hub raises deliberately, each with a cause, a fix, a stable code and an exit status.

A code never changes its meaning. `docs/errors.md` lists all of them.

    KronaError (KH100)
    ├── UsageError (KH101), also a ValueError
    ├── ShapeError (KH110), also a ValueError
    ├── FormatError (KH120), also a ValueError
    │   ├── PickleError (KH121)
    │   ├── WebPageError (KH122)
    │   ├── LfsPointerError (KH123)
    │   ├── TruncatedError (KH124)
    │   ├── StructureError (KH125)
    │   ├── UnrecognisedError (KH126)
    │   ├── AmbiguousError (KH127)
    │   ├── UnsupportedError (KH128)
    │   ├── IncompleteError (KH129)
    │   ├── DtypeError (KH150)
    │   ├── NonFiniteError (KH151)
    │   └── ScaleError (KH152)
    ├── SchemaError (KH130), also a ValueError
    │   └── NewerSchemaError (KH131)
    ├── LossyError (KH140)
    │   └── InexpressibleError (KH141)
    ├── NoDifferenceError (KH142)
    ├── BaseMismatchError (KH160)
    ├── UnknownBaseError (KH161)
    ├── ConflictError (KH170)
    ├── IntegrityError (KH180)
    ├── NotFoundError (KH190), also a FileNotFoundError
    ├── ResourceError (KH200)
    ├── OfflineError (KH210)
    ├── AuthError (KH220)
    ├── RateLimitError (KH230)
    ├── DataError (KH240)
    ├── DivergedError (KH241)
    ├── NoDeviceError (KH242)
    └── StoppedError (KH243)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, TypeVar

E = TypeVar("E", bound="KronaError")


def abbreviated(names: Iterable[str], most: int = 3) -> str:
    """Join the first `most` names for a message, followed by the number of names left out.

    >>> abbreviated(["a", "b", "c", "d", "e"]), abbreviated(["a", "b"])
    ('a, b, c and 2 more', 'a, b')
    """
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def one_of(names: Sequence[str], most: int = 4) -> str:
    """Name alternatives, at most some of them.

    >>> one_of(["a"]), one_of(["a", "b", "c"]), one_of(["a", "b", "c"], most=1)
    ('a', 'a, b or c', 'a or 2 more')
    """
    *first, last = names if len(names) <= most else [*names[:most], f"{len(names) - most} more"]
    return f"{', '.join(first)} or {last}" if first else last


def counted(number: int, word: str) -> str:
    """Join a number and a noun for a message, the noun in the plural unless the number is 1.

    >>> counted(1, "vector"), counted(1200, "vector")
    ('1 vector', '1,200 vectors')
    """
    return f"{number:,} {word}{'' if number == 1 else 's'}"


SPECIFY_BASE = (
    "Specify the base model with --base: a catalog name, a Hub id, a checkpoint file of any model, a diffusers or "
    "component folder, or a folder with only its config.json."
)


class KronaError(Exception):
    """Base class of all errors that a user can fix; any other exception is a bug in krona_hub.

    The module docstring shows the tree of subclasses.

    Parameters
    ----------
    cause : str
        What went wrong, in one line; names the file, the option and the value.
    fix : str, default ""
        What the user can do about it, in one line in the imperative.

    Attributes
    ----------
    code : str
        Stable identifier of the class, such as ``"KH110"``.
    exit_code : int
        Exit status of the command line for this error.

    Examples
    --------
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
        """Support pickling, so that errors cross process boundaries: pickle drops the keyword argument `fix`."""
        return partial(type(self), fix=self.fix), (self.cause,)

    def within(self: E, context: str) -> E:
        """Prefix the cause with a file or layer name, in place, and return this error.

        Inner code states the cause; outer code adds the location.
        """
        self.cause = f"{context}: {self.cause}"
        return self


class UsageError(KronaError, ValueError):
    """Contradictory options, or an invalid or missing argument."""

    code = "KH101"


class ShapeError(KronaError, ValueError):
    """Tensor sizes or Kronecker shapes that do not fit each other or the weight."""

    code = "KH110"


class FormatError(KronaError, ValueError):
    """A file that is not a valid adapter of the expected format."""

    code = "KH120"


class PickleError(FormatError):
    """A pickle file (`.pt`, `.ckpt`, `.bin`), detected by its content or its name; krona never loads pickles."""

    code = "KH121"


class WebPageError(FormatError):
    """An HTML page or a server's error message that was saved in place of the file."""

    code = "KH122"


class LfsPointerError(FormatError):
    """A Git LFS pointer file in place of the file that it refers to."""

    code = "KH123"


class TruncatedError(FormatError):
    """An empty file, or a file shorter than its header declares."""

    code = "KH124"


class StructureError(FormatError):
    """A safetensors file whose header violates the safetensors specification."""

    code = "KH125"


class UnrecognisedError(FormatError):
    """A valid safetensors file that does not contain an adapter of a known format."""

    code = "KH126"


class AmbiguousError(FormatError):
    """A file that can be read in more than one way; specify `--from`, `--base` or `--component`."""

    code = "KH127"


class UnsupportedError(FormatError):
    """An unsupported algorithm (OFT, IA3, …), quantized tensors, or an operation that the format does not allow."""

    code = "KH128"


class IncompleteError(FormatError):
    """Missing tensors or files, or tensors that do not belong to any module."""

    code = "KH129"


class SchemaError(KronaError, ValueError):
    """A native file whose header violates the schema version that it declares."""

    code = "KH130"


class NewerSchemaError(SchemaError):
    """A native file with a newer major schema version than this version of krona_hub can read."""

    code = "KH131"


class LossyError(KronaError):
    """A result that would lose more than the allowed error; nothing is written."""

    code, exit_code = "KH140", 3
    report: Any = None  # report of the rejected result, if it was measured


class InexpressibleError(LossyError):
    """A delta that the target format cannot represent exactly or within the error limit."""

    code = "KH141"


class NoDifferenceError(KronaError):
    """Two checkpoints that are identical or differ only by rounding."""

    code = "KH142"


class DtypeError(FormatError):
    """A tensor with an unknown dtype, or with a dtype that adapters do not use."""

    code = "KH150"


class NonFiniteError(FormatError):
    """NaN or infinite values in a tensor, or produced by a cast."""

    code = "KH151"


class ScaleError(FormatError):
    """An alpha or a rank that does not yield a usable scale."""

    code = "KH152"


class BaseMismatchError(KronaError):
    """Layers that are missing from the base model or have other shapes in it."""

    code, exit_code = "KH160", 5


class UnknownBaseError(KronaError):
    """A required base model that was not specified or is unknown; any checkpoint or folder is accepted by --base."""

    code = "KH161"


class ConflictError(KronaError):
    """A conflict with existing data, such as an output that already exists or two adapters for the same layer."""

    code, exit_code = "KH170", 5


class IntegrityError(KronaError):
    """Content that does not match its digest, its size or what was written."""

    code, exit_code = "KH180", 6


class NotFoundError(KronaError, FileNotFoundError):
    """A path, a repository, a revision, a file or a layer that does not exist."""

    code, exit_code = "KH190", 7

    def __str__(self) -> str:  # FileNotFoundError formats its own arguments
        return KronaError.__str__(self)


class ResourceError(KronaError):
    """A full disk, missing permissions, insufficient memory, or an exceeded size limit."""

    code, exit_code = "KH200", 8


class AuthError(KronaError):
    """A missing or invalid Hub token, or a token without the required access."""

    code, exit_code = "KH220", 4


class OfflineError(KronaError):
    """The Hub cannot be reached, the transfer was interrupted, or offline mode is enabled."""

    code, exit_code = "KH210", 10


class RateLimitError(KronaError):
    """Too many requests to the Hub."""

    code, exit_code = "KH230", 9


class DataError(KronaError):
    """Training images or captions that cannot be used; the message names the files."""

    code = "KH240"


class DivergedError(KronaError):
    """Training diverged: the loss became NaN or infinite."""

    code, exit_code = "KH241", 8


class NoDeviceError(KronaError):
    """A device that this machine does not have, or a missing package for it."""

    code, exit_code = "KH242", 8


class StoppedError(KronaError):
    """Training was stopped by the user; the last state is saved."""

    code, exit_code = "KH243", 130
