"""`pull`: download an adapter from the Hub, verify every file, and install all files or none."""

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
from krona_hub.hub.installing import SUFFIX, PullDestination, check_file, install_files, is_read_first
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
    """What `pull` did, or would do in a dry run."""

    repo: str
    revision: str | None  # as requested
    commit: str
    out: Path
    files: tuple[str, ...]
    bytes: int
    preview: Preview
    sha256: str | None  # of the weights, if the Hub or the manifest states it
    skipped: tuple[str, ...]  # files of the repository that are not downloaded
    written: bool
    notes: tuple[str, ...] = ()
    next: str | None = None  # suggested next command

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
    """Download an adapter from the Hub, pinned to one commit, verified and installed as a whole.

    Files are compared with the digests of the Hub and of the manifest, and checked as by `validate`. Of a krona
    repository, the files that krona writes are downloaded; of any other, the adapter and the card.

    Parameters
    ----------
    source : "ns/name[@revision][/file]"
    out : target folder, or target file for a single file (default: the name of the repository or of the file)
    offline : use the local cache only
    expect_sha : required sha256 of the weights, in hexadecimal
    max_size : largest accepted file in bytes (default: 2 GiB)
    verify_key : path of a public key (PEM) to verify the signature with
    overwrite, dry_run : replace an existing `out`; report without downloading weights
    endpoint : URL of another Hub (default: HF_ENDPOINT)

    Returns
    -------
    PullReport
        Commit, files, size in bytes, and a description of the adapter.

    Raises
    ------
    AuthError, NotFoundError, PickleError, IntegrityError
    ResourceError
        A file is larger than `max_size`.
    OfflineError
        Neither the Hub nor the cache has the adapter.
    ConflictError
        `out` exists, and `overwrite` is False.

    Examples
    --------
    >>> import krona_hub
    >>> report = krona_hub.pull("ana/style@v1", "style")  # doctest: +SKIP
    """
    hub_id = parse_hub_id(source, endpoint)
    if hub_id is None:
        raise UsageError(f"Invalid Hub id {source!r}.", fix="Write ns/name, ns/name@revision or ns/name/file.")
    listing = list_repo(hub_id.repo, hub_id.revision, offline=offline, endpoint=endpoint)
    weights = choose(listing.files, listing.repo, hub_id.file)
    destination = _destination(hub_id, out)
    names = _names(listing, weights, hub_id.file)
    check_collisions(names)
    _check_sizes(listing, names, max_size)
    described = (
        preview(listing, weights, endpoint=endpoint) if weights.endswith(SUFFIX) else Preview(weights, 0, None, None)
    )
    _check_header(described, max_size)
    report = _report(hub_id, listing, names, described, destination)
    _check_expected(expect_sha, listing.files[weights], {})
    if verify_key is not None:
        _check_can_verify(hub_id, names, Path(verify_key))
    if dry_run:
        return report
    return _execute(report, listing, hub_id, destination, expect_sha, verify_key, overwrite, endpoint)


def _destination(hub_id: HubId, out: str | Path | None) -> PullDestination:
    if hub_id.file is None:
        return PullDestination(Path(out) if out is not None else Path(hub_id.repo.split("/")[1]), False)
    name = Path(hub_id.file).name
    path = Path(out) if out is not None else Path(name)
    is_folder = path.is_dir() or str(out).endswith(("/", os.sep))
    return PullDestination(path / name if is_folder else path, True)


def _names(listing: Listing, weights: str, wanted: str | None) -> tuple[str, ...]:
    """Select the files: the one requested, all krona files of a krona repository, else the adapter and the card."""
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
            cause = f"{printable(name)} is {human_bytes(size)}; the limit is {human_bytes(max_size)}."
            raise ResourceError(cause, fix="Raise --max-size to download it.")


def _check_can_verify(hub_id: HubId, names: tuple[str, ...], key: Path) -> None:
    if hub_id.file is not None:
        fix = f"Pull the whole repository: krona pull {hub_id.repo} --verify-key {shlex.quote(str(key))}."
        raise UsageError("A signature covers the whole repository, not a single file.", fix=fix)
    check_can_verify(names, key)


def _check_header(described: Preview, max_size: int) -> None:
    """Raise the errors that the header reveals, before any weights are downloaded."""
    if described.name.endswith(SUFFIX) and described.description is None:
        name = printable(described.name)
        cause = described.why_not if name in described.why_not else f"{name}: {described.why_not}"
        raise FormatError(cause, fix="Nothing was downloaded. Ask the owner to fix the file.")
    if described.description is not None:
        header = described.description.header
        check_limits(header, max_size)
        if is_native(header.metadata):
            long = [k for k, v in header.metadata.items() if k != HEADER_KEY and len(v.encode()) > MAX_TEXT]
            if long:
                raise ResourceError(
                    f"The metadata entry {printable(long[0])} is too long.", fix="Do not trust this file."
                )


