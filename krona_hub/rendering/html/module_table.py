"""The table of all modules: under the name of each block those that are in it.

A name of eighty letters in every one of a thousand rows would be half of the page. The first click on a header joins
the two again, so that the whole table can be sorted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from krona_hub.rendering.html.heat_map import block_and_projection
from krona_hub.rendering.html.markup import Markup, row_of, sortable, text

Row = tuple[Sequence[str], Sequence[Any]]  # canonical names of the layers that a module is, and the cells


def modules_table(columns: Sequence[str], rows: Sequence[Row]) -> Markup:
    """A row per module. A column of words that says the same of all is said once, in the caption."""
    alike = [i for i, name in enumerate(columns) if _is_alike(name, [cells[i] for _, cells in rows])]
    shown = [i for i in range(len(columns)) if i not in alike]
    said = "".join(f" {columns[i].capitalize()} of all: {rows[0][1][i]}." for i in alike if rows[0][1][i])
    blocks: dict[str, list[str]] = {}
    for layers, cells in rows:
        block, name = _placed(layers)
        blocks.setdefault(block, []).append(row_of([name, *(cells[i] for i in shown)]))
    body = "\n".join(_head(block, len(shown) + 1) + "\n".join(inside) for block, inside in blocks.items())
    title = f"{len(rows):,} modules; a click on a header sorts."
    return sortable(("module", *(columns[i] for i in shown)), body, title, said)


def _is_alike(name: str, values: Sequence[Any]) -> bool:
    return len(values) > 1 and not name.startswith(">") and len(set(values)) == 1


def _placed(layers: Sequence[str]) -> tuple[str, str]:
    """(block, name in it); "" and the whole name for a module that is layers of several blocks."""
    found = [block_and_projection(layer) for layer in layers]
    if len({block for block, _ in found}) == 1:
        return found[0][0], " + ".join(name for _, name in found)
    return "", " + ".join(layers)


def _head(block: str, columns: int) -> str:
    """The row above the modules of a block; the script reads its name from there."""
    kind = "" if block else " class=none"
    return f"<tr class=block><th colspan={columns} scope=rowgroup{kind}>{text(block or 'in several blocks')}\n"
