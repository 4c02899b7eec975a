"""What all commands share: how they are declared, their common options, and how they print.

A command file exposes `command`, declared so:

    @krona_command("params", examples=("krona params --base sdxl --shape 64x8",))
    @base_option
    def command(base: str | None) -> None:
        \"""Count an adapter's parameters before training it.\"""
        count = accounting.count(...)               # one call of the library
        emit(count, lambda: show_table(("layer", ">parameters"), count.rows))

`--json` and `--quiet` come with it. Data goes to stdout through `emit`, everything else to stderr through `say`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import inf
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import rich_click

from krona_hub.bases.base import COMPONENTS
from krona_hub.rendering.tables import human_bytes, plain

PIPED_WIDTH = 10_000  # columns: a pipe has no edge, so that names are never cut there
PATIENCE = 2.0  # seconds before a progress bar appears
BETWEEN = 0.1  # seconds between two drawings of it
WIDTH = 24  # columns of it

Function = Callable[..., Any]


# --- declaring a command ---------------------------------------------------------------------------------------------


class KronaCommand(rich_click.RichCommand):
    """A command that carries its examples; a test runs them in a folder with the demo's adapters."""

    examples: tuple[str, ...] = ()


def krona_command(
    name: str, *, examples: Sequence[str], panels: Mapping[str, Sequence[str]] = MappingProxyType({})
) -> Callable[[Function], KronaCommand]:
    """Declare a command with --json, --quiet and examples; `panels` groups the options of its --help by title.

    An example is a command line that runs in a folder with `lora.safetensors` (SD 1.5, kohya), `lokr.safetensors`
    (SD 1.5, LyCORIS LoKr) and `krona.safetensors` (the same, native).
    """

    def declare(function: Function) -> KronaCommand:
        epilog = "\n\n".join(["Examples:" if len(examples) > 1 else "Example:", *examples])
        function = _json_option(_quiet_option(function))
        for title in reversed(panels):
            function = rich_click.option_panel(title, options=list(panels[title]))(function)
        declared = rich_click.command(name, cls=KronaCommand, epilog=epilog)(function)
        declared.params = declared.params[2:] + declared.params[:2]  # what is common comes last
        declared.examples = tuple(examples)
        return declared

    return declare


def _remember(context: click.Context, option: click.Parameter, value: bool) -> None:
    """Keep --json and --quiet where `emit` and `say` find them, so that no command passes them around."""
    context.meta[f"krona.{option.name}"] = value
    if value:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # those of the Hub's client, where it is used


_json_option = click.option(
    "--json", is_flag=True, expose_value=False, callback=_remember, help="Print one JSON document instead of text."
)
_quiet_option = click.option(
    "-q", "--quiet", is_flag=True, expose_value=False, callback=_remember, help="Say nothing but the result."
)


def asked_for(option: str) -> bool:
    """Whether the running command got --json or --quiet."""
    context = click.get_current_context(silent=True)
    return bool(context and context.meta.get(f"krona.{option}"))


# --- common arguments and options ------------------------------------------------------------------------------------


def complete_bases(_context: click.Context, _parameter: click.Parameter, start: str) -> list[str]:
    """Catalogue names for the shell; torch-free."""
    from krona_hub.bases.catalogue import names

    return [name for name in names() if name.startswith(start)]


def complete_formats(_context: click.Context, _parameter: click.Parameter, start: str) -> list[str]:
    """Format names for the shell; torch-free."""
    from krona_hub.formats.known.registry import FORMATS

    return [spoke.NAME for spoke in FORMATS if spoke.NAME.startswith(start)]


def complete_tools(_context: click.Context, _parameter: click.Parameter, start: str) -> list[str]:
    """Names of target tools for the shell; torch-free."""
    from krona_hub.formats.compatibility.tools import TOOLS

    return [name for name in TOOLS if name.startswith(start)]


