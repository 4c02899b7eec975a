"""One commit with everything in it, and the look afterwards whether the Hub holds what was sent."""

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


class Made(NamedTuple):
    commit: str
    pull_request: str | None


def commit(api: HfApi, plan: PushPlan, paths: Mapping[str, Path], message: str) -> Made:
    """Send the changes of a plan as one commit on top of its parent.

    Tried again after answers that pass; a commit whose answer was lost is recognised by what the Hub then holds.
    Raises ConflictError where the parent is no longer the head.
    """
    with hub_errors(plan.repo), quiet(plan.bytes_to_send):
        _make_branch(api, plan)
        for attempt in range(TRIES):
            try:
                return _send(api, plan, paths, message)
            except Exception as error:
                if (made := _made_after_all(api, plan, paths, error)) is not None:
                    return made
                pause = pause_before_next(error, attempt)
                if pause is None or attempt == TRIES - 1:
                    raise
                retry.sleep(pause)
    raise ConflictError(f"{plan.repo} takes no commit.", fix="Push again later.")  # not reached


def _make_branch(api: HfApi, plan: PushPlan) -> None:
    if plan.revision != "main" and not plan.revision.startswith("refs/") and not plan.create_pr:
        retrying(lambda: api.create_branch(plan.repo, branch=plan.revision, revision=plan.parent, exist_ok=True))


def _send(api: HfApi, plan: PushPlan, paths: Mapping[str, Path], message: str) -> Made:
    def once() -> Any:
        return api.create_commit(
            plan.repo,
            operations(plan, paths),
            commit_message=message,
            revision=None if plan.revision == "main" else plan.revision,
            create_pr=plan.create_pr,
            parent_commit=plan.parent,
        )

    info = _over_lfs_if_need_be(once)
    return Made(str(info.oid), str(info.pr_url) if plan.create_pr else None)


def _over_lfs_if_need_be(once: Callable[[], Any]) -> Any:
    try:
        return once()
    except ConnectionError as error:
        if not has_no_xet(error):
            raise
    with without_xet():
        return once()


def operations(plan: PushPlan, paths: Mapping[str, Path]) -> list[Any]:
    """The changes of a plan as the client wants them: made anew for every try, since it marks them as used."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    adds = [CommitOperationAdd(r.file, str(paths[r.file])) for r in plan.changes if r.action != "delete"]
    for add in adds:
        add.upload_info.sha256 = bytes.fromhex(file_sha256_once(paths[add.path_in_repo]))  # it need not read it again
    return [*adds, *(CommitOperationDelete(r.file) for r in plan.changes if r.action == "delete")]


def _made_after_all(api: HfApi, plan: PushPlan, paths: Mapping[str, Path], error: BaseException) -> Made | None:
    """The commit, where only its answer was lost: the head has moved, and holds what we sent."""
    if plan.create_pr or (pause_before_next(error, 0) is None and not _is_stale(error)):
        return None
    head = _head(api, plan)
    if head is None or head.commit == plan.parent or not _holds(head, plan, paths):
        return None
    return Made(head.commit, None)


def _is_stale(error: BaseException) -> bool:
    response = getattr(error, "response", None)
    return response is not None and response.status_code == 412


def _head(api: HfApi, plan: PushPlan) -> Listing | None:
    try:
        return ask(api, plan.repo, None if plan.revision == "main" else plan.revision)
    except Exception:  # the next try will say what is wrong
        return None


def _holds(head: Listing, plan: PushPlan, paths: Mapping[str, Path]) -> bool:
    """Whether every file of the plan is there as it is here, and those that were to go are gone."""
    for row in plan.changes:
        there = head.files.get(row.file)
        if (there is None) != (row.action == "delete") or (there and not is_same(paths[row.file], there)):
            return False
    return True


def verify(api: HfApi, plan: PushPlan, paths: Mapping[str, Path], sha: str) -> int:
    """Compare size and digest of every file of the commit with what lies here; how many were compared.

    Raises IntegrityError naming the first that differs or is missing.
    """
    sent = [r.file for r in plan.rows if r.action != "delete"]
    with hub_errors(f"{plan.repo}@{sha[:7]}"), quiet():
        found = retrying(lambda: api.get_paths_info(plan.repo, sent, revision=sha))
    there = {f.path: _remote(f) for f in found}
    for name in sent:
        if name not in there or not is_same(paths[name], there[name]):
            why = "is not there" if name not in there else "has another sha256 there"
            raise IntegrityError(f"{name} of {plan.repo} {why} after the commit {sha[:7]}.", fix="Push again.")
    return len(sent)


def _remote(file: Any) -> RemoteFile:
    return RemoteFile(file.path, file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)
