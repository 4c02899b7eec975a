"""`push`: publish an adapter as one commit on the Hub, or change nothing there."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from krona_hub.checkpoints import strict_json
from krona_hub.errors import ConflictError, KronaError, NotFoundError, OfflineError, UsageError
from krona_hub.hub import manifest as manifests
from krona_hub.hub.commit import commit, verify
from krona_hub.hub.local_adapter import HUB_NAME, check_adapter
from krona_hub.hub.manifest import Manifest
from krona_hub.hub.permissions import check_account, is_missing
from krona_hub.hub.push_package import PushOptions, PushPackage, RepoState, finish, pack
from krona_hub.hub.push_plan import PushPlan, check_repository, is_same, rows_of
from krona_hub.hub.repo_layout import CARD, CONFIG, MANIFEST, SIGNATURE, WEIGHTS
from krona_hub.hub.signing import is_still_signed, sign_folder
from krona_hub.sources.client import client, endpoint_of, is_offline, quiet
from krona_hub.sources.client_errors import hub_errors
from krona_hub.sources.download import fetch
from krona_hub.sources.repo_listing import Listing, ask
from krona_hub.sources.retry import retrying

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MAX_REPLANS = 3
ABOUT = (CARD, CONFIG, MANIFEST, SIGNATURE)  # what `card_only` writes
_REFERENCE = re.compile(r"\w[\w.+-]*(/\w[\w.+-]*)*")
Confirm = Callable[[PushPlan], bool]


@dataclass(frozen=True)
class PushReport:
    """What `push` did, or would do in a dry run."""

    plan: PushPlan
    url: str
    commit: str | None = None  # None if nothing was committed
    pull_request: str | None = None
    tag: str | None = None
    verified: int = 0  # number of files whose digest on the Hub was compared
    notes: tuple[str, ...] = ()

    @property
    def up_to_date(self) -> bool:
        return not self.plan.changes


@dataclass(frozen=True)
class PushRequest:
    """The target and the options of a push."""

    repo: str
    revision: str
    private: bool | None
    create_pr: bool
    tag: str | None
    message: str | None
    force: bool
    endpoint: str | None


def push(
    source: str | Path,
    repo: str,
    *,
    private: bool | None = None,
    revision: str = "main",
    create_pr: bool = False,
    tag: str | None = None,
    message: str | None = None,
    with_lora: int | bool = False,
    with_lokr: bool = False,
    images: str | Path | None = None,
    card: bool = True,
    card_only: bool = False,
    base_model: str | None = None,
    base: str | Path | None = None,
    sign_key: str | Path | None = None,
    force: bool = False,
    dry_run: bool = False,
    endpoint: str | None = None,
    confirm: Confirm | None = None,
) -> PushReport:
    """Publish an adapter in a Hub repository with one commit, checked before and after.

    A missing repository is created. Pushing the same adapter again commits nothing.

    Parameters
    ----------
    source : path of the adapter, in any format; other formats are rewritten in the native one
    repo : Hub id "namespace/name"
    private : visibility of a new repository; None (default) and True make it private
    revision, create_pr, tag, message : branch (default "main"), pull request, tag and message of the commit
    with_lora, with_lokr : companion exports; `with_lora` is True for an exact LoRA, or a rank
    images : folder of sample images; `x.txt` holds the prompt of `x.png`
    card, card_only : False leaves README.md unchanged; True pushes the card without the weights
    base_model, base : Hub id of the base model for the card; base model that resolves key names
    sign_key : path of a private key (PEM) to sign with
    force : push to a repository with other contents
    dry_run, confirm : plan without sending; callable that gets the plan and returns whether to send it
    endpoint : URL of another Hub (default: HF_ENDPOINT)

    Returns
    -------
    PushReport
        Plan, URL, commit, and the number of verified files.

    Raises
    ------
    AuthError, OfflineError, RateLimitError
    ConflictError
        The repository has other contents (unless `force`), or changed during the push.
    IntegrityError
        The Hub holds other bytes than were sent. Errors of `validate` are raised as well.

    Examples
    --------
    >>> import krona_hub
    >>> report = krona_hub.push("krona.safetensors", "ana/style", private=False, tag="v1")  # doctest: +SKIP
    """
    request = PushRequest(repo, revision, private, create_pr, tag, message, force, endpoint)
    options = PushOptions(with_lora, with_lokr, Path(images) if images else None, card, card_only, base)
    _check_request(request, options, dry_run)
    with tempfile.TemporaryDirectory(prefix="krona-push-") as name:
        package = pack(check_adapter(source, Path(name), base_model, base), Path(name), options)
        return _push(package, request, sign_key, dry_run, confirm)


def _check_request(request: PushRequest, options: PushOptions, dry_run: bool) -> None:
    """Raise UsageError for invalid or contradictory options, OfflineError if the Hub is needed but disabled."""
    if not HUB_NAME.fullmatch(request.repo):
        raise UsageError(f"Invalid repository name {request.repo!r}.", fix="Write namespace/name.")
    _check_reference("branch", request.revision)
    if request.tag is not None:
        _check_reference("tag", request.tag)
    if options.card_only and (options.with_lora or options.with_lokr or options.images or not options.card):
        raise UsageError("--card-only writes only the card.", fix="Omit it to push other files, too.")
    if request.create_pr and request.tag:
        cause = "--tag needs a commit on the branch, and a pull request has none yet."
        raise UsageError(cause, fix="Push again with --tag when it is merged.")
    if is_offline() and not dry_run:
        raise OfflineError("Pushing needs the Hub, but HF_HUB_OFFLINE is set.", fix="Unset it, or use --dry-run.")


def _check_reference(kind: str, name: str) -> None:
    """Raise UsageError for a branch or tag name that git rejects, before anything is committed."""
    if not _REFERENCE.fullmatch(name) or ".." in name or name.endswith((".", ".lock")):
        raise UsageError(f"Invalid {kind} name {name!r}.", fix="Use letters, digits, dots and dashes, as in v1.0.")


def _push(
    package: PushPackage, request: PushRequest, sign_key: str | Path | None, dry_run: bool, confirm: Confirm | None
) -> PushReport:
    if is_offline():
        plan = _planned(package, request, RepoState())[0]
        return _report(request, plan, notes=("offline: the Hub was not contacted.",))
    api = client(request.endpoint)
    check_account(api, request.repo, create_pr=request.create_pr)
    there = repository_state(api, request)
    _check_repo(package, request, there)
    plan = _planned(package, request, there, sign_key)[0]
    _check_tag(api, request, plan)
    if dry_run or not plan.changes:
        return _tagged(api, request, _report(request, plan), dry_run)
    if confirm is not None and not confirm(plan):
        return _report(request, plan, notes=("canceled: nothing was sent.",))
    if there.listing is None:
        there = _create(api, request)
    report = _commit(api, package, request, there, sign_key)
    return replace(report, plan=replace(report.plan, visibility=plan.visibility))


def _commit(
    api: HfApi, package: PushPackage, request: PushRequest, there: RepoState, sign_key: str | Path | None
) -> PushReport:
    """Commit; if someone else committed in between, plan again unless both change the same files."""
    for _ in range(MAX_REPLANS):
        plan, paths = _planned(package, request, there, sign_key)
        if not plan.changes:
            return _tagged(
                api, request, _report(request, plan, notes=("someone else pushed the same files in the meantime.",))
            )
        try:
            result = commit(api, plan, paths, _message(package, request))
        except ConflictError as conflict:
            there = _state_after_conflict(api, package, request, there, plan, conflict)
            continue
        verified = verify(api, plan, paths, result.commit)
        report = _report(request, plan)
        report = replace(report, commit=result.commit, pull_request=result.pull_request, verified=verified)
        return _tagged(api, request, report)
    raise ConflictError(f"{request.repo} changed {MAX_REPLANS} times during the push.", fix="Push again later.")


def _state_after_conflict(
    api: HfApi, package: PushPackage, request: PushRequest, before: RepoState, plan: PushPlan, conflict: ConflictError
) -> RepoState:
    """Return the new state of the repository if none of the files to push changed; else raise the conflict."""
    now = repository_state(api, request)
    _check_repo(package, request, now)
    old, new = (t.listing.files if t.listing else {} for t in (before, now))
    clash = [row.file for row in plan.changes if old.get(row.file) != new.get(row.file)]
    if before.listing and now.listing and before.listing.commit == now.listing.commit:
        raise conflict
    if not clash or request.force:
        return now
    sha = now.listing.commit[:7] if now.listing else "?"
    raise ConflictError(
        f"Someone else changed {clash[0]} of {request.repo} in the meantime (commit {sha}).",
        fix="Review the change, then push again to replace it; --force replaces it now.",
    )


# --- before anything is sent -----------------------------------------------------------------------------------------


def repository_state(api: HfApi, request: PushRequest) -> RepoState:
    """Read the state of the repository at the target revision."""
    try:
        listing = ask(api, request.repo, None if request.revision == "main" else request.revision)
    except NotFoundError as error:
        if is_missing(error.__cause__ or error):
            return RepoState()
        listing = _new_branch(api, request)
    names = (n for n in (CARD, CONFIG, MANIFEST) if n in listing.files)
    files = {name: fetch(listing, name, endpoint=request.endpoint).read_bytes() for name in names}
    manifest, document = _manifest(files.get(MANIFEST))
    card = files[CARD].decode("utf-8", "replace") if CARD in files else None
    return RepoState(listing, card, manifest, document, _object(files.get(CONFIG)))


def _new_branch(api: HfApi, request: PushRequest) -> Listing:
    """Return the listing that a new branch starts from."""
    return replace(ask(api, request.repo), notes=(f"the branch {request.revision} will be created.",))


def _manifest(data: bytes | None) -> tuple[Manifest, dict[str, object]]:
    """Parse the manifest of an earlier push; an invalid one counts as missing and is rewritten."""
    try:
        return (manifests.parse(data), _object(data) or {}) if data is not None else (Manifest({}), {})
    except KronaError:
        return Manifest({}), {}


def _object(data: bytes | None) -> dict[str, object] | None:
    try:
        return strict_json.parse(data) if data is not None else None
    except KronaError:
        return {}


def _check_repo(package: PushPackage, request: PushRequest, there: RepoState) -> None:
    if not request.force:
        check_repository(there, package.adapter.base_model)
    if package.options.card_only:
        _check_weights(package, request, there)


def _check_weights(package: PushPackage, request: PushRequest, there: RepoState) -> None:
    """Raise ConflictError unless the repository holds the weights that card and manifest describe."""
    known = there.listing.files.get(WEIGHTS) if there.listing else None
    if known is None or not is_same(package.paths[WEIGHTS], known):
        contents = "other weights" if known else "no weights"
        raise ConflictError(
            f"{request.repo} contains {contents}: the card would describe {package.adapter.source.name}.",
            fix="Push without --card-only, or specify the adapter in the repository.",
        )


def _check_tag(api: HfApi, request: PushRequest, plan: PushPlan) -> None:
    """Raise ConflictError if the tag names another commit: people pin tags."""
    if not request.tag or plan.parent is None:
        return
    taken = _tags(api, request).get(request.tag)
    if taken is not None and (plan.changes or taken != plan.parent):
        raise ConflictError(
            f"{request.repo} already has a tag {request.tag}, at commit {taken[:7]}.", fix="Choose another tag."
        )


def _tags(api: HfApi, request: PushRequest) -> dict[str, str]:
    with hub_errors(request.repo), quiet():
        refs = retrying(lambda: api.list_repo_refs(request.repo))
    return {t.name: t.target_commit for t in refs.tags}


def _planned(
    package: PushPackage, request: PushRequest, there: RepoState, sign_key: str | Path | None = None
) -> tuple[PushPlan, dict[str, Path]]:
    paths, deleted = finish(package, request.repo, there)
    paths = dict(paths)
    signed = there.listing is not None and SIGNATURE in there.listing.files
    if not is_still_signed(paths, there):
        if sign_key is not None:
            paths |= sign_folder(paths, package.folder, Path(sign_key))
        elif signed:
            deleted = (*deleted, SIGNATURE)  # it would not match the new files
    if package.options.card_only:
        paths = {name: path for name, path in paths.items() if name in ABOUT}
        deleted = tuple(name for name in deleted if name in ABOUT)
    visibility = "as it is" if there.listing else "public" if request.private is False else "private"
    plan = PushPlan(
        repo=request.repo,
        revision=request.revision,
        parent=there.listing.commit if there.listing else None,
        visibility=visibility,
        rows=rows_of(paths, deleted, there, _has_xet()),
        create_pr=request.create_pr,
        tag=request.tag,
        notes=_notes(request, there.listing),
    )
    return plan, paths


def _notes(request: PushRequest, listing: Listing | None) -> tuple[str, ...]:
    """Notes about an existing repository."""
    if listing is None or request.private in (None, listing.private):
        return listing.notes if listing else ()
    stays = "private" if listing.private else "public"
    return (*listing.notes, f"{request.repo} exists and stays {stays}; change that in its settings on the Hub.")


def _has_xet() -> bool:
    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


# --- sending ---------------------------------------------------------------------------------------------------------


def _create(api: HfApi, request: PushRequest) -> RepoState:
    """Create the repository; one that appeared in the meantime is read like any other."""
    with hub_errors(request.repo), quiet():
        retrying(lambda: api.create_repo(request.repo, private=request.private is not False, exist_ok=True))
    there = repository_state(api, request)
    if there.listing is None:
        raise OfflineError(f"{request.repo} was created but is not available yet.", fix="Push again in a moment.")
    return there


def _message(package: PushPackage, request: PushRequest) -> str:
    d = package.adapter.description
    return (
        request.message
        or f"Upload adapter: {len(d.modules)} layers, {d.parameters:,} parameters (krona-hub {version('krona-hub')})"
    )


def _report(request: PushRequest, plan: PushPlan, notes: tuple[str, ...] = ()) -> PushReport:
    return PushReport(plan, f"{endpoint_of(request.endpoint)}/{request.repo}", notes=(*plan.notes, *notes))


def _tagged(api: HfApi, request: PushRequest, report: PushReport, dry_run: bool = False) -> PushReport:
    """Set the requested tag, even if an earlier push was interrupted before it; return the report with the tag."""
    target = report.commit or report.plan.parent
    if not request.tag or dry_run or target is None or request.create_pr:
        return report
    tag = request.tag
    if _tags(api, request).get(tag) != target:
        try:
            with hub_errors(f"{request.repo}@{tag}"), quiet():
                retrying(lambda: api.create_tag(request.repo, tag=tag, revision=target, exist_ok=False))
        except ConflictError:
            if _tags(api, request).get(tag) != target:  # else only the response of the first attempt was lost
                raise
    return replace(report, tag=tag)
