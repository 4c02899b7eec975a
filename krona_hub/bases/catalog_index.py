"""An index of the catalog: which components have a module of some name, and the fingerprint of every base model.

Detection reads it to load only the base models that the names of a file point to. `scripts/build_catalog.py` writes
`index.json`; `tests/bases/test_catalog_index.py` compares it with the catalog.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from krona_hub.bases import catalog, name_prefixes
from krona_hub.bases.families import FAMILIES
from krona_hub.bases.name_patterns import template
from krona_hub.bases.name_table import ComponentNames, keys_of, table

PATH = Path(__file__).with_name("index.json")


def components_with(name: str) -> frozenset[str]:
    """The files of the catalog with a module that this name, of any dialect, may mean.

    >>> sorted(components_with("lora_unet_double_blocks_0_img_attn_qkv"))[:2]
    ['chroma.transformer', 'chroma1-radiance.transformer']
    """
    templates, groups = _templates()
    keys = {template(key) for _, path in name_prefixes.readings(name) for key in keys_of(path)}
    return frozenset(file for key in keys for group in templates.get(key, ()) for file in groups[group])


def bases_with(fingerprint: str) -> tuple[str, ...]:
    """The base models with this fingerprint."""
    return tuple(name for name, known in _read()["fingerprints"].items() if known == fingerprint)


@cache
def _read() -> Mapping[str, Any]:
    data: Mapping[str, Any] = json.loads(PATH.read_text("utf-8"))
    return data


@cache
def _templates() -> tuple[Mapping[str, list[int]], list[list[str]]]:
    data = _read()
    return data["templates"], data["groups"]


def build() -> dict[str, Any]:
    """Build the index of the catalog as it is: components with the same names form one group."""
    members: dict[frozenset[str], list[str]] = defaultdict(list)
    for file, names in _components():
        members[frozenset(map(template, names.index))].append(file)
    groups = sorted(members.items(), key=lambda item: item[1])
    templates: dict[str, list[int]] = defaultdict(list)
    for number, (names_of, _) in enumerate(groups):
        for name in names_of:
            templates[name].append(number)
    return {
        "groups": [sorted(files) for _, files in groups],
        "templates": dict(sorted(templates.items())),
        "fingerprints": {name: catalog.get(name).fingerprint for name in catalog.names()},
    }


def _components() -> Iterator[tuple[str, ComponentNames]]:
    """Every file of the catalog with the names of its modules."""
    seen: set[str] = set()
    for name, family in FAMILIES.items():
        for component, file in family.components.items():
            if file not in seen:
                seen.add(file)
                yield file, table(catalog.get(name)).parts[component]


def as_text(index: Mapping[str, Any]) -> str:
    """Format the index with one entry per line."""
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {_lines(value)}" for key, value in index.items()) + "\n}\n"


def _lines(value: Mapping[str, Any] | Iterable[Any]) -> str:
    if isinstance(value, Mapping):
        return "{\n" + ",\n".join(f"{json.dumps(k)}: {_compact(v)}" for k, v in value.items()) + "\n}"
    return "[\n" + ",\n".join(map(_compact, value)) + "\n]"


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))
