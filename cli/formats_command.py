"""`krona formats`: the supported formats and the applications that load them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from krona_hub.cli.console import emit, krona_command, show_table, show_text
from krona_hub.rendering.tables import Cell, FormatFacts, format_facts, loads_matrix


@krona_command("formats", examples=("krona formats", "krona formats --json"))
def command() -> None:
    """List the formats that krona reads and writes and the applications that load them."""
    facts, matrix = format_facts(), loads_matrix()
    emit({"formats": facts, "loads_in": matrix}, lambda: _show(facts, matrix))


def _show(facts: Sequence[FormatFacts], matrix: Mapping[str, Mapping[str, Cell]]) -> None:
    show_table(("format", "reads", "writes", "description"), ((f.name, f.reads, f.writes, f.summary) for f in facts))
    show_text()
    rows = ((name, _applications(row, "yes"), _applications(row, "some")) for name, row in matrix.items())
    show_table(("format", "loaded by", "some shapes only"), rows)


def _applications(row: Mapping[str, Cell], mark: str) -> str | None:
    return ", ".join(name for name, cell in row.items() if cell.mark == mark) or None
