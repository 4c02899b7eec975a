"""Which file of a repository is the adapter."""

from __future__ import annotations

from collections.abc import Collection

from krona_hub.checkpoints.file_names import (
    DIFFUSERS_WEIGHTS,
    NATIVE_WEIGHTS,
    PEFT_CONFIG,
    PEFT_WEIGHTS,
    REPO_PICKLES,
    SAFETENSORS,
)
from krona_hub.errors import AmbiguousError, NotFoundError, PickleError
from krona_hub.sources.safe_names import is_safe, printable


def choose(names: Collection[str], repo: str, wanted: str | None = None) -> str:
    """The adapter among the files of a repository: the one asked for, krona's own, the standard names, or the only one.

    Pickles are never taken in its place. Raises NotFoundError, AmbiguousError or PickleError with the fix.
    """
    if wanted is not None:
        return _asked_for(names, repo, wanted)
    weights = sorted(n for n in names if n.endswith(SAFETENSORS) and is_safe(n))
    standard = [n for n in (NATIVE_WEIGHTS, PEFT_WEIGHTS, DIFFUSERS_WEIGHTS) if n in weights]
    if standard:
        return standard[0]
    if len(weights) == 1:
        return weights[0]
    if weights:
        raise AmbiguousError(f"{repo} has {len(weights)} safetensors files.", fix=f"Name one: {repo}/{weights[0]}")
    raise _none(names, repo)


def with_companions(name: str, names: Collection[str]) -> tuple[str, ...]:
    """The file, and the one beside it without which it means nothing."""
    folder, _, last = name.rpartition("/")
    config = f"{folder}/{PEFT_CONFIG}" if folder else PEFT_CONFIG
    return (name, config) if last == PEFT_WEIGHTS and config in names else (name,)


def _asked_for(names: Collection[str], repo: str, wanted: str) -> str:
    if wanted.lower().endswith(REPO_PICKLES):
        raise PickleError(f"{printable(wanted)} is a pickle, which may run programs when it is opened.", fix=_ASK)
    if wanted not in names:
        raise NotFoundError(f"{repo} has no file {printable(wanted)}.", fix=f"krona hub info {repo} lists its files.")
    if not is_safe(wanted):
        raise _no_name(wanted)
    return wanted


def _no_name(name: str) -> NotFoundError:
    return NotFoundError(f"{printable(name)} is no name that krona downloads.", fix="Ask its owner to rename it.")


_ASK = "Ask its owner for a safetensors file."


def _none(names: Collection[str], repo: str) -> NotFoundError | PickleError:
    odd = next((n for n in sorted(names) if n.endswith(SAFETENSORS)), None)
    if odd is not None:
        return _no_name(odd)
    if any(n.lower().endswith(REPO_PICKLES) for n in names):
        return PickleError(f"{repo} has no safetensors file, only pickles, which may run programs.", fix=_ASK)
    return NotFoundError(f"{repo} has no safetensors file.", fix="Is that the right repository?")
