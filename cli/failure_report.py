"""How a failure looks: one line of cause, one line of fix, an exit status, and never a traceback unless asked."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from typing import NamedTuple

import click

from krona_hub.errors import KronaError, NotFoundError, ResourceError, UsageError

BUG = "KH000"  # a failure that is ours
STOPPED = "KH001"  # Ctrl-C
TRACEBACK_VARIABLE = "KRONA_TRACEBACK"


class Failure(NamedTuple):
    """What a person is told, and the status that the process ends with."""

    code: str
    cause: str
    fix: str
    status: int


def report_failure(problem: BaseException, *, as_json: bool = False) -> int:
    """Tell the person what went wrong, on stderr or as a JSON document on stdout; the exit status."""
    if isinstance(problem, SystemExit):
        return problem.code if isinstance(problem.code, int) else 1
    if isinstance(problem, BrokenPipeError):
        return _leave_quietly()
    failure = describe(problem)
    if as_json:
        print(json.dumps({"error": {"code": failure.code, "cause": failure.cause, "fix": failure.fix}}, indent=2))
    else:
        _print_failure(failure)
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exception(problem)
    return failure.status


def describe(problem: BaseException) -> Failure:
    """The failure that any exception stands for."""
    if isinstance(problem, (KeyboardInterrupt, click.Abort)):
        return Failure(STOPPED, "stopped; no half-written file is left.", "", 130)
    if isinstance(problem, click.ClickException):
        return _of_click(problem)
    known = problem if isinstance(problem, KronaError) else _of_the_system(problem)
    if known is not None:
        return Failure(known.code, known.cause, known.fix, known.exit_code)
    cause = f"this is a bug in krona: {type(problem).__name__}: {_first_line(problem)}"
    return Failure(BUG, cause, f"Please report it with the output of {TRACEBACK_VARIABLE}=1 krona …", 1)


def _of_click(problem: click.ClickException) -> Failure:
    """Wrong usage, with the nearest option or command where there is one."""
    near = getattr(problem, "possibilities", None) or ()
    context = getattr(problem, "ctx", None)
    path = context.command_path if context else "krona"
    fix = f"Did you mean {' or '.join(near)}?" if near else f"{path} --help shows the options and an example."
    cause = problem.message if near else problem.format_message()
    return Failure(UsageError.code, _as_clause(cause), fix, UsageError.exit_code)


def _of_the_system(problem: BaseException) -> KronaError | None:
    """What the operating system refused, as an error of ours; None for anything else."""
    if isinstance(problem, MemoryError) or "DefaultCPUAllocator" in str(problem):
        return ResourceError("not enough memory.", fix="Close other programs, or use a machine with more.")
    if not isinstance(problem, OSError):
        return None
    place = f"{problem.filename}: " if problem.filename else ""
    if problem.errno == errno.ENOENT:
        return NotFoundError(f"{place}no such file or folder.", fix="Check the spelling of the path.")
    fix = "Free some space." if problem.errno == errno.ENOSPC else "Check the disk and your rights to that place."
    return ResourceError(f"{place}{problem.strerror or problem}.", fix=fix)


def _print_failure(failure: Failure) -> None:
    colour = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    red, bold, plain = ("\x1b[1;31m", "\x1b[1m", "\x1b[0m") if colour else ("", "", "")
    sys.stdout.flush()
    print(f"{red}error {failure.code}:{plain} {failure.cause}", file=sys.stderr)
    if failure.fix:
        print(f"{bold}fix:{plain} {failure.fix}", file=sys.stderr)


def _leave_quietly() -> int:
    """The reader of our output has gone: nothing to say, and Python must not complain at exit either."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _as_clause(text: str) -> str:
    """A sentence of click in the tone of ours, which start after a colon: in lower case."""
    return text[:1].lower() + text[1:]


def _first_line(problem: BaseException) -> str:
    return (str(problem).splitlines() or [""])[0]