file_argument = click.argument("file", type=click.Path())
base_option = click.option(
    "--base",
    metavar="BASE",
    shell_complete=complete_bases,
    help="The base model: a catalogue name such as sdxl, a diffusers folder or a checkpoint file.",
)
component_option = click.option(
    "--component",
    metavar="NAME",
    type=click.Choice(COMPONENTS),
    help="The part of the base that the file belongs to, where the file does not say.",
)
from_option = click.option(
    "--from", "from_format", metavar="FORMAT", shell_complete=complete_formats, help="Read the file as this format."
)
output_option = click.option("-o", "--output", "out", type=click.Path(), metavar="OUT", help="Where to write.")
overwrite_option = click.option("--overwrite", is_flag=True, help="Replace the output if it exists.")
allow_missing_option = click.option(
    "--allow-missing", is_flag=True, help="Go on with what is understood, though some modules are not."
)
allow_base_mismatch_option = click.option(
    "--allow-base-mismatch", is_flag=True, help="Go on though an adapter was made for another base."
)
dtype_option = click.option("--dtype", metavar="TYPE", help="Store every tensor as float32, float16 or bfloat16.")
to_option = click.option(
    "--to",
    metavar="FORMAT",
    default="krona",
    shell_complete=complete_formats,
    help="The format to write, or `lora` or `lokr`. `krona formats` lists them. Default: krona.",
)
threads_option = click.option("--threads", type=click.IntRange(1, 64), default=2, metavar="N", help="Threads [2].")
dry_run_option = click.option("--dry-run", is_flag=True, help="Do everything but write.")
report_option = click.option(
    "--report", type=click.Path(dir_okay=False), metavar="FILE.html", help="Write a page with tables and charts, too."
)
open_option = click.option("--open", "show_grid", is_flag=True, help="Open the grid in the system's viewer.")


# --- printing --------------------------------------------------------------------------------------------------------


def emit(document: Any, show: Callable[[], None]) -> None:
    """Print the result: `document` as JSON where --json was given, else whatever `show` prints."""
    if asked_for("json"):
        print(json.dumps(plain(document), ensure_ascii=False, indent=2, allow_nan=False))
    else:
        show()


def say(text: str) -> None:
    """Chatter for a person, on stderr; silent under --quiet and --json."""
    if not (asked_for("quiet") or asked_for("json")):
        print(text, file=sys.stderr)


class _Aloud(logging.Handler):
    """Says what the library only notes, since it never prints: once, though a command may open a source twice."""

    def emit(self, record: logging.LogRecord) -> None:
        context, text = click.get_current_context(silent=True), record.getMessage()
        said = context.meta.setdefault("krona.said", set()) if context else set()
        if text not in said:
            said.add(text)
            say(text)


def hear_the_library() -> None:
    """From now on, notes of the library are said aloud, such as that an offline copy is used."""
    log = logging.getLogger("krona_hub")
    if not any(isinstance(handler, _Aloud) for handler in log.handlers):
        log.addHandler(_Aloud())


def hush_the_others() -> None:
    """What torch and torchao tell developers, wherever diffusers looks whether torchao is there, is not said."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def announce(*sources: str | None) -> None:
    """Say aloud which of these are looked for on the Hub, because they are no path here."""
    from krona_hub.sources import is_remote

    for source in sources:
        if source is not None and is_remote(source):
            say(f"{source} is no path here: asking the Hugging Face Hub.")


def open_file(path: Path) -> None:
    """Show a file in the viewer that the system has for it."""
    if click.launch(str(path)) != 0:
        say(f"no viewer was found here; the picture is {path}.")


def show_text(text: str = "", style: str = "") -> None:
    """One line of the result, on stdout; `style` is a style of rich, for a terminal."""
    from rich.text import Text

    _print(Text(text, style))


def show_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "") -> None:
    """A table on stdout. A column named `>parameters` is right-aligned; integers get separators, None is a dash.

    In a pipe nothing is cut or wrapped; in a terminal a cell that does not fit is folded onto a second line.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", title=title or None, title_justify="left")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.removeprefix(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(_cell, row))
    _print(table)


