"""Facts for the card, config and manifest of a repository, taken from the adapter's header alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from krona_hub.accounting.counting import lora_rank_of
from krona_hub.assets.shipped import SHIPPED
from krona_hub.bases import catalog
from krona_hub.bases.families import FAMILIES
from krona_hub.formats.compatibility.applications import APPLICATIONS
from krona_hub.formats.compatibility.verdicts import Verdict, loads_in
from krona_hub.formats.reading.description import Description, factorization_text
from krona_hub.hub.local_adapter import LocalAdapter
from krona_hub.hub.manifest import ManifestEntry
from krona_hub.hub.model_card import CardFacts, CardSample
from krona_hub.hub.repo_layout import HEADER_SIZE, LORA_EXPORT, MODEL_TYPE, PLOTS, WEIGHTS
from krona_hub.rendering.humanize import human_bytes, percent, relative
from krona_hub.schema.modelspec import TITLE, UNTITLED
from krona_hub.training.configuration import as_toml
from krona_hub.training.settings import KINDS

MOST_LAYERS = 8
NO_BREAK = "\u00a0"  # no-break space
TRAINED = "trained"  # provenance method of adapters made by `krona train`
HEADLINES = ("base", "steps", "batch_size", "learning_rate", "resolution")  # training settings that the card lists


def config(adapter: LocalAdapter) -> dict[str, Any]:
    """Return `config.json`: the Hub counts its downloads, and it describes the adapter without the weights."""
    d = adapter.description
    known = {
        "model_type": MODEL_TYPE,
        "krona_schema": d.schema,
        "base_model": adapter.base_model,
        "base_model_family": adapter.base.family,
        "base_model_revision": adapter.base.revision,
        "base_fingerprint": adapter.base.fingerprint,
        "weights": WEIGHTS,
        HEADER_SIZE: d.header.data_start,
        "components": list(d.components),
        "layers": len(d.modules),
        "parameters": d.parameters,
        "trigger_words": list(d.trigger_words),
        "licence": d.licence,
    }
    return {key: value for key, value in known.items() if value not in (None, [])}


def manifest_facts(adapter: LocalAdapter, exports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what the manifest states besides its file list."""
    p, base = adapter.provenance, adapter.base
    model = {
        "id": adapter.base_model,
        "revision": base.revision,
        "family": base.family,
        "fingerprint": base.fingerprint,
    }
    origin = {
        "created_by": p.created_by,
        "source_format": p.source_format,
        "source_sha256": p.source_sha256,
        "method": p.method,
        "relative_error": p.relative_error,
    }
    return {
        "parameters": adapter.description.parameters,
        "layers": len(adapter.description.modules),
        "base_model": {k: v for k, v in model.items() if v is not None},
        "training": dict(p.training),
        "provenance": {k: v for k, v in origin.items() if v is not None},
        "exports": [dict(e) for e in exports],
    }


def card_facts(
    repo: str,
    adapter: LocalAdapter,
    files: Mapping[str, ManifestEntry],
    samples: Sequence[CardSample],
    exports: Sequence[Mapping[str, Any]],
) -> CardFacts:
    """Collect everything the card states; `files` are the repository's files after the push."""
    d = adapter.description
    family = adapter.base.family
    kinds = ["lokr"] if any(m.split and m.split.a1 > 1 for m in d.modules) else []
    tags = ["krona", "kronecker", *kinds, "text-to-image", *([family] if family else [])]
    return CardFacts(
        repo=repo,
        title=_title(d) or repo.split("/")[1],
        base_model=adapter.base_model,
        family=family,
        tags=tuple(tags),
        licence=d.licence,
        trigger_words=d.trigger_words,
        weights=WEIGHTS,
        lora=LORA_EXPORT if LORA_EXPORT in files else None,
        parameters=_sizes(adapter),
        layers=_layers(d),
        conversions=[_conversion(e) for e in exports],
        training=_training(adapter),
        files=[(n, human_bytes(e.size).replace(" ", NO_BREAK), e.sha256) for n, e in sorted(files.items())],
        loads=_loads(d, exports),
        provenance=_provenance(adapter),
        again=_training_toml(adapter),
        samples=tuple(samples),
        plots=tuple(n for n in files if n.startswith(PLOTS)),
    )


