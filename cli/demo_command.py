"""`krona demo`: runs the commands of `krona_hub.assets.demo` one after the other, and shows what came of them."""

from __future__ import annotations

import contextlib
import io
import json
import shlex
from pathlib import Path
from typing import Any

import click

from krona_hub.assets import demo
from krona_hub.cli.console import emit, flag_is_set, krona_command, log, open_file, show_facts, show_table, show_text
from krona_hub.cli.options import open_option
from krona_hub.rendering.humanize import human_bytes

OPTIONS = (
    click.Option(["--folder"], default=demo.FOLDER, type=click.Path(), help="Where the demo puts its files."),
    open_option,
)


@krona_command("demo", options=OPTIONS, examples=("krona demo",))
def command(folder: str, show_grid: bool) -> None:
    """Run the main job, offline, on what comes with krona: inspect, convert, merge, draw pictures, verify.

    Every step is a krona command that you can repeat; commands.txt in the folder lists them. Two adapters teach a
    small base model a toy; the grid shows base, original, converted and merged, drawn with equal seeds.
    """
    place = Path(folder)
    commands = demo.prepare(place)
    log(demo.ABOUT)
    steps = [_run(step.why, line) for step, line in zip(demo.STEPS, commands, strict=True)]
    files = [_facts(path) for path in demo.results(place)]
    found = {"folder": folder, "note": demo.ABOUT, "steps": steps, "files": files, "grid": demo.grid(place)}
    emit(found, lambda: _show(place, files))
    if show_grid:
        open_file(demo.grid(place))


def _run(why: str, line: str) -> dict[str, Any]:
    """One step: shown as it runs, or under --json caught as the document that it prints."""
    from krona_hub.cli.main import run_line

    arguments = shlex.split(line)[1:]
    if not flag_is_set("json"):
        show_text()
        show_text(why, "bold")
        show_text(f"$ {line}", "dim")
        run_line(arguments)
        return {}
    caught = io.StringIO()
    with contextlib.redirect_stdout(caught):
        run_line([*arguments, "--json"])
    return {"command": line, "result": json.loads(caught.getvalue())}


def _facts(path: Path) -> dict[str, Any]:
    """What the last table says about a file."""
    from krona_hub.formats.compatibility.tools import loads_in
    from krona_hub.formats.reading.describe import describe

    about = describe(path)
    return {
        "file": str(path),
        "format": about.format,
        "modules": len(about.modules),
        "parameters": about.parameters,
        "bytes": path.stat().st_size,
        "loads_in": [tool for tool, verdict in loads_in(about).items() if verdict.ok],
    }


def _tools(loading: list[str]) -> str:
    """`9 of 10 tools`; the steps above name them."""
    from krona_hub.formats.compatibility.tools import TOOLS

    return f"{len(loading)} of {len(TOOLS)} tools" if loading else "krona; convert it with --for TOOL"


def _show(place: Path, files: list[dict[str, Any]]) -> None:
    show_text()
    show_text("What there is now", "bold")
    show_table(
        ("file", "format", ">parameters", ">size", "loads in"),
        (
            (Path(f["file"]).name, f["format"], f["parameters"], human_bytes(f["bytes"]), _tools(f["loads_in"]))
            for f in files
        ),
    )
    show_text()
    show_facts(
        (
            ("pictures", f"{demo.grid(place)}: base, original, converted, merged, from equal noise"),
            ("commands", f"{place / 'commands.txt'}; now your own: krona generate BASE --adapter FILE --prompt …"),
        )
    )