def _report(
    hub_id: HubId, listing: Listing, names: tuple[str, ...], described: Preview, destination: PullDestination
) -> PullReport:
    skipped = tuple(printable(n) for n in sorted(listing.files) if n not in names and n != ".gitattributes")
    known = listing.files.get(described.name)
    notes = [*listing.notes, *(f"the Hub's scanners flagged {printable(n)}." for n in listing.issues)]
    return PullReport(
        repo=listing.repo,
        revision=hub_id.revision,
        commit=listing.commit,
        out=destination.path,
        files=names,
        bytes=sum(listing.files[n].size or 0 for n in names),
        preview=described,
        sha256=known.sha256 if known else None,
        skipped=skipped,
        written=False,
        notes=tuple(notes),
        next=_next(hub_id, described, destination),
    )


def _next(hub_id: HubId, described: Preview, destination: PullDestination) -> str | None:
    """Suggest the command that converts a foreign adapter."""
    if described.description is None or described.description.format == "krona":
        return None
    folder = described.description.format.startswith("peft")
    if folder and destination.is_file:  # alone it lacks its scale; from the Hub it comes with its config
        revision = f"@{hub_id.revision}" if hub_id.revision else ""
        return f"krona convert {shlex.quote(f'{hub_id.repo}{revision}/{hub_id.file}')}"
    path = destination.path if destination.is_file or folder else destination.path / described.name
    return f"krona convert {shlex.quote(str(path))}"


# --- execution -------------------------------------------------------------------------------------------------------


def _execute(
    report: PullReport,
    listing: Listing,
    hub_id: HubId,
    destination: PullDestination,
    expect_sha: str | None,
    verify_key: str | Path | None,
    overwrite: bool,
    endpoint: str | None,
) -> PullReport:
    if not destination.is_file and _is_installed(report, listing, destination):
        _check_installed(report, listing, destination, expect_sha, verify_key)
        return _done(report, listing, hub_id, ("already up to date, file by file.",))
    (check_output if destination.is_file else check_folder)(destination.path, overwrite=overwrite)
    check_room(report.bytes)
    local = {name: fetch(listing, name, endpoint=endpoint) for name in report.files if is_read_first(listing, name)}
    _check_digests(report, listing, local, expect_sha)
    install_files(listing, report.files, destination, overwrite=overwrite, verify_key=verify_key, endpoint=endpoint)
    return _done(report, listing, hub_id, ())


def _done(report: PullReport, listing: Listing, hub_id: HubId, notes: tuple[str, ...]) -> PullReport:
    remember_revision(listing, hub_id.revision)
    return replace(report, written=True, notes=(*report.notes, *notes))


def _is_installed(report: PullReport, listing: Listing, destination: PullDestination) -> bool:
    """Whether the folder already holds every file, with the same digests."""
    local = ((destination.path / name, listing.files[name]) for name in report.files)
    return all(path.is_file() and known.digest is not None and is_intact(path, known) for path, known in local)


def _check_installed(
    report: PullReport,
    listing: Listing,
    destination: PullDestination,
    expect_sha: str | None,
    verify_key: str | Path | None,
) -> None:
    """Check files that exist already as a download would be checked: they may come from elsewhere."""
    local = {name: destination.path / name for name in report.files}
    _check_digests(report, listing, local, expect_sha)
    for name, path in local.items():
        if name.endswith(SUFFIX):
            check_file(path, name)
    if verify_key is not None:
        check_signature(local, Path(verify_key))


def _check_digests(report: PullReport, listing: Listing, local: Mapping[str, Path], expect_sha: str | None) -> None:
    """Compare the digests on the Hub, or of `local` files, with the expected one and those of the manifest."""
    _check_expected(expect_sha, listing.files[report.preview.name], local)
    if MANIFEST in local:
        manifests.check(manifests.parse(local[MANIFEST].read_bytes()), report.files, listing.files, local)


def _check_expected(expected: str | None, known: RemoteFile, local: Mapping[str, Path]) -> None:
    """Compare the expected digest with that on the Hub or of the local file; with neither, it is unknown yet."""
    if expected is None or not (known.sha256 or known.name in local):
        return
    found = known.sha256 or file_sha256(local[known.name])
    if found != expected.lower():
        raise IntegrityError(f"{known.name} has sha256 {found}, not {expected}.", fix="Check the expected sha256.")
