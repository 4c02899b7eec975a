"""`krona formats`: the formats that krona knows, and which tools load them."""

from __future__ import annotations

from krona_hub.cli.common import emit, krona_command, show_table, show_text
from krona_hub.report import format_facts, loads_matrix


@krona_command("formats", examples=("krona formats", "krona formats --json"))
def command() -> None:
    """List the formats that krona reads and writes, and which tools load them."""
    facts, matrix = format_facts(), loads_matrix()
    emit({"formats": facts, "loads_in": matrix}, lambda: _show(facts, matrix))


def _show(facts, matrix) -> None:
    show_table(("format", "reads", "writes", "what it is"), ((f.name, f.reads, f.writes, f.summary) for f in facts))
    show_text()
    show_text("Which tools load which format", "bold")
    tools = list(next(iter(matrix.values())))
    show_table(("format", *tools), ((name, *(row[tool].mark for tool in tools)) for name, row in matrix.items()))
