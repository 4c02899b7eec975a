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
    asked = PushRequest(repo, revision, private, create_pr, tag, message, force, endpoint)
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
            return _report(asked, *_planned(package, asked, There())[:1], notes=("offline: nobody was asked.",))
        return _push(package, asked, sign_key, dry_run, confirm)


def _check_reference(kind: str, name: str) -> None:
    """Raise UsageError for what git takes for no branch or tag: to be known before anything is committed."""
    if not _REFERENCE.fullmatch(name) or ".." in name or name.endswith((".", ".lock")):
        raise UsageError(f"{name!r} is no name of a {kind}.", fix="Write letters, digits, dots and dashes: v1.0.")


def _push(
    package: PushPackage, asked: PushRequest, sign_key: str | Path | None, dry_run: bool, confirm: Confirm | None
) -> PushReport:
    api = client(asked.endpoint)
    check_account(api, asked.repo, create_pr=asked.create_pr)
    there = look(api, asked)
    _check_repo(package, asked, there)
    plan = _planned(package, asked, there, sign_key)[0]
    _check_tag(api, asked, plan)
    if dry_run or not plan.changes:
        return _tagged(api, asked, _report(asked, plan), dry_run)
    if confirm is not None and not confirm(plan):
        return _report(asked, plan, notes=("stopped: nothing was sent.",))
    if there.listing is None:
        there = _create(api, asked)
    report = _commit(api, package, asked, there, sign_key)
    return replace(report, plan=replace(report.plan, visibility=plan.visibility))


def _commit(
    api: HfApi, package: PushPackage, asked: PushRequest, there: There, sign_key: str | Path | None
) -> PushReport:
    """Commit; where somebody else committed in between, plan again as long as the two do not touch the same files."""
    for _ in range(MAX_REPLANS):
        plan, paths = _planned(package, asked, there, sign_key)
        if not plan.changes:
            return _tagged(api, asked, _report(asked, plan, notes=("somebody else has pushed the same.",)))
        try:
            made = commit(api, plan, paths, _message(package, asked))
        except ConflictError as lost:
            there = _after_a_race(api, package, asked, there, plan, lost)
            continue
        verified = verify(api, plan, paths, made.commit)
        report = replace(_report(asked, plan), commit=made.commit, pull_request=made.pull_request, verified=verified)
        return _tagged(api, asked, report)
    raise ConflictError(f"{asked.repo} changes faster than a push goes.", fix="Push again when it is quiet.")


def _after_a_race(
    api: HfApi, package: PushPackage, asked: PushRequest, before: There, plan: PushPlan, lost: ConflictError
) -> There:
    """The repository as it is now, if what changed is none of our business; else the conflict is raised."""
    now = look(api, asked)
    _check_repo(package, asked, now)
    old, new = (t.listing.files if t.listing else {} for t in (before, now))
    clash = [row.file for row in plan.changes if old.get(row.file) != new.get(row.file)]
    if before.listing and now.listing and before.listing.commit == now.listing.commit:
        raise lost
    if not clash or asked.force:
        return now
    sha = now.listing.commit[:7] if now.listing else "?"
    raise ConflictError(
        f"somebody else changed {clash[0]} of {asked.repo} meanwhile (commit {sha}).",
        fix="Look at it, then push again: what you see then is replaced. --force does so now.",
    )


# --- before anything is sent -----------------------------------------------------------------------------------------


def look(api: HfApi, asked: PushRequest) -> There:
    """What the repository holds at the revision that is to be written."""
    try:
        listing = ask(api, asked.repo, None if asked.revision == "main" else asked.revision)
    except NotFoundError as error:
        if is_missing(error.__cause__ or error):
            return There()
        listing = _new_branch(api, asked)
    names = (n for n in (CARD, CONFIG, MANIFEST) if n in listing.files)
    files = {name: fetch(listing, name, endpoint=asked.endpoint).read_bytes() for name in names}
    manifest, document = _manifest(files.get(MANIFEST))
    card = files[CARD].decode("utf-8", "replace") if CARD in files else None
    return There(listing, card, manifest, document, _object(files.get(CONFIG)))


def _new_branch(api: HfApi, asked: PushRequest) -> Listing:
    """What a branch that is not there yet starts from."""
    return replace(ask(api, asked.repo), notes=(f"the branch {asked.revision} will be created.",))


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


