"""`pull`: an adapter from the Hub becomes files here, each of them what its owner pushed, or nothing changes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from krona_hub.checkpoints.atomic import check_folder, check_output
from krona_hub.checkpoints.digest import file_sha256
from krona_hub.errors import FormatError, IntegrityError, ResourceError, UsageError
from krona_hub.hub import manifest as manifests
from krona_hub.hub.installing import SUFFIX, PullDestination, check_file, is_read_first, put_in_place
from krona_hub.hub.local_adapter import check_limits
from krona_hub.hub.preview import Preview, preview
from krona_hub.hub.repo_layout import CARD, MANIFEST, MAX_FILE, MAX_TEXT, WEIGHTS, is_ours
from krona_hub.hub.signing import check_can_verify, check_signature
from krona_hub.rendering.humanize import human_bytes
from krona_hub.schema.header import HEADER_KEY
from krona_hub.schema.tensor_layout import is_native
from krona_hub.sources import HubId, parse_hub_id
from krona_hub.sources.choose_file import choose, with_companions
from krona_hub.sources.download import check_room, fetch, is_intact
from krona_hub.sources.repo_listing import Listing, RemoteFile, list_repo, remember_revision
from krona_hub.sources.safe_names import check_collisions, is_safe, printable


@dataclass(frozen=True)
class PullReport:
    """What `pull` did, or would do."""

    repo: str
    revision: str | None  # as it was asked for
    commit: str
    out: Path
    files: tuple[str, ...]
    bytes: int
    preview: Preview
    sha256: str | None  # of the weights, where the Hub or the manifest names it
    skipped: tuple[str, ...]  # files of the repository that krona does not touch
    written: bool
    notes: tuple[str, ...] = ()
    next: str | None = None  # a command that goes on with it

    @property
    def native(self) -> bool:
        return self.preview.description is not None and self.preview.description.format == "krona"


def pull(
    source: str,
    out: str | Path | None = None,
    *,
    offline: bool = False,
    expect_sha: str | None = None,
    max_size: int = MAX_FILE,
    verify_key: str | Path | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    endpoint: str | None = None,
) -> PullReport:
    """Download the adapter of `ns/name[@revision][/file]` into the folder `out`, or one file of it to the file `out`.

    Everything is pinned to one commit, compared with the digests of the Hub and of the manifest, checked as `validate`
    does, and moved into place whole. Only files that krona writes are taken; of other repositories the adapter alone.
    Raises AuthError, NotFoundError, PickleError, IntegrityError, ResourceError beyond `max_size` bytes, OfflineError
    where neither the Hub nor the cache has it, ConflictError where `out` exists and `overwrite` is not given.
    """
    hub_id = parse_hub_id(source, endpoint)
    if hub_id is None:
        raise UsageError(f"{source!r} is no Hub id.", fix="Write ns/name, ns/name@revision or ns/name/file.")
    listing = list_repo(hub_id.repo, hub_id.revision, offline=offline, endpoint=endpoint)
    weights = choose(listing.files, listing.repo, hub_id.file)
    place = _place(hub_id, out)
    names = _names(listing, weights, hub_id.file)
    check_collisions(names)
    _check_sizes(listing, names, max_size)
    seen = preview(listing, weights, endpoint=endpoint) if weights.endswith(SUFFIX) else Preview(weights, 0, None, None)
    _check_header(seen, max_size)
    report = _report(hub_id, listing, names, seen, place)
    _check_expected(expect_sha, listing.files[weights], {})
    if verify_key is not None:
        _check_can_verify(hub_id, names, Path(verify_key))
    if dry_run:
        return report
    return _carry_out(report, listing, hub_id, place, expect_sha, verify_key, overwrite, endpoint)


def _place(hub_id: HubId, out: str | Path | None) -> PullDestination:
    if hub_id.file is None:
        return PullDestination(Path(out) if out is not None else Path(hub_id.repo.split("/")[1]), False)
    name = Path(hub_id.file).name
    path = Path(out) if out is not None else Path(name)
    is_folder = path.is_dir() or str(out).endswith(("/", os.sep))
    return PullDestination(path / name if is_folder else path, True)


def _names(listing: Listing, weights: str, wanted: str | None) -> tuple[str, ...]:
    """The files to take: one where one was asked for, all of ours in a repository of ours, else adapter and card."""
    if wanted is not None:
        return with_companions(weights, listing.files)[:1]
    if weights == WEIGHTS:
        return tuple(n for n in sorted(listing.files) if is_ours(n) and is_safe(n))
    card = (CARD,) if CARD in listing.files else ()
    return (*card, *with_companions(weights, listing.files))


def _check_sizes(listing: Listing, names: tuple[str, ...], max_size: int) -> None:
    for name in names:
        size = listing.files[name].size
        if size is not None and size > max_size:
            told = f"{printable(name)} has {human_bytes(size)}; the limit is {human_bytes(max_size)}."
            raise ResourceError(told, fix="Raise --max-size if you want it.")


def _check_can_verify(hub_id: HubId, names: tuple[str, ...], key: Path) -> None:
    if hub_id.file is not None:
        fix = f"Pull all of it: krona pull {hub_id.repo} --verify-key {shlex.quote(str(key))}."
        raise UsageError("a signature is one of the whole repository, not of one file.", fix=fix)
    check_can_verify(names, key)


def _check_header(seen: Preview, max_size: int) -> None:
    """Raise before any weight is downloaded what its header makes certain."""
    if seen.name.endswith(SUFFIX) and seen.description is None:
        name = printable(seen.name)
        told = seen.why_not if name in seen.why_not else f"{name}: {seen.why_not}"
        raise FormatError(told, fix="Nothing was downloaded. Ask its owner.")
    if seen.description is not None:
        header = seen.description.header
        check_limits(header, max_size)
        if is_native(header.metadata):
            long = [k for k, v in header.metadata.items() if k != HEADER_KEY and len(v.encode()) > MAX_TEXT]
            if long:
                raise ResourceError(f"its metadata {printable(long[0])} is too long.", fix="Do not trust that file.")


def _report(
    hub_id: HubId, listing: Listing, names: tuple[str, ...], seen: Preview, place: PullDestination
) -> PullReport:
    skipped = tuple(printable(n) for n in sorted(listing.files) if n not in names and n != ".gitattributes")
    known = listing.files.get(seen.name)
    notes = [*listing.notes, *(f"the Hub's scanners object to {printable(n)}." for n in listing.issues)]
    return PullReport(
        repo=listing.repo,
        revision=hub_id.revision,
        commit=listing.commit,
        out=place.path,
        files=names,
        bytes=sum(listing.files[n].size or 0 for n in names),
        preview=seen,
        sha256=known.sha256 if known else None,
        skipped=skipped,
        written=False,
        notes=tuple(notes),
        next=_next(hub_id, seen, place),
    )


def _next(hub_id: HubId, seen: Preview, place: PullDestination) -> str | None:
    """For a foreign adapter: the command that makes it one of krona's."""
    if seen.description is None or seen.description.format == "krona":
        return None
    folder = seen.description.format.startswith("peft")
    if folder and place.is_file:  # alone it says no scale; from the Hub its config comes along
        revision = f"@{hub_id.revision}" if hub_id.revision else ""
        return f"krona convert {shlex.quote(f'{hub_id.repo}{revision}/{hub_id.file}')}"
    path = place.path if place.is_file or folder else place.path / seen.name
    return f"krona convert {shlex.quote(str(path))}"


