"""The base models of the catalog as plain values, for `krona bases` and the documentation. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from krona_hub.bases import catalog
from krona_hub.bases.families import FAMILIES, equals_of
from krona_hub.errors import NotFoundError


@dataclass(frozen=True)
class ComponentFacts:
    """A model of a pipeline, as the catalog lists it."""

    component: str
    class_name: str  # of diffusers or transformers; "" if there is none
    layers: int
    parameters: int
    checked: str  # where its configuration and its total come from


@dataclass(frozen=True)
class BaseFacts:
    """A base model of the catalog."""

    name: str
    title: str
    aliases: tuple[str, ...]
    hub_ids: tuple[str, ...]
    same_layers: tuple[str, ...]  # base models that no file tells apart from this one
    variant_of: str | None
    uncovered: tuple[str, ...]  # adaptable parts that are not listed
    spellings: tuple[str, ...]  # of its module names, besides those of diffusers
    components: tuple[ComponentFacts, ...]

    @property
    def denoiser(self) -> ComponentFacts:
        return self.components[0]


def described(name: str) -> BaseFacts | None:
    """Return the base model with this name, alias or Hub id; None if there is none.

    >>> described("flux").title, described("nothing") is None
    ('FLUX.1 dev', True)
    """
    known = catalog.find(name)
    return _facts(known) if known else None


def listed(text: str = "") -> tuple[BaseFacts, ...]:
    """Return the base models whose names, aliases or titles contain `text`. Raises NotFoundError if there are none.

    >>> [facts.name for facts in listed("flux.2")]
    ['flux2-dev', 'flux2-klein-4b', 'flux2-klein-9b']
    """
    wanted = text.lower()
    found = tuple(
        _facts(name)
        for name, family in FAMILIES.items()
        if any(wanted in word.lower() for word in (name, family.title, *family.aliases, *family.hub_ids))
    )
    if not found:
        raise NotFoundError(
            f"No base model is called {text!r}.",
            fix="Run `krona bases` for a list of all; others work by their files with --base.",
        )
    return found


def _facts(name: str) -> BaseFacts:
    family, base = FAMILIES[name], catalog.get(name)
    original = base.components[base.denoiser or next(iter(base.components))].original
    return BaseFacts(
        name=name,
        title=family.title,
        aliases=family.aliases,
        hub_ids=family.hub_ids,
        same_layers=tuple(other for other in equals_of(name) if other != name),
        variant_of=family.variant_of,
        uncovered=family.uncovered,
        spellings=tuple(original.spellings) if original else (),
        components=tuple(_component(component, file) for component, file in family.components.items()),
    )


def _component(component: str, file: str) -> ComponentFacts:
    entry = catalog.component(file)
    config, total = catalog.CONFIG_STATUS[entry.config_status], catalog.TOTAL_STATUS[entry.total_status]
    checked = f"configuration {entry.config_status} ({config}), total {entry.total_status} ({total})"
    return ComponentFacts(component, entry.class_name, len(entry.modules), entry.total_parameters, checked)
