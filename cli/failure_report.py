"""Failures: one line of cause, one line of fix, an exit status, and a traceback only on request."""

from __future__ import annotations

import errno
import json
import os
import sys
import traceback
from typing import NamedTuple

import click

from krona_hub.errors import KronaError, NotFoundError, ResourceError, UsageError

BUG = "KH000"  # a bug in krona
STOPPED = "KH001"  # Ctrl-C
TRACEBACK_VARIABLE = "KRONA_TRACEBACK"


class Failure(NamedTuple):
    """A failure as it is reported, and the exit status of the process."""

    code: str
    cause: str
    fix: str
    status: int


def report_failure(problem: BaseException, *, as_json: bool = False) -> int:
    """Report a failure on stderr, or as a JSON document on stdout, and return the exit status."""
    if isinstance(problem, SystemExit):
        return problem.code if isinstance(problem.code, int) else 1
    if isinstance(problem, BrokenPipeError):
        return _exit_silently()
    failure = describe(problem)
    if as_json:
        print(json.dumps({"error": {"code": failure.code, "cause": failure.cause, "fix": failure.fix}}, indent=2))
    else:
        _print_failure(failure)
    if os.environ.get(TRACEBACK_VARIABLE):
        traceback.print_exception(problem)
    return failure.status


def describe(problem: BaseException) -> Failure:
    """Describe any exception as a Failure."""
    if isinstance(problem, (KeyboardInterrupt, click.Abort)):
        return Failure(STOPPED, "Stopped. No partially written file was left behind.", "", 130)
    if isinstance(problem, click.ClickException):
        return _usage_failure(problem)
    known = problem if isinstance(problem, KronaError) else _system_error(problem)
    if known is not None:
        return Failure(known.code, known.cause, known.fix, known.exit_code)
    cause = f"This is a bug in krona: {type(problem).__name__}: {_first_line(problem)}"
    return Failure(BUG, cause, f"Report it with the output of {TRACEBACK_VARIABLE}=1 krona …", 1)


def _usage_failure(problem: click.ClickException) -> Failure:
    """Wrong usage, with the nearest options or commands if there are any."""
    near = getattr(problem, "possibilities", None) or ()
    context = getattr(problem, "ctx", None)
    path = context.command_path if context else "krona"
    fix = f"Did you mean {' or '.join(near)}?" if near else f"Run {path} --help for the options and an example."
    cause = problem.message if near else problem.format_message()
    return Failure(UsageError.code, _as_sentence(cause), fix, UsageError.exit_code)


def _system_error(problem: BaseException) -> KronaError | None:
    """A failure of the operating system as a KronaError; None for anything else."""
    if isinstance(problem, MemoryError) or "DefaultCPUAllocator" in str(problem):
        return ResourceError("Not enough memory.", fix="Close other programs or use a machine with more memory.")
    if not isinstance(problem, OSError):
        return None
    path = f"{problem.filename}: " if problem.filename else ""
    if problem.errno == errno.ENOENT:
        return NotFoundError(f"{path}No such file or folder.", fix="Check the spelling of the path.")
    full = problem.errno == errno.ENOSPC
    fix = "Free some disk space." if full else "Check the disk and your permissions for this path."
    return ResourceError(f"{path}{problem.strerror or problem}.", fix=fix)


def _print_failure(failure: Failure) -> None:
    color = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    red, bold, plain = ("\x1b[1;31m", "\x1b[1m", "\x1b[0m") if color else ("", "", "")
    sys.stdout.flush()
    print(f"{red}error {failure.code}:{plain} {failure.cause}", file=sys.stderr)
    if failure.fix:
        print(f"{bold}fix:{plain} {failure.fix}", file=sys.stderr)


def _exit_silently() -> int:
    """End silently when the reader of stdout is gone, without an error from Python at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _as_sentence(text: str) -> str:
    """A message of click on one line, with a period."""
    return " ".join(text.split()).rstrip(".") + "."


def _first_line(problem: BaseException) -> str:
    return (str(problem).splitlines() or [""])[0]