# --- carrying it out -------------------------------------------------------------------------------------------------


def _carry_out(
    report: PullReport,
    listing: Listing,
    hub_id: HubId,
    place: PullDestination,
    expect_sha: str | None,
    verify_key: str | Path | None,
    overwrite: bool,
    endpoint: str | None,
) -> PullReport:
    if not place.is_file and _is_here_already(report, listing, place):
        _check_here(report, listing, place, expect_sha, verify_key)
        return _done(report, listing, hub_id, ("already here, file by file.",))
    (check_output if place.is_file else check_folder)(place.path, overwrite=overwrite)
    check_room(report.bytes)
    small = {name: fetch(listing, name, endpoint=endpoint) for name in report.files if is_read_first(listing, name)}
    _check_digests(report, listing, small, expect_sha)
    put_in_place(listing, report.files, place, overwrite=overwrite, verify_key=verify_key, endpoint=endpoint)
    return _done(report, listing, hub_id, ())


def _done(report: PullReport, listing: Listing, hub_id: HubId, notes: tuple[str, ...]) -> PullReport:
    remember_revision(listing, hub_id.revision)
    return replace(report, written=True, notes=(*report.notes, *notes))


def _is_here_already(report: PullReport, listing: Listing, place: PullDestination) -> bool:
    """Whether every file lies in the folder, digest for digest."""
    here = ((place.path / name, listing.files[name]) for name in report.files)
    return all(path.is_file() and known.digest is not None and is_intact(path, known) for path, known in here)


def _check_here(
    report: PullReport, listing: Listing, place: PullDestination, expect_sha: str | None, verify_key: str | Path | None
) -> None:
    """Raise what pulling the files would raise that are here already: they may have come in another way."""
    here = {name: place.path / name for name in report.files}
    _check_digests(report, listing, here, expect_sha)
    for name, path in here.items():
        if name.endswith(SUFFIX):
            check_file(path, name)
    if verify_key is not None:
        check_signature(here, Path(verify_key))


def _check_digests(report: PullReport, listing: Listing, here: Mapping[str, Path], expect_sha: str | None) -> None:
    """Compare what the Hub names, or what is `here`, with the digest that is expected and those of the manifest."""
    _check_expected(expect_sha, listing.files[report.preview.name], here)
    if MANIFEST in here:
        manifests.check(manifests.parse(here[MANIFEST].read_bytes()), report.files, listing.files, here)


def _check_expected(expected: str | None, known: RemoteFile, here: Mapping[str, Path]) -> None:
    """Compare with what the Hub names, or with what is here; where there is neither, it is not known yet."""
    if expected is None or not (known.sha256 or known.name in here):
        return
    found = known.sha256 or file_sha256(here[known.name])
    if found != expected.lower():
        raise IntegrityError(f"{known.name} has the sha256 {found}, not {expected}.", fix="It is not what you expect.")
