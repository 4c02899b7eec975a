"""The table of all modules, grouped by block.

Names of eighty characters in each of a thousand rows would make up half of the report. The first click on a header
joins block and module names again, so that the whole table can be sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from krona_hub.rendering.html.heat_map import block_and_projection
from krona_hub.rendering.html.markup import Markup, row_of, sortable, text

Row = tuple[Sequence[str], Sequence[Any]]  # canonical names of a module's layers, and its cells


def modules_table(columns: Sequence[str], rows: Sequence[Row]) -> Markup:
    """A row per module. A text column with one value for all modules is moved to the caption."""
    alike = [i for i, name in enumerate(columns) if _is_alike(name, [cells[i] for _, cells in rows])]
    shown = [i for i in range(len(columns)) if i not in alike]
    shared = "".join(f" {columns[i].capitalize()} of all: {rows[0][1][i]}." for i in alike if rows[0][1][i])
    blocks: dict[str, list[str]] = {}
    for layers, cells in rows:
        block, name = _block_and_name(layers)
        blocks.setdefault(block, []).append(row_of([name, *(cells[i] for i in shown)]))
    body = "\n".join(_head(block, len(shown) + 1) + "\n".join(inside) for block, inside in blocks.items())
    title = f"{len(rows):,} modules; click a header to sort."
    return sortable(("module", *(columns[i] for i in shown)), body, title, shared)


def _is_alike(name: str, values: Sequence[Any]) -> bool:
    return len(values) > 1 and not name.startswith(">") and len(set(values)) == 1


def _block_and_name(layers: Sequence[str]) -> tuple[str, str]:
    """Return (block, name in the block), or ("", whole name) for a module with layers of several blocks."""
    found = [block_and_projection(layer) for layer in layers]
    if len({block for block, _ in found}) == 1:
        return found[0][0], " + ".join(name for _, name in found)
    return "", " + ".join(layers)


def _head(block: str, columns: int) -> str:
    """The row above the modules of a block, from which the script reads the block's name."""
    kind = "" if block else " class=none"
    return f"<tr class=block><th colspan={columns} scope=rowgroup{kind}>{text(block or 'in several blocks')}\n"
