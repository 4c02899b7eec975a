"""The parts of a page: text that is escaped, tables, facts, figures, and the page around them.

A part is a `Markup`: text that is HTML already. Whatever is not Markup is escaped where it enters, so that the name of
a module or a caption is never read as markup by a browser.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from html import escape
from pathlib import Path
from typing import Any

from krona_hub.checkpoints.atomic import atomic_text
from krona_hub.errors import ConflictError
from krona_hub.rendering.html.style import SCRIPT, STYLE

MARK = "<!doctype html><!-- krona page -->"  # how a page begins: only such files are replaced without being asked


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def text(value: Any) -> Markup:
    """A value as HTML; Markup stays as it is, numbers get separators, nothing is a dash.

    >>> text("<b>"), text(1234567), text(None)
    ('&lt;b&gt;', '1,234,567', '–')
    """
    if isinstance(value, Markup):
        return value
    if value is None or value == "":
        return Markup("–")
    if isinstance(value, int) and not isinstance(value, bool):
        return Markup(f"{value:,}")
    return Markup(escape(str(value), quote=True))


def join(*parts: str) -> Markup:
    """Parts one after the other; those that are no Markup are escaped."""
    return Markup("\n".join(text(part) for part in parts if part))


def paragraph(words: str, kind: str = "") -> Markup:
    return Markup(f"<p{_class(kind)}>{text(words)}</p>") if words else Markup("")


def section(title: str, *parts: str) -> Markup:
    """A part of the page under a heading; nothing where there is nothing to show."""
    inside = join(*parts)
    return Markup(f"<section><h2>{text(title)}</h2>\n{inside}</section>") if inside else Markup("")


def pair(*figures: str) -> Markup:
    """Figures side by side where the window is wide enough."""
    return Markup(f'<div class="pair">{join(*figures)}</div>') if any(figures) else Markup("")


def facts(rows: Iterable[tuple[str, Any]], title: str) -> Markup:
    """Names and values; those without a value are left out."""
    lines = [
        f'<tr><th scope="row">{text(name)}<td>{text(value)}' for name, value in rows if value not in (None, "", ())
    ]
    return Markup(
        f'<div class="scroll"><table class="facts"><caption>{text(title)}</caption>{"".join(lines)}</table></div>'
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str) -> Markup:
    """A table that a click on a header sorts. A column named `>parameters` holds numbers and is right-aligned."""
    return sortable(columns, "\n".join(row_of(row) for row in rows), title)


def row_of(values: Sequence[Any]) -> str:
    """There are hundreds: </td> and </tr> may be left out in HTML, and so may empty cells at the end; the class of the
    table aligns columns.
    """
    filled = [i for i, value in enumerate(values, 1) if value not in (None, "")]
    return "<tr>" + "".join(f"<td>{text(value)}" for value in values[: max(filled, default=0)])


def sortable(columns: Sequence[str], body: str, title: str, told: str = "") -> Markup:
    """The frame of a table: `body` are its rows as HTML, `told` stands behind the title."""
    classes = [_class("n" if column.startswith(">") else "") for column in columns]
    heads = "".join(
        f'<th scope="col"{c}>{text(column.removeprefix(">"))}</th>' for c, column in zip(classes, columns, strict=True)
    )
    right = "".join(f" r{i}" for i, column in enumerate(columns, 1) if column.startswith(">"))
    caption = text(title) + text(told) if told else text(title)
    return Markup(
        f'<div class="scroll" tabindex="0" role="region" aria-label="{text(title)}"><table class="sortable{right}">'
        f"<caption>{caption}</caption><thead><tr>{heads}</tr></thead><tbody>\n{body}</tbody></table></div>"
    )


def page(title: str, verdict: str, *sections: str) -> str:
    """The whole document. Its content policy forbids every request and every script but the one above."""
    allowed = b64encode(sha256(SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    return (
        f'{MARK}\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width,initial-scale=1">\n'
        f"<title>{text(title)}</title><style>{STYLE}</style></head><body><main>\n<h1>{text(title)}</h1>\n"
        f"{paragraph(verdict, 'verdict')}\n{join(*sections)}\n</main>"
        f'<footer class="soft">Made by Krona Hub. This page holds everything it shows and asks the network for '
        f"nothing.</footer><script>{SCRIPT}</script></body></html>\n"
    )


def check_page(path: str | Path) -> Path:
    """Raise ConflictError where something else than an earlier page is in the way, before any work is done."""
    path = Path(path).expanduser()
    if path.is_dir() or (path.is_file() and not _is_ours(path)):
        raise ConflictError(f"{str(path)!r} exists and is no page of krona.", fix="Name another file with --report.")
    return path


def write_page(path: str | Path, document: str) -> Path:
    """Write a page whole; an earlier page there is replaced."""
    path = check_page(path)
    atomic_text(path, document, overwrite=True)
    return path


def _is_ours(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(len(MARK)) == MARK.encode()


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