def show_facts(facts: Iterable[tuple[str, Any]]) -> None:
    """Lines of `label  value` on stdout; a fact whose value is None or empty is left out."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in facts:
        if value not in (None, "", ()):
            table.add_row(label, _cell(value))
    _print(table)


def _cell(value: Any) -> Any:
    """A value as a cell; text keeps its brackets, since none of ours is markup."""
    from rich.text import Text

    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, Text) else Text("–" if value is None else str(value))


def _print(renderable: Any) -> None:
    """Render to stdout without trailing blanks, coloured only where a terminal shows it."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
    with console.capture() as captured:
        console.print(renderable, soft_wrap=not hasattr(renderable, "columns"))
    print("\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n")))


@contextmanager
def progress(label: str) -> Iterator[Callable[[int, int], None]]:
    """A bar with the time left on stderr, for work that reports `(done, total)`; it appears after two seconds.

    with progress("layers") as step:
        for i, layer in enumerate(layers):
            step(i, len(layers))
    """

    def words(done: int, total: int | None, speed: float) -> str:
        return f"{_bar(label, done, total or 0)} {done:,}/{total or 0:,}{_left(done, total or 0, speed)}"

    with _drawn(words) as step:
        yield step


@contextmanager
def noted_progress(label: str) -> Iterator[Callable[[int, int, str], None]]:
    """The same for work that has more to tell at every step: `(done, total, note)`."""
    note = ""

    def words(done: int, total: int | None, speed: float) -> str:
        rate = f"  {speed:.2f}/s" if speed else ""
        return f"{_bar(label, done, total or 0)} {done:,}/{total or 0:,}{rate}{_left(done, total or 0, speed)}  {note}"

    with _drawn(words) as step:

        def noted(done: int, total: int, text: str) -> None:
            nonlocal note
            note = text
            step(done, total)

        yield noted


@contextmanager
def byte_progress(label: str) -> Iterator[Callable[[int, int | None], None]]:
    """The same for work that reports bytes: with the rate, and without a bar where the total is unknown."""

    def words(done: int, total: int | None, speed: float) -> str:
        rate = f"  {human_bytes(round(speed))}/s" if speed else ""
        if not total:
            return f"{label} {human_bytes(done)}{rate}"
        counts = f"{human_bytes(done)} of {human_bytes(total)}"
        return f"{_bar(label, done, total)} {counts}{rate}{_left(done, total, speed)}"

    with _drawn(words) as step:
        yield step


def counting(step: Callable[[int, int | None], None], total: int | None = None) -> Callable[[int], None]:
    """For work that reports the bytes since its last report."""
    done = 0

    def more(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        step(done, total)

    return more


@contextmanager
def _drawn(words: Callable[[int, int | None, float], str]) -> Iterator[Callable[[int, int | None], None]]:
    """A line that is drawn over and over while the block runs.

    `words` get what is done, the total and the speed per second since the first report: what came before it, such as
    the import of torch, says nothing about the work.
    """
    started, shown, first = time.monotonic(), -inf, (0.0, -1)
    wanted = sys.stderr.isatty() and not (asked_for("quiet") or asked_for("json"))

    def step(done: int, total: int | None) -> None:
        nonlocal shown, first
        now = time.monotonic()
        if first[1] < 0:
            first = now, done
        if wanted and now - started > PATIENCE and now - shown > BETWEEN:
            shown = now
            speed = (done - first[1]) / (now - first[0]) if now > first[0] else 0.0
            sys.stderr.write(f"\r\x1b[K{words(done, total, speed)}")
            sys.stderr.flush()

    try:
        yield step
    finally:
        if shown > 0:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _bar(label: str, done: int, total: int) -> str:
    """
    >>> _bar("layers", 1, 3)
    'layers ━━━━━━━━────────────────'
    """
    filled = min(WIDTH, WIDTH * done // max(total, 1))
    return f"{label} {'━' * filled}{'─' * (WIDTH - filled)}"


def _left(done: int, total: int, speed: float) -> str:
    """
    >>> _left(200, 400, 2.5), _left(0, 4, 0.0)
    ('  1:20 left', '')
    """
    left = round(max(total - done, 0) / speed) if speed else 0
    return f"  {left // 60}:{left % 60:02} left" if speed else ""