def _check_repo(package: PushPackage, asked: PushRequest, there: There) -> None:
    if not asked.force:
        check_theirs(there, package.adapter.base_model)
    if package.wanted.card_only:
        _check_weights(package, asked, there)


def _check_weights(package: PushPackage, asked: PushRequest, there: There) -> None:
    """Raise ConflictError unless the weights there are those that the card and the manifest are about."""
    known = there.listing.files.get(WEIGHTS) if there.listing else None
    if known is None or not is_same(package.paths[WEIGHTS], known):
        held = "other weights" if known else "no weights"
        raise ConflictError(
            f"{asked.repo} holds {held}: the card would be that of {package.adapter.source.name}.",
            fix="Push without --card-only, or name the adapter that is there.",
        )


def _check_tag(api: HfApi, asked: PushRequest, plan: PushPlan) -> None:
    """Raise ConflictError for a tag that is taken by another commit: tags are what people pin."""
    if not asked.tag or plan.parent is None:
        return
    taken = _tags(api, asked).get(asked.tag)
    if taken is not None and (plan.changes or taken != plan.parent):
        raise ConflictError(
            f"{asked.repo} has a tag {asked.tag} already, of commit {taken[:7]}.", fix="Choose another."
        )


def _tags(api: HfApi, asked: PushRequest) -> dict[str, str]:
    with hub_errors(asked.repo), quiet():
        refs = retrying(lambda: api.list_repo_refs(asked.repo))
    return {t.name: t.target_commit for t in refs.tags}


def _planned(
    package: PushPackage, asked: PushRequest, there: There, sign_key: str | Path | None = None
) -> tuple[PushPlan, dict[str, Path]]:
    paths, gone = finish(package, asked.repo, there)
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
    visibility = "as it is" if there.listing else "public" if asked.private is False else "private"
    plan = PushPlan(
        repo=asked.repo,
        revision=asked.revision,
        parent=there.listing.commit if there.listing else None,
        visibility=visibility,
        rows=rows_of(paths, gone, there, _has_xet()),
        create_pr=asked.create_pr,
        tag=asked.tag,
        notes=_notes(asked, there.listing),
    )
    return plan, paths


def _notes(asked: PushRequest, listing: Listing | None) -> tuple[str, ...]:
    """What has to be said about the repository that is there."""
    if listing is None or asked.private in (None, listing.private):
        return listing.notes if listing else ()
    stays = "private" if listing.private else "public"
    return (*listing.notes, f"{asked.repo} exists and stays {stays}: its settings on the Hub change that.")


def _has_xet() -> bool:
    from huggingface_hub import constants

    return not constants.HF_HUB_DISABLE_XET and find_spec("hf_xet") is not None


# --- sending ---------------------------------------------------------------------------------------------------------


def _create(api: HfApi, asked: PushRequest) -> There:
    """The new repository; one that has appeared meanwhile is looked at like any other."""
    with hub_errors(asked.repo), quiet():
        retrying(lambda: api.create_repo(asked.repo, private=asked.private is not False, exist_ok=True))
    there = look(api, asked)
    if there.listing is None:
        raise OfflineError(f"{asked.repo} was created and is not there yet.", fix="Push again in a moment.")
    return there


def _message(package: PushPackage, asked: PushRequest) -> str:
    d = package.adapter.description
    return (
        asked.message
        or f"Upload adapter: {len(d.modules)} layers, {d.parameters:,} parameters (krona-hub {version('krona-hub')})"
    )


def _report(asked: PushRequest, plan: PushPlan, notes: tuple[str, ...] = ()) -> PushReport:
    return PushReport(plan, f"{endpoint_of(asked.endpoint)}/{asked.repo}", notes=(*plan.notes, *notes))


def _tagged(api: HfApi, asked: PushRequest, report: PushReport, dry_run: bool = False) -> PushReport:
    """The report with the tag that was asked for set; a push that was interrupted before its tag gets it now."""
    target = report.commit or report.plan.parent
    if not asked.tag or dry_run or target is None or asked.create_pr:
        return report
    tag = asked.tag
    if _tags(api, asked).get(tag) != target:
        try:
            with hub_errors(f"{asked.repo}@{tag}"), quiet():
                retrying(lambda: api.create_tag(asked.repo, tag=tag, revision=target, exist_ok=False))
        except ConflictError:
            if _tags(api, asked).get(tag) != target:  # else only the answer of the first try was lost
                raise
    return replace(report, tag=tag)
