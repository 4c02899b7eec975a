"""Rules for safe file names in repositories, since anyone can choose these names."""

from __future__ import annotations

import re
from collections.abc import Iterable

from krona_hub.checkpoints.file_names import SAFETENSORS
from krona_hub.errors import ConflictError

SUFFIXES = (SAFETENSORS, ".json", ".md", ".png", ".jpg", ".jpeg", ".webp", ".sig")
LONGEST = 180  # bytes of one part of a name
_ODD = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\\:*?\"<>|]")
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def is_safe(name: str) -> bool:
    """Return whether a file of that name can be written inside a folder, on any system.

    >>> is_safe("unet/style (v2).safetensors"), is_safe("../x.safetensors"), is_safe(".git/x.json"), is_safe("x.pkl")
    (True, False, False, False)
    """
    parts = name.split("/")
    return name.lower().endswith(SUFFIXES) and len(parts) <= 4 and all(map(_is_safe_part, parts))


def _is_safe_part(part: str) -> bool:
    if not part or part[0] in ".-~ " or part[-1] in ". " or len(part.encode()) > LONGEST:
        return False
    return not _ODD.search(part) and not _DEVICES.fullmatch(part)


def is_inside(name: str) -> bool:
    """Return whether a name stays inside its folder; accepts any suffix, since tokenizers use many.

    >>> is_inside("tokenizer/spiece.model"), is_inside("../x.json"), is_inside(".git/config.json")
    (True, False, False)
    """
    return all(map(_is_safe_part, name.split("/")))


def check_collisions(names: Iterable[str]) -> None:
    """Raise ConflictError if two names are equal on a case-insensitive file system."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise ConflictError(
                f"the repository contains {printable(other)} and {printable(name)}, which are equal on many disks.",
                fix="Specify the file that you want as ns/name/FILE.",
            )


def printable(text: str, most: int = 120) -> str:
    """Return untrusted text without terminal control characters, truncated to `most` characters.

    >>> printable("a\\x1b[31mb")
    'a?[31mb'
    """
    clean = re.sub(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]", "?", text)
    return clean if len(clean) <= most else f"{clean[:most]}…"
