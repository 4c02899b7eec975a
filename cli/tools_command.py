"""`krona tools`: which application loads adapters of which base model, under which names, and how that is known."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from krona_hub.cli.console import emit, krona_command, show_facts, show_table, show_text
from krona_hub.cli.options import base_option
from krona_hub.errors import abbreviated

if TYPE_CHECKING:
    from krona_hub.rendering.applications import ApplicationFacts, FamilyFacts


@krona_command(
    "tools",
    arguments=(click.Argument(["name"], required=False),),
    options=(base_option,),
    examples=("krona tools", "krona tools comfyui", "krona tools --base flux2-klein-4b", "krona tools forge --json"),
)
def command(name: str | None, base: str | None) -> None:
    """List the applications that load adapters, describe one of them, or list those that run a base model.

    `run` marks what was measured with the application's own code, `read` what its source says; both with version and
    date. What is neither is "not known". A naming is a prefix and the spelling of the module paths after it.
    """
    from krona_hub.formats.compatibility.applications import APPLICATIONS, application_named
    from krona_hub.rendering.applications import facts_of, for_base, listed

    if base is not None:
        chosen = [application_named(name).name] if name else list(APPLICATIONS)
        found = {key: facts for key, facts in for_base(base).items() if key in chosen}
        emit({"base": base, "applications": found}, lambda: _show_base(found))
    elif name is not None:
        facts = facts_of(application_named(name))
        emit(facts, lambda: _show(facts))
    else:
        every = listed()
        emit({"applications": every}, lambda: _list(every))


def _list(every: Sequence[ApplicationFacts]) -> None:
    show_table(
        ("name", "application", "kind", ">base models", "evidence"),
        ((f.name, f.title, f.kind, _count(f), f.evidence) for f in every),
    )


def _count(facts: ApplicationFacts) -> str:
    return "all" if not facts.families else f"{sum(len(family.bases) for family in facts.families)}"


def _show(facts: ApplicationFacts) -> None:
    show_facts(_facts(facts))
    show_text()
    show_table(("topic", "what it does"), facts.handling.items())
    for family in facts.families:
        show_text()
        show_facts(_family(family))


def _facts(facts: ApplicationFacts) -> Iterator[tuple[str, Any]]:
    yield "name", facts.name
    yield "application", f"{facts.title} ({facts.kind})"
    yield "other names", ", ".join(facts.aliases)
    yield "evidence", facts.evidence
    for kind, format_name in facts.writes.items():
        if format_name or kind != "lora with DoRA":
            yield f"--for, {kind}", format_name or "none: it loads LoRA only"
    yield "reads", ", ".join(facts.reads)
    yield "other base models", facts.other_bases


def _family(family: FamilyFacts) -> Iterator[tuple[str, Any]]:
    yield "base models", ", ".join(family.bases)
    yield "loads", f"LoRA {family.lora}, LoKr {family.lokr}" + (f" ({family.note})" if family.note else "")
    for component, names in family.names.items():
        yield component, ", ".join(f"`{name}`" for name in names)
    for naming, patterns in family.missing.items():
        yield f"not in `{naming}`", abbreviated(list(patterns))
    yield "evidence", family.evidence


def _show_base(found: Mapping[str, FamilyFacts | str]) -> None:
    rows = []
    for name, facts in found.items():
        if isinstance(facts, str):
            rows.append((name, facts, facts, "", ""))
        else:
            names = next(iter(facts.names.values()), ())
            rows.append((name, facts.lora, facts.lokr, f"`{names[0]}`" if names else "", facts.evidence))
    show_table(("application", "LoRA", "LoKr", "written as", "evidence"), rows)
