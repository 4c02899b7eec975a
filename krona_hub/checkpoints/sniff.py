"""Identification of files that are not safetensors by their first bytes; nothing is ever loaded. Torch-free."""

from __future__ import annotations

import re
from typing import NamedTuple

from krona_hub.errors import FormatError, LfsPointerError, PickleError, TruncatedError, WebPageError

FIRST_BYTES = 512  # enough for every pattern below


class FileKind(NamedTuple):
    pattern: re.Pattern[bytes]  # matched at the first byte
    error: type[FormatError]
    cause: str
    fix: str


def _kind(pattern: bytes, error: type[FormatError], cause: str, fix: str) -> FileKind:
    return FileKind(re.compile(pattern, re.DOTALL | re.IGNORECASE), error, cause, fix)


_RESAVE = "Save it as safetensors with the application that wrote it: pickles can execute code."
_AGAIN = "Download the file again: use its direct link, and log in if the page requires it."
_GIVE = "Specify the .safetensors file of the adapter."
_UNPACK = "Unpack it, and specify the .safetensors file inside."
_SPACES = rb"(?:\xef\xbb\xbf)?\s*"

KINDS = (
    _kind(rb"\x80[\x00-\x05][\x00-\xff]", PickleError, "a pickle (.pt, .ckpt, .bin), whatever its name.", _RESAVE),
    _kind(rb"(?:\(dp|\(lp|\}q\x00|c(?:copy_reg|collections|torch|__builtin__)[\n.])", PickleError,
          "a pickle (.pt, .ckpt, .bin), whatever its name.", _RESAVE),
    _kind(rb"PK(?:\x03\x04|\x05\x06)", PickleError, "a zip archive, the container of PyTorch pickles.", _RESAVE),
    _kind(_SPACES + rb"(?:<!--.*?-->\s*)?<(?:!doctype|html|head|body|\?xml|script)", WebPageError,
          "a web page, not a model file.", _AGAIN),
    _kind(rb"version https://git-lfs", LfsPointerError, "a Git LFS pointer, not the file that it refers to.",
          "Run `git lfs pull` in its folder, or download the file itself."),
    _kind(rb"version https://hawser", LfsPointerError, "a Git LFS pointer, not the file that it refers to.",
          "Run `git lfs pull` in its folder, or download the file itself."),
    _kind(_SPACES + rb"\{.{0,400}?\"(?:error|detail|message)\"", WebPageError, "a server's error message.", _AGAIN),
    _kind(_SPACES + rb"[\[{]", FormatError, "JSON text, such as a configuration or an index.", _GIVE),
    _kind(rb"(?:invalid username|access to model|entry not found|repository not found|unauthorized|forbidden)",
          WebPageError, "a server's error message.", _AGAIN),
    _kind(rb"GGUF", FormatError, "a GGUF file.", _GIVE),
    _kind(rb"\x89HDF\r\n", FormatError, "an HDF5 file.", _GIVE),
    _kind(rb"\x93NUMPY", FormatError, "a NumPy array.", _GIVE),
    _kind(rb"(?:\x89PNG|\xff\xd8\xff|GIF8|RIFF)", FormatError, "an image.", _GIVE),
    _kind(rb"(?:\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd)", FormatError,
          "a compressed archive.", _UNPACK),
    _kind(rb".{257}ustar", FormatError, "a tar archive.", _UNPACK),
    _kind(rb"\x00+\Z", TruncatedError, "a file of zeros: an incomplete download.", _AGAIN),
)  # fmt: skip


def sniff(first: bytes) -> FormatError | None:
    """Return the error that identifies a file by its first bytes; None if no pattern matches.

    >>> sniff(b"PK\\x03\\x04").code, sniff(b"<!DOCTYPE html>").code, sniff(b"tensor")
    ('KH121', 'KH122', None)
    """
    for kind in KINDS:
        if kind.pattern.match(first):
            return kind.error(f"this is {kind.cause}", fix=kind.fix)
    return None
