"""Which files of a repository krona touches at all: exact rules for their names, since anybody may choose them."""

from __future__ import annotations

import re
from collections.abc import Iterable

from krona_hub.checkpoints.file_names import SAFETENSORS
from krona_hub.errors import ConflictError

SUFFIXES = (SAFETENSORS, ".json", ".md", ".png", ".jpg", ".jpeg", ".webp", ".sig")
LONGEST = 180  # characters of one part of a name
_ODD = re.compile(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069\\:*?\"<>|]")
_DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


def is_safe(name: str) -> bool:
    """Whether a file of that name may be written inside a folder of ours, on any system.

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
    """Whether a name stays inside the folder that it is put into. Bases have tokenizers of many suffixes.

    >>> is_inside("tokenizer/spiece.model"), is_inside("../x.json"), is_inside(".git/config.json")
    (True, False, False)
    """
    return all(map(_is_safe_part, name.split("/")))


def check_collisions(names: Iterable[str]) -> None:
    """Raise ConflictError where two names are one on a system that does not tell capitals from small letters."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(name.casefold(), name)
        if other != name:
            raise ConflictError(
                f"the repository holds both {printable(other)} and {printable(name)}, which many disks cannot.",
                fix="Name the one file that you want: ns/name/FILE.",
            )


def printable(text: str, most: int = 120) -> str:
    """Text of others for the screen: without what steers a terminal, and not endless.

    >>> printable("a\\x1b[31mb")
    'a?[31mb'
    """
    clean = re.sub(r"[\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2066-\u2069]", "?", text)
    return clean if len(clean) <= most else f"{clean[:most]}…"
