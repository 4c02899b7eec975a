"""`push`: an adapter becomes one commit on the Hub, or nothing changes there."""

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
from krona_hub.hub.push_package import PushPackage, There, Wanted, finish, pack
from krona_hub.hub.push_plan import PushPlan, check_theirs, is_same, rows_of
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
    """What `push` did, or would do."""

    plan: PushPlan
    url: str
    commit: str | None = None  # None: nothing was committed
    pull_request: str | None = None
    tag: str | None = None
    verified: int = 0  # files whose digest on the Hub was compared
    notes: tuple[str, ...] = ()

    @property
    def up_to_date(self) -> bool:
        return not self.plan.changes


@dataclass(frozen=True)
class PushRequest:
    """A push that was asked for."""

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
    """Publish an adapter in the repository `repo` (ns/name) with one commit, checked before and after.

    A repository that is not there is created, private unless `private` is False. `confirm` gets the plan before
    anything is written and may stop it. Pushing the same again commits nothing. Raises AuthError, ConflictError where
    the repository holds something else (unless `force`) or was changed meanwhile, IntegrityError where the Hub holds
    other bytes than were sent, OfflineError, RateLimitError, and what validating the file raises.
    """
    if not HUB_NAME.fullmatch(repo):
        raise UsageError(f"{repo!r} is no name of a repository.", fix="Write namespace/name.")
    _check_reference("branch", revision)
    if tag is not None:
        _check_reference("tag", tag)
    request = PushRequest(repo, revision, private, create_pr, tag, message, force, endpoint)
    if card_only and (with_lora or with_lokr or images or not card):
        raise UsageError("--card-only writes the card and nothing else.", fix="Leave it out to push other files too.")
    wanted = Wanted(with_lora, with_lokr, Path(images) if images else None, card, card_only, base)
    if create_pr and tag:
        told = "a pull request has no commit of the branch yet that a tag could name."
        raise UsageError(told, fix="Push again with --tag when it is merged.")
    if is_offline() and not dry_run:
        raise OfflineError("pushing needs the Hub, and HF_HUB_OFFLINE is set.", fix="Unset it, or use --dry-run.")
    with tempfile.TemporaryDirectory(prefix="krona-push-") as name:
        folder = Path(name)
        package = pack(check_adapter(source, folder, base_model, base), folder, wanted)
        if is_offline():
            return _report(request, *_planned(package, request, There())[:1], notes=("offline: nobody was asked.",))
        return _push(package, request, sign_key, dry_run, confirm)


def _check_reference(kind: str, name: str) -> None:
    """Raise UsageError for what git takes for no branch or tag: to be known before anything is committed."""
    if not _REFERENCE.fullmatch(name) or ".." in name or name.endswith((".", ".lock")):
        raise UsageError(f"{name!r} is no name of a {kind}.", fix="Write letters, digits, dots and dashes: v1.0.")


def _push(
    package: PushPackage, request: PushRequest, sign_key: str | Path | None, dry_run: bool, confirm: Confirm | None
) -> PushReport:
    api = client(request.endpoint)
    check_account(api, request.repo, create_pr=request.create_pr)
    there = look(api, request)
    _check_repo(package, request, there)
    plan = _planned(package, request, there, sign_key)[0]
    _check_tag(api, request, plan)
    if dry_run or not plan.changes:
        return _tagged(api, request, _report(request, plan), dry_run)
    if confirm is not None and not confirm(plan):
        return _report(request, plan, notes=("stopped: nothing was sent.",))
    if there.listing is None:
        there = _create(api, request)
    report = _commit(api, package, request, there, sign_key)
    return replace(report, plan=replace(report.plan, visibility=plan.visibility))


def _commit(
    api: HfApi, package: PushPackage, request: PushRequest, there: There, sign_key: str | Path | None
) -> PushReport:
    """Commit; where somebody else committed in between, plan again as long as the two do not touch the same files."""
    for _ in range(MAX_REPLANS):
        plan, paths = _planned(package, request, there, sign_key)
        if not plan.changes:
            return _tagged(api, request, _report(request, plan, notes=("somebody else has pushed the same.",)))
        try:
            made = commit(api, plan, paths, _message(package, request))
        except ConflictError as lost:
            there = _after_a_race(api, package, request, there, plan, lost)
            continue
        verified = verify(api, plan, paths, made.commit)
        report = replace(_report(request, plan), commit=made.commit, pull_request=made.pull_request, verified=verified)
        return _tagged(api, request, report)
    raise ConflictError(f"{request.repo} changes faster than a push goes.", fix="Push again when it is quiet.")


def _after_a_race(
    api: HfApi, package: PushPackage, request: PushRequest, before: There, plan: PushPlan, lost: ConflictError
) -> There:
    """The repository as it is now, if what changed is none of our business; else the conflict is raised."""
    now = look(api, request)
    _check_repo(package, request, now)
    old, new = (t.listing.files if t.listing else {} for t in (before, now))
    clash = [row.file for row in plan.changes if old.get(row.file) != new.get(row.file)]
    if before.listing and now.listing and before.listing.commit == now.listing.commit:
        raise lost
    if not clash or request.force:
        return now
    sha = now.listing.commit[:7] if now.listing else "?"
    raise ConflictError(
        f"somebody else changed {clash[0]} of {request.repo} meanwhile (commit {sha}).",
        fix="Look at it, then push again: what you see then is replaced. --force does so now.",
    )


# --- before anything is sent -----------------------------------------------------------------------------------------


