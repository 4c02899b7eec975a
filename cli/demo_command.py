"""`krona demo`: run the commands of `krona_hub.assets.demo` one after the other and show the results."""

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
    click.Option(
        ["--folder"], default=demo.FOLDER, type=click.Path(), help=f"Output folder of the demo [{demo.FOLDER}]."
    ),
    open_option,
)


@krona_command("demo", options=OPTIONS, examples=("krona demo",))
def command(folder: str, show_grid: bool) -> None:
    """Run the main workflow offline with the bundled adapters: inspect, convert, merge, generate, verify.

    Every step is a krona command that you can repeat; commands.txt in the output folder lists them. Two adapters teach
    a small base model a new toy. The grid shows images of the base, original, converted and merged models, generated
    with equal seeds.
    """
    path = Path(folder)
    commands = demo.prepare(path)
    log(demo.ABOUT)
    steps = [_run(step.why, line) for step, line in zip(demo.STEPS, commands, strict=True)]
    files = [_facts(file) for file in demo.results(path)]
    document = {"folder": folder, "note": demo.ABOUT, "steps": steps, "files": files, "grid": demo.grid(path)}
    emit(document, lambda: _show(path, files))
    if show_grid:
        open_file(demo.grid(path))


def _run(why: str, line: str) -> dict[str, Any]:
    """Run one step: show its output, or capture its JSON document under --json."""
    from krona_hub.cli.main import run_line

    arguments = shlex.split(line)[1:]
    if not flag_is_set("json"):
        show_text()
        show_text(why, "bold")
        show_text(f"$ {line}", "dim")
        run_line(arguments)
        return {}
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        run_line([*arguments, "--json"])
    return {"command": line, "result": json.loads(output.getvalue())}


def _facts(path: Path) -> dict[str, Any]:
    """A row of the results table."""
    from krona_hub.formats.compatibility.verdicts import loads_in
    from krona_hub.formats.reading.describe import describe

    about = describe(path)
    return {
        "file": str(path),
        "format": about.format,
        "modules": len(about.modules),
        "parameters": about.parameters,
        "bytes": path.stat().st_size,
        "loads_in": [name for name, verdict in loads_in(about).items() if verdict.ok],
    }


def _applications(loading: list[str]) -> str:
    """`9 of 10 applications`; the steps above name them."""
    from krona_hub.formats.compatibility.applications import APPLICATIONS

    return (
        f"{len(loading)} of {len(APPLICATIONS)} applications"
        if loading
        else "krona only; convert it with --for APPLICATION"
    )


def _show(path: Path, files: list[dict[str, Any]]) -> None:
    show_text()
    show_text("Results", "bold")
    show_table(
        ("file", "format", ">parameters", ">size", "loads in"),
        (
            (Path(f["file"]).name, f["format"], f["parameters"], human_bytes(f["bytes"]), _applications(f["loads_in"]))
            for f in files
        ),
    )
    show_text()
    show_facts(
        (
            ("images", f"{demo.grid(path)}: base, original, converted, merged; equal noise"),
            ("commands", f"{path / 'commands.txt'}; your own adapter: krona generate BASE --adapter FILE --prompt …"),
        )
    )
