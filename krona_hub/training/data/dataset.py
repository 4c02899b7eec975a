"""Folders of pictures and their captions: found, read, checked, and told apart by a fingerprint."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from krona_hub.errors import DataError, NotFoundError, abbreviated
from krona_hub.training.configuration import ECHO
from krona_hub.training.data.images import ENDINGS, open_picture

SHIPPED = ("zorbi",)  # folders of krona_hub.assets
METADATA = "metadata.jsonl"
CAPTION_FIELDS = ("text", "caption", "prompt")  # of metadata.jsonl: what `datasets` calls it, and two usual names
REASONS = 5  # in a message


@dataclass(frozen=True)
class Example:
    """One picture of a data set, with its caption."""

    path: Path
    caption: str
    size: tuple[int, int]  # (width, height) upright, pixels
    weight: float = 1.0  # of its loss


@dataclass(frozen=True)
class Data:
    """What a folder holds, and what of it cannot be used."""

    examples: tuple[Example, ...]
    bad: Mapping[str, str]  # file name -> why it cannot be read

    @property
    def fingerprint(self) -> str:
        """sha256 of the names, bytes and captions: a resumed training must see the same."""
        digest = sha256()
        for e in self.examples:
            digest.update(f"{e.path.name}\0{e.caption}\0{e.weight}\0".encode())
            digest.update(sha256(e.path.read_bytes()).digest())
        return digest.hexdigest()


def read_folder(folder: str | Path, prompt: str = "", *, skip_bad: bool = False, captions: bool = True) -> Data:
    """The pictures of a folder and of the folders in it, sorted by name; hidden files are left out.

    A caption is what `metadata.jsonl` says, else a `.txt` file of the same name, else `prompt`. Raises NotFoundError
    without the folder, DataError where there is no picture, where one has no caption, and, unless `skip_bad`, where
    one cannot be read: all such files are named.
    """
    place = pictures_of(folder)
    if not place.is_dir():
        raise NotFoundError(f"there is no folder {str(folder)!r}.", fix="Give the folder with the pictures: --data.")
    told = _metadata(place)
    if captions and not skip_bad:
        _check_table(place, told)
    examples, bad = [], {}
    for path in picture_files(place):
        name = path.relative_to(place).as_posix()
        try:
            examples.append(Example(path, _caption(path, told.get(name), prompt, captions), open_picture(path).size))
        except DataError as error:
            bad[name] = error.cause
    _check(place, examples, bad, skip_bad)
    if captions:
        _check_captions(examples)
    return Data(tuple(examples), bad)


def pictures_of(source: str | Path) -> Path:
    """The folder of the pictures that ship in the package, by name; any other source as a path, which comes first.

    >>> pictures_of("zorbi").name, str(pictures_of("photos/mine"))
    ('zorbi', 'photos/mine')
    """
    path = Path(source).expanduser()
    if str(source) not in SHIPPED or _holds_pictures(path):
        return path
    return Path(str(files("krona_hub.assets"))) / str(source)


def _holds_pictures(path: Path) -> bool:
    """Pictures to learn from: the run folder of a training that was named after them has samples at most."""
    return not (path / ECHO).is_file() and bool(picture_files(path))


def picture_files(folder: Path) -> list[Path]:
    """Every file that looks like a picture, in the order of their names."""
    pictures = (p for p in folder.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
    return sorted((p for p in pictures if not _hidden(p.relative_to(folder))), key=lambda p: p.as_posix())


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _check(folder: Path, examples: list[Example], bad: Mapping[str, str], skip_bad: bool) -> None:
    if bad and not skip_bad:
        told = "; ".join(list(bad.values())[:REASONS]).rstrip(".")
        more = f"; and {len(bad) - REASONS} more" if len(bad) > REASONS else ""
        raise DataError(
            f"{len(bad)} of {len(bad) + len(examples)} pictures cannot be used: {told}{more}.",
            fix="Remove or replace them, or continue without them: --skip-bad.",
        )
    if not examples:
        raise DataError(f"there is no picture in {folder}.", fix=f"Krona reads {', '.join(ENDINGS)}.")


def _check_captions(examples: Iterable[Example]) -> None:
    without = [e.path.name for e in examples if not e.caption]
    if without:
        raise DataError(
            f"{len(without)} pictures have no caption: {abbreviated(without)}.",
            fix='Give --prompt "a photo of sks toy", or a .txt file beside each.',
        )


def _caption(path: Path, told: str | None, prompt: str, wanted: bool) -> str:
    beside = path.with_suffix(".txt")
    if told is not None or not wanted:
        return (told or prompt).strip()
    if not beside.is_file():
        return prompt
    return " ".join(_text(beside).split()) or prompt


def _text(file: Path) -> str:
    """Of a file that may begin with the mark that Windows puts there."""
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name} is no UTF-8 text.", fix="Save the captions as UTF-8.") from error


def _metadata(folder: Path) -> dict[str, str]:
    """File name, with its folder -> caption, of every metadata.jsonl below."""
    found: dict[str, str] = {}
    for file in sorted(folder.rglob(METADATA)):
        prefix = file.parent.relative_to(folder)
        for number, line in enumerate(_text(file).split("\n"), 1):
            if line.strip():
                name, caption = _line(file, number, line)
                found[(prefix / name).as_posix()] = caption
    return found


def _check_table(folder: Path, told: Mapping[str, str]) -> None:
    """A misspelt name would leave its picture with another caption."""
    missing = [name for name in told if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} pictures of {METADATA} are not there: {abbreviated(missing)}.",
            fix="Correct these lines, or continue without them: --skip-bad.",
        )


def _line(file: Path, number: int, line: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    caption = next((row[f] for f in CAPTION_FIELDS if f in row), None) if isinstance(row, dict) else None
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not isinstance(caption, str):
        raise DataError(
            f"line {number} of {file.name} has no file_name and text.",
            fix='Write one object per line: {"file_name": "01.jpg", "text": "a photo of …"}.',
        )
    return row["file_name"], " ".join(caption.split())


def split_held_out(data: Data, count: int, order: Callable[[int], list[int]]) -> tuple[Data, tuple[Example, ...]]:
    """The data without `count` examples, and those; `order(n)` is a shuffled range(n). Raises DataError for too few."""
    if count >= len(data.examples):
        raise DataError(
            f"--held-out {count} of {len(data.examples)} pictures leaves none to learn from.",
            fix="Give a smaller --held-out.",
        )
    held = set(order(len(data.examples))[:count])
    kept = tuple(e for i, e in enumerate(data.examples) if i not in held)
    return replace(data, examples=kept), tuple(e for i, e in enumerate(data.examples) if i in held)
