"""Send a push as one commit, then verify that the Hub holds what was sent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from krona_hub.checkpoints.digest import file_sha256_once
from krona_hub.errors import ConflictError, IntegrityError
from krona_hub.hub.push_plan import PushPlan, is_same
from krona_hub.sources import retry
from krona_hub.sources.client import quiet, without_xet
from krona_hub.sources.client_errors import has_no_xet, hub_errors
from krona_hub.sources.repo_listing import Listing, RemoteFile, ask
from krona_hub.sources.retry import TRIES, pause_before_next, retrying

if TYPE_CHECKING:
    from huggingface_hub import HfApi


class CommitResult(NamedTuple):
    """The commit of a push, and its pull request if there is one."""

    commit: str
    pull_request: str | None


def commit(api: HfApi, plan: PushPlan, paths: Mapping[str, Path], message: str) -> CommitResult:
    """Send the changes of a plan as one commit on top of its parent.

    Retries after transient errors. If the response to a commit was lost, the commit is recognized by what the Hub
    then holds. Raises ConflictError if the parent is no longer the head.
    """
    with hub_errors(plan.repo), quiet(plan.bytes_to_send):
        _make_branch(api, plan)
        for attempt in range(TRIES):
            try:
                return _send(api, plan, paths, message)
            except Exception as error:
                if (landed := _landed_commit(api, plan, paths, error)) is not None:
                    return landed
                pause = pause_before_next(error, attempt)
                if pause is None or attempt == TRIES - 1:
                    raise
                retry.sleep(pause)
    raise ConflictError(f"Cannot commit to {plan.repo}.", fix="Push again later.")  # not reached


def _make_branch(api: HfApi, plan: PushPlan) -> None:
    if plan.revision != "main" and not plan.revision.startswith("refs/") and not plan.create_pr:
        retrying(lambda: api.create_branch(plan.repo, branch=plan.revision, revision=plan.parent, exist_ok=True))


def _send(api: HfApi, plan: PushPlan, paths: Mapping[str, Path], message: str) -> CommitResult:
    def once() -> Any:
        return api.create_commit(
            plan.repo,
            operations(plan, paths),
            commit_message=message,
            revision=None if plan.revision == "main" else plan.revision,
            create_pr=plan.create_pr,
            parent_commit=plan.parent,
        )

    info = _with_lfs_fallback(once)
    return CommitResult(str(info.oid), str(info.pr_url) if plan.create_pr else None)


def _with_lfs_fallback(once: Callable[[], Any]) -> Any:
    try:
        return once()
    except ConnectionError as error:
        if not has_no_xet(error):
            raise
    with without_xet():
        return once()


def operations(plan: PushPlan, paths: Mapping[str, Path]) -> list[Any]:
    """Build the client's operations for a plan, anew for every attempt, since the client marks them as used."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    adds = [CommitOperationAdd(r.file, str(paths[r.file])) for r in plan.changes if r.action != "delete"]
    for add in adds:
        add.upload_info.sha256 = bytes.fromhex(file_sha256_once(paths[add.path_in_repo]))  # so that the client does not
    return [*adds, *(CommitOperationDelete(r.file) for r in plan.changes if r.action == "delete")]


def _landed_commit(api: HfApi, plan: PushPlan, paths: Mapping[str, Path], error: BaseException) -> CommitResult | None:
    """Return the commit if only its response was lost: the head has moved and holds what was sent."""
    if plan.create_pr or (pause_before_next(error, 0) is None and not _is_stale(error)):
        return None
    head = _head(api, plan)
    if head is None or head.commit == plan.parent or not _holds(head, plan, paths):
        return None
    return CommitResult(head.commit, None)


def _is_stale(error: BaseException) -> bool:
    response = getattr(error, "response", None)
    return response is not None and response.status_code == 412


def _head(api: HfApi, plan: PushPlan) -> Listing | None:
    try:
        return ask(api, plan.repo, None if plan.revision == "main" else plan.revision)
    except Exception:  # the next attempt reports the error
        return None


def _holds(head: Listing, plan: PushPlan, paths: Mapping[str, Path]) -> bool:
    """Whether the head holds every file of the plan as it is here, and none of the deleted ones."""
    for row in plan.changes:
        there = head.files.get(row.file)
        if (there is None) != (row.action == "delete") or (there and not is_same(paths[row.file], there)):
            return False
    return True


def verify(api: HfApi, plan: PushPlan, paths: Mapping[str, Path], sha: str) -> int:
    """Compare size and digest of every file of the commit with the local files; return the number of files.

    Raises IntegrityError with the name of the first file that differs or is missing.
    """
    sent = [r.file for r in plan.rows if r.action != "delete"]
    with hub_errors(f"{plan.repo}@{sha[:7]}"), quiet():
        found = retrying(lambda: api.get_paths_info(plan.repo, sent, revision=sha))
    remote = {f.path: _remote(f) for f in found}
    for name in sent:
        if name not in remote or not is_same(paths[name], remote[name]):
            why = "is missing" if name not in remote else "has a different sha256"
            raise IntegrityError(f"{name} of {plan.repo} {why} after commit {sha[:7]}.", fix="Push again.")
    return len(sent)


def _remote(file: Any) -> RemoteFile:
    return RemoteFile(file.path, file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)
