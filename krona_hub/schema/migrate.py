"""Migration of native files between schema versions, one step at a time, up or down. Torch-free.

A step rewrites the header; tensors are copied unchanged, except for those that the older version does not have. A minor
version may only add optional header fields, so reading a newer minor version needs no step; a new kind of tensor
requires a new major version: 2.0 adds `vectors.<parameter>` and changes nothing else, so the header of 1.0 is valid.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from krona_hub.checkpoints import strict_json
from krona_hub.checkpoints.atomic import check_output
from krona_hub.checkpoints.findings import quoted
from krona_hub.checkpoints.header import read_header
from krona_hub.checkpoints.writer import copied, write_stored
from krona_hub.errors import (
    LossyError,
    NewerSchemaError,
    SchemaError,
    StructureError,
    UnrecognisedError,
    UsageError,
    counted,
)
from krona_hub.schema.header import HEADER_KEY, SCHEMA_KEY

_NUMBER = re.compile(r"(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})")


class Version(NamedTuple):
    """A schema version, MAJOR.MINOR."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


FIRST, CURRENT = Version(1, 0), Version(2, 0)  # files without vectors are written in FIRST
VECTORS = "vectors."  # prefix of the tensors that 2.0 adds

Tree = dict[str, Any]  # krona.header, parsed
Step = Callable[[Tree], Tree]  # receives its own copy and returns the header of the other version
Steps = Mapping[tuple[Version, Version], Step]


def _same(tree: Tree) -> Tree:
    return tree


STEPS: Steps = {  # (from, to) -> step, one entry per adjacent pair and direction
    (FIRST, CURRENT): _same,
    (CURRENT, FIRST): _same,
}


class Migration(NamedTuple):
    """The result of `migrate_file`."""

    path: Path
    start: Version
    to: Version
    left_out: int = 0  # vectors, which an older version does not have


def parse_version(text: str) -> Version | None:
    """Parse a version such as `1.0`; None for anything else.

    >>> parse_version("1.10"), parse_version("1.0.0"), parse_version("01.0")
    (Version(major=1, minor=10), None, None)
    """
    match = _NUMBER.fullmatch(text)
    return Version(int(match[1]), int(match[2])) if match else None


def version_of(metadata: Mapping[str, str]) -> Version:
    """Return the schema version. Raises UnrecognisedError for other formats, SchemaError if it is invalid."""
    if SCHEMA_KEY not in metadata:
        raise UnrecognisedError(
            f"this is not a native krona file: its metadata has no {SCHEMA_KEY}.",
            fix="Convert it with `krona convert FILE`.",
        )
    version = parse_version(metadata[SCHEMA_KEY])
    if version is None:
        raise SchemaError(f"invalid {SCHEMA_KEY} {quoted(metadata[SCHEMA_KEY])}.", fix="Use the form MAJOR.MINOR.")
    return version


def readable(metadata: Mapping[str, str], steps: Steps = STEPS) -> dict[str, str]:
    """Return the metadata in a readable version: unchanged, or migrated from an older major version.

    Raises NewerSchemaError for a newer major version, SchemaError for an older one without a migration.
    """
    version = version_of(metadata)
    if version.major > CURRENT.major:
        raise NewerSchemaError(
            f"this file has schema {version}, but this version of krona_hub reads up to {CURRENT.major}.x.",
            fix="Update krona-hub: pip install -U krona-hub.",
        )
    return dict(metadata) if version.major >= FIRST.major else migrate(metadata, str(FIRST), steps)


def is_newer_minor(version: Version) -> bool:
    """Return whether a readable version may have fields that this version of krona_hub does not know."""
    return version.minor > (CURRENT if version.major == CURRENT.major else FIRST).minor


def migrate(metadata: Mapping[str, str], to: str, steps: Steps = STEPS) -> dict[str, str]:
    """Return a copy of the metadata migrated to version `to`; keys other than the header are kept.

    Raises SchemaError if no migration path exists, UsageError if `to` is not a version.
    """
    start, end = version_of(metadata), parse_version(to)
    if end is None:
        raise UsageError(f"Invalid version {quoted(to)}.", fix=f"Use the form MAJOR.MINOR, for example {CURRENT}.")
    path = route(start, end, steps)
    if not path:
        return dict(metadata)
    tree = _tree(metadata)
    for step in path:
        tree = step(json.loads(json.dumps(tree)))  # a copy, which the step may modify
    return {**metadata, SCHEMA_KEY: str(end), HEADER_KEY: _text(tree)}


def route(start: Version, end: Version, steps: Steps = STEPS) -> list[Step]:
    """Return the migration steps between two versions, each to the nearest version on the way."""
    found: list[Step] = []
    here = start
    while here != end:
        ahead = [b for a, b in steps if a == here and (here < b <= end or end <= b < here)]
        if not ahead:
            raise _no_path(start, end, steps)
        nearest = min(ahead) if here < end else max(ahead)
        found.append(steps[here, nearest])
        here = nearest
    return found


def migrate_file(
    path: Path | str,
    to: str,
    out: Path | str | None = None,
    *,
    overwrite: bool = False,
    dry_run: bool = False,
    allow_loss: bool = False,
    steps: Steps = STEPS,
) -> Migration:
    """Migrate the native file `path` to schema version `to`; tensors are copied byte for byte.

    `out` defaults to `<stem>.schema-<to>.safetensors` in the folder of `path`. With `dry_run` everything is checked and
    nothing is written. Raises the errors of `read_header`, `migrate` and `atomic_file`, and LossyError if vectors would
    be lost, unless `allow_loss`.
    """
    header = read_header(path)
    try:
        metadata = migrate(header.metadata, to, steps)
    except (SchemaError, UnrecognisedError) as error:
        raise error.within(str(path)) from None
    start, end = version_of(header.metadata), version_of(metadata)
    tensors = copied(header)
    kept = {name: t for name, t in tensors.items() if end.major > FIRST.major or not name.startswith(VECTORS)}
    lost = len(tensors) - len(kept)
    if lost and not allow_loss:
        raise LossyError(
            f"{path}: schema {end} has no vectors, and the file contains {counted(lost, 'vector')} (biases and norms).",
            fix="Add --allow-loss to leave them out.",
        )
    target = header.path.with_name(f"{header.path.stem}.schema-{to}.safetensors") if out is None else Path(out)
    if dry_run:
        check_output(target, overwrite=overwrite)
    else:
        write_stored(target, kept, metadata, overwrite=overwrite)
    return Migration(target, start, end, lost)


def _tree(metadata: Mapping[str, str]) -> Tree:
    try:
        return strict_json.parse(metadata.get(HEADER_KEY, "{}"))
    except StructureError as error:
        raise SchemaError(f"{HEADER_KEY}: {error.cause}", fix="Use the original file.") from None


def _text(tree: Tree) -> str:
    return json.dumps(tree, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _no_path(start: Version, end: Version, steps: Steps) -> SchemaError:
    known = sorted({str(v) for pair in steps for v in pair} | {str(CURRENT)})
    newer = max(start, end) > CURRENT
    error = NewerSchemaError if newer else SchemaError
    return error(
        f"no migration from schema {start} to {end}; this version of krona_hub supports {', '.join(known)}.",
        fix="Update krona-hub: pip install -U krona-hub." if newer else f"Choose --to {CURRENT}.",
    )
