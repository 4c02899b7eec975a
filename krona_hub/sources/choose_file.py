"""Selection of the adapter file of a repository."""

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
    """Select the adapter file: the `wanted` file, the native file, a standard name, or the only safetensors file.

    Pickles are never selected. Raises NotFoundError, AmbiguousError or PickleError with the fix.
    """
    if wanted is not None:
        return _requested(names, repo, wanted)
    weights = sorted(n for n in names if n.endswith(SAFETENSORS) and is_safe(n))
    standard = [n for n in (NATIVE_WEIGHTS, PEFT_WEIGHTS, DIFFUSERS_WEIGHTS) if n in weights]
    if standard:
        return standard[0]
    if len(weights) == 1:
        return weights[0]
    if weights:
        raise AmbiguousError(
            f"{repo} has {len(weights)} safetensors files.", fix=f"Specify one of them, for example {repo}/{weights[0]}"
        )
    raise _none(names, repo)


def with_companions(name: str, names: Collection[str]) -> tuple[str, ...]:
    """Return the file and the configuration file that it requires, if any."""
    folder, _, last = name.rpartition("/")
    config = f"{folder}/{PEFT_CONFIG}" if folder else PEFT_CONFIG
    return (name, config) if last == PEFT_WEIGHTS and config in names else (name,)


def _requested(names: Collection[str], repo: str, wanted: str) -> str:
    if wanted.lower().endswith(REPO_PICKLES):
        raise PickleError(f"{printable(wanted)} is a pickle, which can execute code when loaded.", fix=_ASK)
    if wanted not in names:
        raise NotFoundError(
            f"{repo} has no file {printable(wanted)}.", fix=f"List its files with krona hub info {repo}."
        )
    if not is_safe(wanted):
        raise _unsafe_name(wanted)
    return wanted


def _unsafe_name(name: str) -> NotFoundError:
    return NotFoundError(f"{printable(name)} is not a safe file name.", fix="Ask the owner to rename the file.")


_ASK = "Ask the owner for a safetensors file."


def _none(names: Collection[str], repo: str) -> NotFoundError | PickleError:
    odd = next((n for n in sorted(names) if n.endswith(SAFETENSORS)), None)
    if odd is not None:
        return _unsafe_name(odd)
    if any(n.lower().endswith(REPO_PICKLES) for n in names):
        return PickleError(
            f"{repo} has no safetensors file, only pickles, which can execute code when loaded.", fix=_ASK
        )
    return NotFoundError(f"{repo} has no safetensors file.", fix="Check that this is the right repository.")
