"""The prompts of a calibration: with and without the subject, to gather moments and held out. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from krona_hub.errors import DataError, NotFoundError, UsageError, abbreviated

DEFAULT, NONE = "default", "none"
HELD_OUT_EVERY = 4  # one in so many prompts of a list is held out
LEAST_FOR_HELD_OUT = 4  # prompts
FAMILIES = ("tiny-scenes",)  # with prompts of their own; all others have the general ones

Prompts = str | Path | Sequence[str]


@dataclass(frozen=True)
class PromptSets:
    """Prompts with the subject and other ones, for gathering and held out."""

    subject: tuple[str, ...]
    other: tuple[str, ...]
    held_out: tuple[str, ...]
    held_out_other: tuple[str, ...]

    def __post_init__(self) -> None:
        shared = {*self.subject, *self.other} & {*self.held_out, *self.held_out_other}
        if shared:
            raise UsageError(
                f"Calibration and held-out prompts overlap: {abbreviated(sorted(shared))}.",
                fix="Remove these prompts from one of the files.",
            )

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.subject, *self.other, *self.held_out, *self.held_out_other)


def prompt_sets(
    prompts: Prompts,
    other: Prompts = DEFAULT,
    held_out: Prompts | None = None,
    *,
    trigger: str | None = None,
    family: str | None = None,
) -> PromptSets:
    """Read and split the prompts.

    Parameters
    ----------
    prompts, other : text file with a prompt per line, list of prompts, or "default"; `other` may also be "none"
    held_out : prompts with the subject that are only measured; None holds out every fourth of `prompts`
    trigger : word for the subject in the default prompts
    family : catalog name of the base model, which may have prompts of its own

    Raises
    ------
    DataError, NotFoundError : a file is missing, empty or not UTF-8
    UsageError : calibration and held-out prompts overlap, or "default" without a trigger word
    """
    with_subject = _read(prompts, "subject", trigger, family)
    without = () if other == NONE else _read(other, "other", None, family)
    subject, own_held_out = (with_subject, ()) if held_out is not None else _split(with_subject)
    others, held_out_other = _split(without)
    given = own_held_out if held_out is None else _read(held_out, "subject", trigger, family)
    return PromptSets(subject, others, given, held_out_other)


def _read(source: Prompts, kind: str, trigger: str | None, family: str | None) -> tuple[str, ...]:
    if source == DEFAULT:
        return tuple(_default(kind, trigger, family))
    if not isinstance(source, str | Path):
        lines = [str(line).strip() for line in source]
        return _checked(lines, "The list of prompts")
    path = Path(source).expanduser()
    try:
        text = path.read_text("utf-8")
    except UnicodeDecodeError as problem:
        raise DataError(f"{path} is not valid UTF-8.", fix="Save the prompts as UTF-8 text, one per line.") from problem
    except FileNotFoundError as problem:
        raise NotFoundError(f"{path}: no such file.", fix='Specify a text file of prompts, or "default".') from problem
    except OSError as problem:
        raise DataError(
            f"{path}: {problem.strerror}.", fix="Specify a text file with one prompt per line."
        ) from problem
    return _checked(text.splitlines(), str(path))


def _checked(lines: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the prompts without empty lines, comments and repetitions."""
    prompts = tuple(dict.fromkeys(line.strip() for line in lines if line.strip() and not line.startswith("#")))
    if not prompts:
        raise DataError(f"{where} contains no prompt.", fix="Write one prompt per line.")
    return prompts


def _default(kind: str, trigger: str | None, family: str | None) -> Iterator[str]:
    """Yield the prompts shipped for a family; `{subject}` stands for the trigger word."""
    if kind == "subject" and not trigger:
        raise UsageError(
            "The adapter states no trigger word, which the default prompts need.",
            fix="Specify a file of prompts as they are used with this adapter, or the word with --trigger.",
        )
    name = family if family in FAMILIES else "general"
    lines = (files("krona_hub.assets") / "prompts" / f"{name}-{kind}.txt").read_text("utf-8").splitlines()
    for line in lines:
        yield line.replace("{subject}", trigger or "")


def _split(prompts: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the prompts to calibrate with, and every fourth, which is held out; none of few prompts."""
    if len(prompts) < LEAST_FOR_HELD_OUT:
        return prompts, ()
    held_out = prompts[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY]
    return tuple(p for p in prompts if p not in held_out), held_out
