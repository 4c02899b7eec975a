"""Check the permission to push before anything is planned, so that a dry run checks it too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from krona_hub.errors import AuthError, NotFoundError
from krona_hub.sources.client import quiet
from krona_hub.sources.client_errors import LOGIN, hub_errors
from krona_hub.sources.retry import retrying

if TYPE_CHECKING:
    from huggingface_hub import HfApi


def check_account(api: HfApi, repo: str, *, create_pr: bool) -> None:
    """Raise AuthError without a valid token, or without permission to write to or create the repository."""
    with hub_errors(repo), quiet():
        me = retrying(api.whoami)
        try:
            retrying(lambda: api.auth_check(repo, write=not create_pr))
        except Exception as error:
            if not is_missing(error):
                raise
            if create_pr:
                raise NotFoundError(f"{repo} does not exist.", fix="Push without --create-pr to create it.") from error
            _check_may_create(me, repo)


def _check_may_create(me: Mapping[str, Any], repo: str) -> None:
    """Raise AuthError if this account or token is known to lack the permission to create the repository."""
    namespace, name = repo.split("/")
    role = ((me.get("auth") or {}).get("accessToken") or {}).get("role")
    if role == "read":
        raise AuthError(f"{repo}: the token is read-only.", fix=f"Use a token with write access. {LOGIN}")
    if role != "write":  # a fine-grained token may hide organizations: the Hub decides
        return
    known = [str(one.get("name")) for one in (me, *(me.get("orgs") or ()))]
    if namespace.casefold() not in map(str.casefold, known):
        raise AuthError(
            f"{known[0]} cannot create a repository in {namespace}.", fix=f"Push to {known[0]}/{name}. {LOGIN}"
        )


def is_missing(error: BaseException) -> bool:
    """Whether the repository does not exist, or is hidden from this account."""
    from huggingface_hub import errors

    return isinstance(error, errors.RepositoryNotFoundError) and not isinstance(error, errors.GatedRepoError)