def look(api: HfApi, request: PushRequest) -> There:
    """What the repository holds at the revision that is to be written."""
    try:
        listing = ask(api, request.repo, None if request.revision == "main" else request.revision)
    except NotFoundError as error:
        if is_missing(error.__cause__ or error):
            return There()
        listing = _new_branch(api, request)
    names = (n for n in (CARD, CONFIG, MANIFEST) if n in listing.files)
    files = {name: fetch(listing, name, endpoint=request.endpoint).read_bytes() for name in names}
    manifest, document = _manifest(files.get(MANIFEST))
    card = files[CARD].decode("utf-8", "replace") if CARD in files else None
    return There(listing, card, manifest, document, _object(files.get(CONFIG)))


def _new_branch(api: HfApi, request: PushRequest) -> Listing:
    """What a branch that is not there yet starts from."""
    return replace(ask(api, request.repo), notes=(f"the branch {request.revision} will be created.",))


def _manifest(data: bytes | None) -> tuple[Manifest, dict[str, object]]:
    """The manifest of an earlier push; a broken one is as good as none, and is written anew."""
    try:
        return (manifests.parse(data), _object(data) or {}) if data is not None else (Manifest({}), {})
    except KronaError:
        return Manifest({}), {}


def _object(data: bytes | None) -> dict[str, object] | None:
    try:
        return strict_json.parse(data) if data is not None else None
    except KronaError:
        return {}


def _check_repo(package: PushPackage, request: PushRequest, there: There) -> None:
    if not request.force:
        check_theirs(there, package.adapter.base_model)
    if package.wanted.card_only:
        _check_weights(package, request, there)


def _check_weights(package: PushPackage, request: PushRequest, there: There) -> None:
    """Raise ConflictError unless the weights there are those that the card and the manifest are about."""
    known = there.listing.files.get(WEIGHTS) if there.listing else None
    if known is None or not is_same(package.paths[WEIGHTS], known):
        held = "other weights" if known else "no weights"
        raise ConflictError(
            f"{request.repo} holds {held}: the card would be that of {package.adapter.source.name}.",
            fix="Push without --card-only, or name the adapter that is there.",
        )


def _check_tag(api: HfApi, request: PushRequest, plan: PushPlan) -> None:
    """Raise ConflictError for a tag that is taken by another commit: tags are what people pin."""
    if not request.tag or plan.parent is None:
        return
    taken = _tags(api, request).get(request.tag)
    if taken is not None and (plan.changes or taken != plan.parent):
        raise ConflictError(
            f"{request.repo} has a tag {request.tag} already, of commit {taken[:7]}.", fix="Choose another."
        )


def _tags(api: HfApi, request: PushRequest) -> dict[str, str]:
    with hub_errors(request.repo), quiet():
        refs = retrying(lambda: api.list_repo_refs(request.repo))
    return {t.name: t.target_commit for t in refs.tags}


def _planned(
    package: PushPackage, request: PushRequest, there: There, sign_key: str | Path | None = None
) -> tuple[PushPlan, dict[str, Path]]:
    paths, gone = finish(package, request.repo, there)
    paths = dict(paths)
    signed = there.listing is not None and SIGNATURE in there.listing.files
    if not is_still_signed(paths, there):
        if sign_key is not None:
            paths |= sign_folder(paths, package.folder, Path(sign_key))
        elif signed:
            gone = (*gone, SIGNATURE)  # it would be one of other files
    if package.wanted.card_only:
        paths = {name: path for name, path in paths.items() if name in ABOUT}
        gone = tuple(name for name in gone if name in ABOUT)
    visibility = "as it is" if there.listing else "public" if request.private is False else "private"
    plan = PushPlan(
        repo=request.repo,
        revision=request.revision,
        parent=there.listing.commit if there.listing else None,
        visibility=visibility,
        rows=rows_of(paths, gone, there, _has_xet()),
        create_pr=request.create_pr,
        tag=request.tag,
        notes=_notes(request, there.listing),
    )
    return plan, paths


def _notes(request: PushRequest, listing: Listing | None) -> tuple[str, ...]:
    """What has to be said about the repository that is there."""
    if listing is None or request.private in (None, listing.private):
        return listing.notes if listing else ()
    stays = "private" if listing.private else "public"
    return (*listing.notes, f"{request.repo} exists and stays {stays}: its settings on the Hub change that.")


def _has_xet() -> bool:
    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


# --- sending ---------------------------------------------------------------------------------------------------------


def _create(api: HfApi, request: PushRequest) -> There:
    """The new repository; one that has appeared meanwhile is looked at like any other."""
    with hub_errors(request.repo), quiet():
        retrying(lambda: api.create_repo(request.repo, private=request.private is not False, exist_ok=True))
    there = look(api, request)
    if there.listing is None:
        raise OfflineError(f"{request.repo} was created and is not there yet.", fix="Push again in a moment.")
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
    """The report with the tag that was asked for set; a push that was interrupted before its tag gets it now."""
    target = report.commit or report.plan.parent
    if not request.tag or dry_run or target is None or request.create_pr:
        return report
    tag = request.tag
    if _tags(api, request).get(tag) != target:
        try:
            with hub_errors(f"{request.repo}@{tag}"), quiet():
                retrying(lambda: api.create_tag(request.repo, tag=tag, revision=target, exist_ok=False))
        except ConflictError:
            if _tags(api, request).get(tag) != target:  # else only the answer of the first try was lost
                raise
    return replace(report, tag=tag)
