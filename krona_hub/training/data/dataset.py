"""Read and check folders of images with captions, and compute their fingerprints."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from krona_hub.errors import DataError, NotFoundError, abbreviated
from krona_hub.training.configuration import ECHO
from krona_hub.training.data.images import EXTENSIONS, open_image

SHIPPED = ("zorbi",)  # image folders in krona_hub.assets
METADATA = "metadata.jsonl"
CAPTION_FIELDS = ("text", "caption", "prompt")  # in metadata.jsonl: the name that `datasets` uses, and two common ones
REASONS = 5  # maximum number in an error message


@dataclass(frozen=True)
class Example:
    """An image of a data set with its caption."""

    path: Path
    caption: str
    size: tuple[int, int]  # (width, height) in pixels, after EXIF rotation
    weight: float = 1.0  # weight of its loss


@dataclass(frozen=True)
class Data:
    """The usable examples of a folder, and its unusable files."""

    examples: tuple[Example, ...]
    bad: Mapping[str, str]  # file name -> reason

    @property
    def fingerprint(self) -> str:
        """SHA-256 of names, bytes and captions, which must be the same when a run is resumed."""
        digest = sha256()
        for e in self.examples:
            digest.update(f"{e.path.name}\0{e.caption}\0{e.weight}\0".encode())
            digest.update(sha256(e.path.read_bytes()).digest())
        return digest.hexdigest()


def read_folder(folder: str | Path, prompt: str = "", *, skip_bad: bool = False, captions: bool = True) -> Data:
    """Read the images of a folder and its subfolders, sorted by name. Hidden files are ignored.

    The caption of an image comes from `metadata.jsonl`, else from a `.txt` file of the same name, else from `prompt`.
    Raises NotFoundError if the folder does not exist, and DataError if it contains no images, if captions are missing,
    or, unless `skip_bad` is set, if images are unreadable.
    """
    root = image_folder(folder)
    if not root.is_dir():
        raise NotFoundError(f"No such folder: {str(folder)!r}.", fix="Specify the image folder with --data FOLDER.")
    table = _metadata(root)
    if captions and not skip_bad:
        _check_table(root, table)
    examples, bad = [], {}
    for path in image_files(root):
        name = path.relative_to(root).as_posix()
        try:
            examples.append(Example(path, _caption(path, table.get(name), prompt, captions), open_image(path).size))
        except DataError as error:
            bad[name] = error.cause
    _check(root, examples, bad, skip_bad)
    if captions:
        _check_captions(examples)
    return Data(tuple(examples), bad)


def image_folder(source: str | Path) -> Path:
    """Resolve the name of an image folder in the package, or a path, which takes precedence.

    >>> image_folder("zorbi").name, str(image_folder("photos/mine"))
    ('zorbi', 'photos/mine')
    """
    path = Path(source).expanduser()
    if str(source) not in SHIPPED or _has_training_images(path):
        return path
    return Path(str(files("krona_hub.assets"))) / str(source)


def _has_training_images(path: Path) -> bool:
    """Return whether a folder contains images and is not a run folder, whose images are samples."""
    return not (path / ECHO).is_file() and bool(image_files(path))


def image_files(folder: Path) -> list[Path]:
    """Return all files with an image extension, sorted by path."""
    images = (p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    return sorted((p for p in images if not _hidden(p.relative_to(folder))), key=lambda p: p.as_posix())


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _check(folder: Path, examples: list[Example], bad: Mapping[str, str], skip_bad: bool) -> None:
    if bad and not skip_bad:
        reasons = "; ".join(list(bad.values())[:REASONS]).rstrip(".")
        more = f"; and {len(bad) - REASONS} more" if len(bad) > REASONS else ""
        raise DataError(
            f"{len(bad)} of {len(bad) + len(examples)} images cannot be used: {reasons}{more}.",
            fix="Remove or replace these files, or skip them with --skip-bad.",
        )
    if not examples:
        raise DataError(f"No images found in {folder}.", fix=f"Add images of type {', '.join(EXTENSIONS)}.")


def _check_captions(examples: Iterable[Example]) -> None:
    without = [e.path.name for e in examples if not e.caption]
    if without:
        raise DataError(
            f"{len(without)} images have no caption: {abbreviated(without)}.",
            fix='Specify --prompt "a photo of sks toy", or add a .txt file next to each image.',
        )


def _caption(path: Path, listed: str | None, prompt: str, read_text: bool) -> str:
    file = path.with_suffix(".txt")
    if listed is not None or not read_text:
        return (listed or prompt).strip()
    if not file.is_file():
        return prompt
    return " ".join(_text(file).split()) or prompt


def _text(file: Path) -> str:
    """Read a UTF-8 file with or without a byte order mark."""
    try:
        return file.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{file.name} is not valid UTF-8.", fix="Save the captions as UTF-8.") from error


def _metadata(folder: Path) -> dict[str, str]:
    """Map relative paths of images to the captions in all metadata.jsonl files of a folder."""
    found: dict[str, str] = {}
    for file in sorted(folder.rglob(METADATA)):
        prefix = file.parent.relative_to(folder)
        for number, line in enumerate(_text(file).split("\n"), 1):
            if line.strip():
                name, caption = _line(file, number, line)
                found[(prefix / name).as_posix()] = caption
    return found


def _check_table(folder: Path, table: Mapping[str, str]) -> None:
    """Reject unknown file names: the image with the misspelled name would get another caption."""
    missing = [name for name in table if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} images listed in {METADATA} do not exist: {abbreviated(missing)}.",
            fix="Correct these lines, or ignore them with --skip-bad.",
        )


def _line(file: Path, number: int, line: str) -> tuple[str, str]:
    try:
        row = json.loads(line)
    except ValueError:
        row = None
    caption = next((row[f] for f in CAPTION_FIELDS if f in row), None) if isinstance(row, dict) else None
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str) or not isinstance(caption, str):
        raise DataError(
            f"Line {number} of {file.name} lacks file_name or text.",
            fix='Write one JSON object per line: {"file_name": "01.jpg", "text": "a photo of …"}.',
        )
    return row["file_name"], " ".join(caption.split())


def split_held_out(data: Data, count: int, order: Callable[[int], list[int]]) -> tuple[Data, tuple[Example, ...]]:
    """Split off `count` examples; `order(n)` is a shuffled range(n). Raises DataError if none would remain."""
    if count >= len(data.examples):
        raise DataError(
            f"--held-out {count} of {len(data.examples)} images leaves none for training.",
            fix="Use a smaller --held-out.",
        )
    held = set(order(len(data.examples))[:count])
    kept = tuple(e for i, e in enumerate(data.examples) if i not in held)
    return replace(data, examples=kept), tuple(e for i, e in enumerate(data.examples) if i in held)
