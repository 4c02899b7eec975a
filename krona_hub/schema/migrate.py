"""Native files across versions: a walker that takes one step at a time, up or down. Torch-free.

A step rewrites the header; the tensors of a file are copied as they are. A minor version may only add optional
header fields, so that reading a newer minor needs no step; a new kind of tensor is a new major version.
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
from krona_hub.errors import NewerSchemaError, SchemaError, StructureError, UnrecognisedError, UsageError
from krona_hub.schema.header import HEADER_KEY, SCHEMA_KEY

_NUMBER = re.compile(r"(0|[1-9][0-9]{0,3})\.(0|[1-9][0-9]{0,3})")


class Version(NamedTuple):
    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


CURRENT = Version(1, 0)

Tree = dict[str, Any]  # krona.header, parsed
Step = Callable[[Tree], Tree]  # gets a copy of its own; what it returns is the header of the other version
Steps = Mapping[tuple[Version, Version], Step]

STEPS: Steps = {}  # (from, to) -> step, one entry per neighbour and direction; 1.0 is the first version there is


class Migration(NamedTuple):
    """What `migrate_file` did."""

    path: Path
    start: Version
    to: Version


def parse_version(text: str) -> Version | None:
    """`1.0` as a Version; None for anything else.

    >>> parse_version("1.10"), parse_version("1.0.0"), parse_version("01.0")
    (Version(major=1, minor=10), None, None)
    """
    match = _NUMBER.fullmatch(text)
    return Version(int(match[1]), int(match[2])) if match else None


def version_of(metadata: Mapping[str, str]) -> Version:
    """The schema version of a native file. Raises UnrecognisedError for other files, SchemaError for nonsense."""
    if SCHEMA_KEY not in metadata:
        raise UnrecognisedError(
            f"this is no native krona file: its metadata has no {SCHEMA_KEY}.",
            fix="`krona convert FILE` makes one of it.",
        )
    version = parse_version(metadata[SCHEMA_KEY])
    if version is None:
        raise SchemaError(
            f"{SCHEMA_KEY} is {quoted(metadata[SCHEMA_KEY])}, which is no version.", fix="It must be MAJOR.MINOR."
        )
    return version


def readable(metadata: Mapping[str, str], steps: Steps = STEPS) -> dict[str, str]:
    """The metadata in a version that this krona_hub reads: as it is, or walked up from an older major.

    Raises NewerSchemaError for a newer major version, SchemaError for an old one that no step leads out of.
    """
    version = version_of(metadata)
    if version.major > CURRENT.major:
        raise NewerSchemaError(
            f"this file has schema {version}, and this krona_hub reads up to {CURRENT.major}.x.",
            fix="Update krona-hub: pip install -U krona-hub.",
        )
    return dict(metadata) if version.major == CURRENT.major else migrate(metadata, str(CURRENT), steps)


def migrate(metadata: Mapping[str, str], to: str, steps: Steps = STEPS) -> dict[str, str]:
    """The metadata of a native file in version `to`; the input is not touched, other keys are kept.

    Raises SchemaError where no chain of steps leads there, UsageError where `to` is no version.
    """
    start, end = version_of(metadata), parse_version(to)
    if end is None:
        raise UsageError(f"{quoted(to)} is no version.", fix=f"Write MAJOR.MINOR, for example {CURRENT}.")
    path = route(start, end, steps)
    if not path:
        return dict(metadata)
    tree = _tree(metadata)
    for step in path:
        tree = step(json.loads(json.dumps(tree)))  # a copy: a step may do with it as it likes
    return {**metadata, SCHEMA_KEY: str(end), HEADER_KEY: _text(tree)}


def route(start: Version, end: Version, steps: Steps = STEPS) -> list[Step]:
    """The steps from one version to the other, each to the nearest neighbour on the way."""
    found: list[Step] = []
    here = start
    while here != end:
        ahead = [b for a, b in steps if a == here and (here < b <= end or end <= b < here)]
        if not ahead:
            raise _no_way(start, end, steps)
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
    steps: Steps = STEPS,
) -> Migration:
    """Write the native file `path` in schema version `to`; its tensors are copied byte by byte.

    Without `out` the new file lies beside the old one and is called `<stem>.schema-<to>.safetensors`. With `dry_run`
    everything is checked and nothing written. Raises what `read_header`, `migrate` and `atomic_file` raise.
    """
    header = read_header(path)
    try:
        metadata = migrate(header.metadata, to, steps)
    except (SchemaError, UnrecognisedError) as error:
        raise error.within(str(path)) from None
    target = header.path.with_name(f"{header.path.stem}.schema-{to}.safetensors") if out is None else Path(out)
    if dry_run:
        check_output(target, overwrite=overwrite)
    else:
        write_stored(target, copied(header), metadata, overwrite=overwrite)
    return Migration(target, version_of(header.metadata), version_of(metadata))


def _tree(metadata: Mapping[str, str]) -> Tree:
    try:
        return strict_json.parse(metadata.get(HEADER_KEY, "{}"))
    except StructureError as error:
        raise SchemaError(f"{HEADER_KEY}: {error.cause}", fix="Take the original file.") from None


def _text(tree: Tree) -> str:
    return json.dumps(tree, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _no_way(start: Version, end: Version, steps: Steps) -> SchemaError:
    known = sorted({str(v) for pair in steps for v in pair} | {str(CURRENT)})
    newer = max(start, end) > CURRENT
    error = NewerSchemaError if newer else SchemaError
    return error(
        f"no step leads from schema {start} to {end}; this krona_hub knows {', '.join(known)}.",
        fix="Update krona-hub: pip install -U krona-hub." if newer else f"Choose --to {CURRENT}.",
    )
