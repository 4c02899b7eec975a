"""`krona hub`: what is on the Hub, and what of it lies here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from krona_hub.cli.console import emit, fields_of, krona_command, log, show_facts, show_table, show_text
from krona_hub.cli.options import complete_bases
from krona_hub.errors import UsageError
from krona_hub.hub.preview import describe_preview
from krona_hub.rendering.humanize import human_bytes

if TYPE_CHECKING:
    from krona_hub.hub import Cached, Found, RepoInfo


KNOWS = {"info": ("name", "--offline"), "search": ("name", "--base"), "ls": ("--offline",)}


OPTIONS = (
    click.Option(["--base"], metavar="BASE", shell_complete=complete_bases, help="search: adapters of this base only."),
    click.Option(
        ["--limit"], type=click.IntRange(1, 1000), default=20, metavar="N", help="search: at most so many [20]."
    ),
    click.Option(["--offline"], is_flag=True, help="info: of the copy in the cache."),
    click.Option(["--endpoint"], metavar="URL", help="The address of another Hub [HF_ENDPOINT]."),
)


@krona_command(
    "hub",
    arguments=(
        click.Argument(["action"], type=click.Choice(["info", "search", "ls"])),
        click.Argument(["what"], required=False),
    ),
    options=OPTIONS,
    examples=("krona hub info ana/style", "krona hub search style --base sd15", "krona hub ls"),
)
def command(action: str, what: str | None, base: str | None, limit: int, offline: bool, endpoint: str | None) -> None:
    """Look at adapters on the Hugging Face Hub.

    `info REPO` describes one from its header alone, `search [TEXT]` lists those of krona, `ls` those in the cache of
    this machine.
    """
    from krona_hub import hub

    _check(action, {"name": what, "--base": base, "--offline": offline})
    if action == "info":
        if what is None:
            raise UsageError("krona hub info wants a repository.", fix="Write krona hub info ns/name.")
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
    """Raise UsageError for what this action would pass over."""
    for name, value in given.items():
        if value and name not in KNOWS[action]:
            raise UsageError(f"krona hub {action} takes no {name}.", fix="Leave it out.")


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
            ("base", info.base_model or about["base"]),
            ("licence", info.licence),
            ("adapter", f"{info.preview.name}, {human_bytes(info.preview.size)}"),
            ("format", about["format"]),
            ("problem", about["problem"]),
            ("layers", about["layers"]),
            ("parameters", about["parameters"]),
            ("trigger words", ", ".join(about["trigger_words"])),
            ("loads in", ", ".join(about["loads_in"])),
            ("files", ", ".join(f.name for f in info.files)),
            ("objections", ", ".join(info.issues)),
        )
    )


def show_found(hits: tuple[Found, ...]) -> None:
    if not hits:
        show_text("nothing was found.")
        return
    show_table(
        ("repository", "base", ">downloads", ">likes", "updated"),
        ((h.repo, ", ".join(h.base_models), h.downloads, h.likes, h.updated) for h in hits),
    )


def show_cached(here: tuple[Cached, ...]) -> None:
    if not here:
        show_text("no adapter is in the cache.")
        return
    show_table(
        ("repository", "commit", "of", "base", ">size", "files"),
        (
            (c.repo, c.commit[:7], ", ".join(c.revisions), c.base_model, human_bytes(c.bytes), ", ".join(c.files))
            for c in here
        ),
    )
