"""Shared parts of all commands: declaration, common options and printing.

A command file exposes `command`, declared as follows:

    @krona_command("params", options=(base_option,), examples=("krona params --base sdxl --shape 64x8",))
    def command(base: str | None) -> None:
        \"""Count an adapter's parameters before training.\"""
        count = accounting.count(...)               # one call of the library
        emit(count, lambda: show_table(("layer", ">parameters"), count.rows))

`--json` and `--quiet` are added to every command. Data goes to stdout through `emit`, everything
else to stderr through `log`.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from itertools import chain
from pathlib import Path
from typing import Any

import click
import rich_click

from krona_hub.rendering.humanize import plain

PIPED_WIDTH = 10_000  # columns: output to a pipe is never cut or wrapped

Function = Callable[..., Any]


# --- declaring a command ---------------------------------------------------------------------------------------------


class KronaCommand(rich_click.RichCommand):
    """A command with its examples, which a test runs in a folder with the demo adapters."""

    examples: tuple[str, ...] = ()


def krona_command(
    name: str,
    *,
    examples: Sequence[str],
    arguments: Sequence[click.Argument] = (),
    options: Sequence[click.Option] | Mapping[str, Sequence[click.Option]] = (),
) -> Callable[[Function], KronaCommand]:
    """Declare a command by its arguments, options and examples; --json and --quiet are added.

    `options` may map panel titles of --help to options; options of the panel "" come last. An example is a command
    line that runs in a folder with `lora.safetensors` (SD 1.5, kohya), `lokr.safetensors` (SD 1.5,
    LyCORIS LoKr) and `krona.safetensors` (the same, native).
    """
    groups = options if isinstance(options, Mapping) else {"": options}

    def declare(function: Function) -> KronaCommand:
        for title, members in reversed(groups.items()):
            if title:
                flags = [max(option.opts, key=len) for option in members]
                function = rich_click.option_panel(title, options=flags)(function)
        declared = rich_click.command(
            name,
            cls=KronaCommand,
            epilog="\n\n".join(["Examples:" if len(examples) > 1 else "Example:", *examples]),
            params=[*arguments, *chain.from_iterable(groups.values()), _json_option, _quiet_option],
        )(function)
        declared.examples = tuple(examples)
        return declared

    return declare


def _remember(context: click.Context, option: click.Parameter, value: bool) -> None:
    """Store --json and --quiet in the context, where `emit` and `log` read them, so that commands do not pass them."""
    context.meta[f"krona.{option.name}"] = value
    if value:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # bars of the Hub client


_json_option = click.Option(
    ["--json"], is_flag=True, expose_value=False, callback=_remember, help="Print one JSON document instead of text."
)
_quiet_option = click.Option(
    ["-q", "--quiet"], is_flag=True, expose_value=False, callback=_remember, help="Suppress progress and notes."
)


def flag_is_set(option: str) -> bool:
    """Whether --json or --quiet was given to the running command."""
    context = click.get_current_context(silent=True)
    return bool(context and context.meta.get(f"krona.{option}"))


# --- printing --------------------------------------------------------------------------------------------------------


def emit(document: Any, show: Callable[[], None]) -> None:
    """Print the result: `document` as JSON with --json, otherwise the output of `show`."""
    if flag_is_set("json"):
        print(json.dumps(plain(document), ensure_ascii=False, indent=2, allow_nan=False))
    else:
        show()


def fields_of(report: Any, *, without: Sequence[str] = ()) -> dict[str, Any]:
    """The fields of a dataclass by name, as the basis of a JSON document."""
    return {field.name: getattr(report, field.name) for field in fields(report) if field.name not in without}


def log(text: str) -> None:
    """Print a note to stderr, unless --quiet or --json was given."""
    if not (flag_is_set("quiet") or flag_is_set("json")):
        print(text, file=sys.stderr)


class _LogOnce(logging.Handler):
    """Print log records of the library, each text once: a command may open a source twice."""

    def emit(self, record: logging.LogRecord) -> None:
        context, text = click.get_current_context(silent=True), record.getMessage()
        logged = context.meta.setdefault("krona.logged", set()) if context else set()
        if text not in logged:
            logged.add(text)
            log(text)


def log_to_stderr() -> None:
    """Send log records of the library, such as the use of an offline copy, to stderr."""
    logger = logging.getLogger("krona_hub")
    if not any(isinstance(handler, _LogOnce) for handler in logger.handlers):
        logger.addHandler(_LogOnce())


def silence_dependencies() -> None:
    """Hide messages of torch and torchao for developers, which appear when diffusers looks for torchao."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def announce(*sources: str | None) -> None:
    """Log which of these sources are looked up on the Hub because they are not local paths."""
    from krona_hub.sources import is_remote

    for source in sources:
        if source is not None and is_remote(source):
            log(f"{source} is not a local path; looking it up on the Hugging Face Hub.")


def open_file(path: Path) -> None:
    """Open a file in the system's viewer."""
    if click.launch(str(path)) != 0:
        log(f"No image viewer found. The image is {path}.")


def show_text(text: str = "", style: str = "") -> None:
    """Print one line of the result to stdout; `style` is a rich style, used in a terminal."""
    from rich.text import Text

    _print(Text(text, style))


def show_table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "") -> None:
    """Print a table to stdout. A column named `>parameters` is right-aligned; integers get separators, None is a dash.

    Output to a pipe is never cut or wrapped; a terminal folds a cell that does not fit onto a second line.
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
    """Print lines of `label  value` to stdout; facts whose value is None or empty are skipped."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, value in facts:
        if value not in (None, "", ()):
            table.add_row(label, _cell(value))
    _print(table)


def _cell(value: Any) -> Any:
    """A value as a cell; brackets in text are not interpreted as markup."""
    from rich.text import Text

    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return value if isinstance(value, Text) else Text("–" if value is None else str(value))


def _print(renderable: Any) -> None:
    """Render to stdout without trailing blanks, in color only if a terminal supports it."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH)
    with console.capture() as captured:
        console.print(renderable, soft_wrap=not hasattr(renderable, "columns"))
    print("\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n")))
