"""`krona hub`: adapters on the Hub and in the local cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from krona_hub.cli.console import emit, fields_of, krona_command, log, show_facts, show_table, show_text
from krona_hub.cli.options import complete_bases
from krona_hub.errors import UsageError
from krona_hub.hub.preview import describe_preview
from krona_hub.rendering.humanize import human_bytes

if TYPE_CHECKING:
    from krona_hub.hub import Cached, RepoInfo, SearchHit


ACCEPTED = {"info": ("a name", "--offline"), "search": ("a name", "--base"), "ls": ("--offline",)}


OPTIONS = (
    click.Option(
        ["--base"], metavar="BASE", shell_complete=complete_bases, help="search: only adapters for this base model."
    ),
    click.Option(
        ["--limit"],
        type=click.IntRange(1, 1000),
        default=20,
        metavar="N",
        help="search: maximum number of results [20].",
    ),
    click.Option(["--offline"], is_flag=True, help="info: use the cached copy."),
    click.Option(["--endpoint"], metavar="URL", help="URL of another Hub [HF_ENDPOINT]."),
)


@krona_command(
    "hub",
    arguments=(
        click.Argument(["action"], type=click.Choice(["info", "search", "ls"])),
        click.Argument(["what"], required=False, metavar="[REPO|TEXT]"),
    ),
    options=OPTIONS,
    examples=("krona hub info ana/style", "krona hub search style --base sd15", "krona hub ls"),
)
def command(action: str, what: str | None, base: str | None, limit: int, offline: bool, endpoint: str | None) -> None:
    """Show adapters on the Hugging Face Hub and in the local cache.

    `info REPO` describes an adapter from its header alone, `search [TEXT]` lists krona adapters on the Hub, and `ls`
    lists adapters in the local cache.
    """
    from krona_hub import hub

    _check(action, {"a name": what, "--base": base, "--offline": offline})
    if action == "info":
        if what is None:
            raise UsageError("Missing argument REPO.", fix="Run krona hub info NAMESPACE/NAME.")
        found = hub.info(what, offline=offline, endpoint=endpoint)
        for note in found.notes:
            log(note)
        emit(as_document(found), lambda: show_info(found))
    elif action == "search":
        hits = hub.search(what, base=base, limit=limit, endpoint=endpoint)
        emit(hits, lambda: show_found(hits))
    else:
        here = hub.cached()
        emit(here, lambda: show_cached(here))


def _check(action: str, given: dict[str, object]) -> None:
    """Raise UsageError for arguments and options that this action would ignore."""
    for name, value in given.items():
        if value and name not in ACCEPTED[action]:
            raise UsageError(f"krona hub {action} does not accept {name}.", fix="Remove it.")


def as_document(info: RepoInfo) -> dict[str, Any]:
    fields = fields_of(info, without=("preview",))
    return {**fields, "adapter": describe_preview(info.preview)}


def show_info(info: RepoInfo) -> None:
    about = describe_preview(info.preview)
    access = [word for word, is_so in (("private", info.private), ("gated", info.gated)) if is_so]
    show_facts(
        (
            ("repository", info.repo),
            ("commit", info.commit),
            ("access", None if info.private is None else ", ".join(access) or "public"),
            ("base model", info.base_model or about["base"]),
            ("license", info.licence),
            ("adapter", f"{info.preview.name}, {human_bytes(info.preview.size)}"),
            ("format", about["format"]),
            ("problem", about["problem"]),
            ("layers", about["layers"]),
            ("parameters", about["parameters"]),
            ("trigger words", ", ".join(about["trigger_words"])),
            ("loads in", ", ".join(about["loads_in"])),
            ("files", ", ".join(f.name for f in info.files)),
            ("issues", ", ".join(info.issues)),
        )
    )


def show_found(hits: tuple[SearchHit, ...]) -> None:
    if not hits:
        show_text("No adapters found.")
        return
    show_table(
        ("repository", "base model", ">downloads", ">likes", "updated"),
        ((h.repo, ", ".join(h.base_models), h.downloads, h.likes, h.updated) for h in hits),
    )


def show_cached(here: tuple[Cached, ...]) -> None:
    if not here:
        show_text("No adapters in the cache.")
        return
    show_table(
        ("repository", "commit", "revisions", "base model", ">size", "files"),
        (
            (c.repo, c.commit[:7], ", ".join(c.revisions), c.base_model, human_bytes(c.bytes), ", ".join(c.files))
            for c in here
        ),
    )