def _title(d: Description) -> str:
    """Return the title stored in the file, or "" if none was set."""
    title = d.header.metadata.get(TITLE, "")
    return "" if title.startswith(UNTITLED) else title.strip()


def _sizes(adapter: LocalAdapter) -> list[tuple[str, str]]:
    d = adapter.description
    rows = [
        ("parameters", f"{d.parameters:,}"),
        ("equivalent LoRA rank", f"{lora_rank_of(d):.2f}"),
        ("adapted layers", f"{len(d.modules)}"),
        *([("changes of biases and norms", f"{len(d.vectors)}")] if d.vectors else []),
        ("file size", human_bytes(d.bytes)),
        ("data types", ", ".join(d.dtypes)),
    ]
    whole = _parameters_of_base(adapter.base.family, d.components)
    return (
        [*rows, ("relative to the adapted components of the base model", percent(d.parameters / whole))]
        if whole
        else rows
    )


def _parameters_of_base(family: str | None, components: Sequence[str]) -> int:
    """Return the parameter count of these components, or 0 if the catalog lacks any of them."""
    known = FAMILIES[family].components if family and family in FAMILIES else {}
    counts = [catalog.component(known[c]).total_parameters if c in known else None for c in components]
    return sum(c for c in counts if c) if counts and all(counts) else 0


def _layers(d: Description) -> list[tuple[str, ...]]:
    largest = sorted(d.modules, key=lambda m: (-m.parameters, m.name))[:MOST_LAYERS]
    return [(f"`{m.name}`", factorization_text(m), f"{m.parameters:,}") for m in largest]


def _conversion(export: Mapping[str, Any]) -> tuple[str, ...]:
    error = relative(float(export["relative_error"]))
    return (f"`{export['name']}`", str(export["words"]), error, f"{int(export['parameters']):,}")


def _loads(d: Description, exports: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """For each application, list the files of the repository that it loads, or the reason why it loads none."""
    native = loads_in(d)
    rows: list[tuple[str, ...]] = [("krona", f"`{WEIGHTS}`")]
    for tool in APPLICATIONS.values():
        good = [f"`{e['name']}`" for e in exports if tool.name in e.get("loads_in", ())]
        why = f"none of these; see `krona convert --for {tool.name}`" if exports else _none(native[tool.name])
        rows.append((tool.title, ", ".join(good) or why))
    return rows


def _none(found: Verdict) -> str:
    return f"{'none' if found.answer == 'no' else found.answer}: {found.why}"


def _provenance(adapter: LocalAdapter) -> list[tuple[str, str]]:
    p = adapter.provenance
    rows: Iterable[tuple[str, object]] = (
        ("created by", p.created_by),
        ("method", p.method),
        ("source format", p.source_format),
        ("source sha256", p.source_sha256),
        ("relative error", None if p.relative_error is None else relative(p.relative_error)),
        ("base model", adapter.base_model),
        ("base model revision", adapter.base.revision),
        ("base model fingerprint", adapter.base.fingerprint),
    )
    return [(name, str(value)) for name, value in rows if value is not None]


def _training(adapter: LocalAdapter) -> list[tuple[str, str]]:
    """List the known facts of the training, without the settings that the card shows as a TOML file."""
    known = {k: v for k, v in adapter.provenance.training.items() if isinstance(v, (str, int, float))}
    own = adapter.provenance.method == TRAINED
    return [(k.replace("_", " "), str(v)) for k, v in known.items() if not own or k in HEADLINES or k not in KINDS]


def _training_toml(adapter: LocalAdapter) -> str:
    """Return the training settings in the file as TOML, or "" for an adapter that krona did not train.

    The metadata is untrusted: unknown settings and values that are not plain are left out.
    """
    if adapter.provenance.method != TRAINED:
        return ""
    known = {name: value for name, value in adapter.provenance.training.items() if name in KINDS and _is_plain(value)}
    base = known.get("base")
    known |= {"base": base if base in SHIPPED else adapter.base_model, "data": "pictures"}
    if adapter.description.licence:
        known["licence"] = adapter.description.licence
    return as_toml(known).replace("<", "\\u003c").strip()


def _is_plain(value: object) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and isinstance(one, str) for key, one in value.items())
    if isinstance(value, (list, tuple)):
        return all(isinstance(one, str) for one in value)
    return isinstance(value, (bool, int, float, str))
