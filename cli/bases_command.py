"""`krona bases`: the base models of the catalog."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from krona_hub.cli.console import emit, krona_command, show_facts, show_table, show_text

if TYPE_CHECKING:
    from krona_hub.rendering.base_models import BaseFacts


@krona_command(
    "bases",
    arguments=(click.Argument(["name"], required=False),),
    examples=("krona bases", "krona bases wan", "krona bases flux1-dev --json"),
)
def command(name: str | None) -> None:
    """List the base models that krona knows by name, or describe one of them.

    NAME is a name, an alias or a Hub id; any other text lists the base models whose names or titles contain it. Other
    base models work too: specify a checkpoint file, a diffusers folder or a folder with a config.json with --base.
    """
    from krona_hub.rendering.base_models import described, listed

    one = described(name) if name else None
    if one is not None:
        emit(one, lambda: _show(one))
        return
    facts = listed(name or "")
    emit({"bases": facts}, lambda: _list(facts))


def _list(facts: Sequence[BaseFacts]) -> None:
    show_table(
        ("name", "base model", ">layers", ">parameters"),
        ((f.name, f.title, f.denoiser.layers, f.denoiser.parameters) for f in facts),
    )


def _show(facts: BaseFacts) -> None:
    show_facts(_facts(facts))
    show_text()
    show_table(
        ("component", "class", ">layers", ">parameters"),
        ((c.component, c.class_name or "none in diffusers", c.layers, c.parameters) for c in facts.components),
    )
    show_text()
    show_facts((c.component, c.checked) for c in facts.components)


def _facts(facts: BaseFacts) -> Iterator[tuple[str, Any]]:
    yield "name", facts.name
    yield "base model", facts.title
    yield "other names", ", ".join(facts.aliases)
    yield "Hub ids", ", ".join(facts.hub_ids)
    yield "same layers", ", ".join(facts.same_layers)
    yield "variant of", facts.variant_of
    yield "not listed", ", ".join(facts.uncovered)
    yield "spellings", ", ".join(facts.spellings)
