"""The model card of an adapter: front matter and sections, around whatever the owner writes between them.

Krona writes only between `<!-- krona:begin NAME -->` and `<!-- krona:end NAME -->`. In the front matter the owner wins,
except for the keys that say what the repository is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from krona_hub.errors import FormatError

OURS = ("base_model", "base_model_relation", "library_name", "pipeline_tag")  # keys of the front matter
ABREAST, PICTURE = 4, 192  # samples in a row, and how wide they are shown, in pixels
LORA_TAGS = ("lora", "template:sd-lora")  # the Hub's snippet for them needs a LoRA in the repository
_FRONT = re.compile(r"\A---\r?\n(.*?\r?\n)?---\r?\n?", re.DOTALL)
_SECTION = re.compile(r"<!-- krona:begin (?P<name>[\w-]+) -->\n.*?<!-- krona:end (?P=name) -->\n?", re.DOTALL)
_EDGE = re.compile(r"^<!-- krona:(begin|end) ([\w-]+) -->", re.MULTILINE)

LICENCES: Mapping[str, tuple[str, str]] = {  # base -> the Hub's licence id, and a name where that id is "other"
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("creativeml-openrail-m", ""),
    "stabilityai/stable-diffusion-2-1": ("openrail++", ""),
    "stabilityai/stable-diffusion-2-1-base": ("openrail++", ""),
    "stabilityai/stable-diffusion-xl-base-1.0": ("openrail++", ""),
    "stabilityai/stable-diffusion-xl-refiner-1.0": ("openrail++", ""),
    "stabilityai/stable-diffusion-3.5-medium": ("other", "stabilityai-ai-community"),
    "stabilityai/stable-diffusion-3.5-large": ("other", "stabilityai-ai-community"),
    "black-forest-labs/FLUX.1-dev": ("other", "flux-1-dev-non-commercial-license"),
    "black-forest-labs/FLUX.1-schnell": ("apache-2.0", ""),
}  # as the cards of these very models say; of fine-tunes and of all others their own pages tell
HUB_LICENCES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl "
    "gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql "
    "ofl-1.1 ncsa unlicense zlib pddl unknown other"
)  # https://huggingface.co/docs/hub/repositories-licenses: it refuses cards with any other


@dataclass(frozen=True)
class CardSample:
    """A picture of the card."""

    file: str  # in the repository
    prompt: str = ""


@dataclass(frozen=True)
class CardFacts:
    """All that a card says, in values and in rows that are words already."""

    repo: str
    title: str
    base_model: str
    family: str | None
    tags: tuple[str, ...]
    licence: str | None  # of the adapter, where its file says so
    trigger_words: tuple[str, ...]
    weights: str  # file name
    lora: str | None  # file name of the export, where there is one
    parameters: Sequence[tuple[str, str]]  # what, how much
    layers: Sequence[tuple[str, ...]]  # largest layers: name, form, parameters
    conversions: Sequence[tuple[str, ...]]  # file, what it is, relative error, parameters
    training: Sequence[tuple[str, str]]
    files: Sequence[tuple[str, ...]]  # name, size, sha256
    loads: Sequence[tuple[str, ...]]  # tool, files that it loads or why none
    provenance: Sequence[tuple[str, str]]
    again: str = ""  # the settings that train it again, as TOML
    samples: tuple[CardSample, ...] = ()
    plots: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)  # further front matter


# --- front matter ----------------------------------------------------------------------------------------------------


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """The front matter as krona would write it into a new card."""
    data: dict[str, Any] = dict(_licence(facts))
    data |= {
        "library_name": "diffusers" if facts.lora else "krona-hub",
        "base_model": facts.base_model,
        "base_model_relation": "adapter",
        "pipeline_tag": "text-to-image",
        "tags": [*facts.tags, *(LORA_TAGS if facts.lora else ())],
    }
    if facts.trigger_words:
        data["instance_prompt"] = facts.trigger_words[0]
    if facts.samples:
        data["widget"] = [{"text": s.prompt or "a sample", "output": {"url": s.file}} for s in facts.samples]
    return {**data, **facts.extra}


def _licence(facts: CardFacts) -> dict[str, str]:
    if facts.licence:
        return _named(facts.licence)
    licence, name = LICENCES.get(facts.base_model, ("", ""))
    link = f"https://huggingface.co/{facts.base_model}/blob/main/LICENSE.md" if name else ""
    named = {"license": licence, "license_name": name, "license_link": link}
    return {key: value for key, value in named.items() if value}


def _named(licence: str) -> dict[str, str]:
    """A licence in the Hub's words; one that it does not know is "other", with its name.

    >>> _named("CreativeML OpenRAIL-M"), _named("My own terms")
    ({'license': 'creativeml-openrail-m'}, {'license': 'other', 'license_name': 'my-own-terms'})
    """
    name = re.sub(r"[^a-z0-9.+]+", "-", licence.lower()).strip("-")
    if name in HUB_LICENCES.split():
        return {"license": name}
    return {"license": "other", "license_name": name or "see-the-card"}


def merged_front_matter(
    new: Mapping[str, Any], theirs: Mapping[str, Any], generated_before: Mapping[str, Any]
) -> dict[str, Any]:
    """The owner's front matter with ours: keys that say what the repository is are ours, so are keys left untouched.

    >>> merged_front_matter({"base_model": "a/b", "license": "x"}, {"license": "mit"}, {"license": "x"})
    {'license': 'mit', 'base_model': 'a/b'}
    """
    merged = dict(theirs)
    for key, before in generated_before.items():  # what we wrote, and do not write any more
        if key not in new and theirs.get(key) == before:
            del merged[key]
    for key, value in new.items():
        if key in OURS or key not in theirs or theirs[key] == generated_before.get(key):
            merged[key] = value
    merged["tags"] = _tags(new, theirs, generated_before)
    return {key: value for key, value in merged.items() if value not in (None, [])}


def _tags(new: Mapping[str, Any], theirs: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Our tags and the owner's own; those that were ours once are not the owner's."""
    ours = list(new.get("tags", ()))
    once = {*before.get("tags", ()), *LORA_TAGS}
    given = theirs.get("tags") or []
    return [*ours, *(t for t in ([given] if isinstance(given, str) else given) if t not in ours and t not in once)]


def split(text: str) -> tuple[dict[str, Any], str]:
    """(front matter, body) of a card. Raises FormatError where the front matter is no YAML."""
    import yaml

    found = _FRONT.match(text)
    if not found:
        return {}, text
    try:
        data = yaml.safe_load(found[1] or "") or {}
    except yaml.YAMLError as error:
        raise FormatError("the front matter of the card on the Hub is no YAML.", fix="Repair it there.") from error
    return (data, text[found.end() :]) if isinstance(data, dict) else ({}, text[found.end() :])


# --- sections --------------------------------------------------------------------------------------------------------


def sections(facts: CardFacts) -> dict[str, str]:
    """Name -> text of the sections that this adapter has something to say in."""
    made = {
        "about": _about(facts),
        "use": _use(facts),
        "samples": _samples(facts),
        "parameters": _parameters(facts),
        "conversion": _conversion(facts),
        "training": _training(facts),
        "files": _files(facts),
        "loads": _loads(facts),
        "licence": _licence_section(facts),
        "reproduce": _reproduce(facts),
    }
    return {name: text for name, text in made.items() if text}


def _about(f: CardFacts) -> str:
    words = ", ".join(f"`{_cell(w)}`" for w in f.trigger_words)
    said = f"\n\nTrigger words: {words}." if words else ""
    return (
        f"An adapter for [{f.base_model}](https://huggingface.co/{f.base_model}) whose changes of the weights are sums "
        f"of Kronecker products, ΔW = Σₖ Aₖ ⊗ Bₖ, in the format of krona-hub.{said}"
    )


def _use(f: CardFacts) -> str:
    base = f.base_model
    lines = [
        "## Use\n",
        "```python\nimport krona_hub\nfrom diffusers import DiffusionPipeline\n",
        f'pipe = DiffusionPipeline.from_pretrained("{base}")\nkrona_hub.load_into(pipe, "{f.repo}")\n```',
    ]
    if f.lora:
        lines += [
            "\nOr, as a LoRA, with diffusers alone:\n",
            "```python\nfrom diffusers import DiffusionPipeline\n",
            f'pipe = DiffusionPipeline.from_pretrained("{base}")',
            f'pipe.load_lora_weights("{f.repo}", weight_name="{f.lora}")\n```',
        ]
    name = f.repo.split("/")[1]
    lines += [
        "\nTo keep a copy, checked against the digests of the Hub and of the manifest:\n",
        f"```sh\nkrona pull {f.repo} -o {name}\n```\n",
        f'Without a network, `krona_hub.load_into(pipe, "{name}/{f.weights}")` loads that copy.',
    ]
    return "\n".join(lines)


def _samples(f: CardFacts) -> str:
    if not f.samples:
        return ""
    return "## Samples\n\n" + "\n".join(_picture_rows(f.samples))


def _picture_rows(samples: Sequence[CardSample]) -> Iterator[str]:
    """A grid: rows of a few pictures, each with its prompt below. The first row is the table's head."""
    wide = min(ABREAST, len(samples))
    for start in range(0, len(samples), wide):
        row = samples[start : start + wide]
        pictures = [f'<img src="{s.file}" alt="{_attribute(s.prompt or "a sample")}" width="{PICTURE}">' for s in row]
        blank = [""] * (wide - len(row))
        yield _line([*pictures, *blank])
        if not start:
            yield "|" + ":---:|" * wide
        yield _line([*(_cell(s.prompt) for s in row), *blank])


def _attribute(text: str) -> str:
    return _cell(text).replace("&lt;", "<").replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def _parameters(f: CardFacts) -> str:
    text = "## Size\n\n" + table(("what", "how much"), f.parameters)
    return f"{text}\n\nThe largest layers:\n\n{table(('layer', 'form', 'parameters'), f.layers)}" if f.layers else text


def _conversion(f: CardFacts) -> str:
    if not f.conversions:
        return ""
    head = ("file", "what it is", "relative error of ΔW", "parameters")
    return f"## Files for other tools\n\n{table(head, f.conversions)}"


def _training(f: CardFacts) -> str:
    if not f.training and not f.plots:
        return ""
    plots = "".join(f"![The loss over the steps]({p})\n\n" for p in f.plots)
    return f"## Training\n\n{plots}{table(('setting', 'value'), f.training) if f.training else ''}".rstrip()


def _files(f: CardFacts) -> str:
    return f"## Files\n\n{table(('file', 'size', 'sha256'), f.files)}"


def _loads(f: CardFacts) -> str:
    return f"## Which tools load it\n\n{table(('tool', 'loads'), f.loads)}" if f.loads else ""


def _licence_section(f: CardFacts) -> str:
    own = f"The adapter's own licence: {_cell(f.licence)}. " if f.licence else ""
    page = f"[{f.base_model}](https://huggingface.co/{f.base_model})"
    licence, name = LICENCES.get(f.base_model, ("", ""))
    which = f", {name or licence}," if licence else ", which its page names,"
    return (
        "## Licence and limits\n\n"
        f"{own}The licence of {page}{which} applies to what is made with it. "
        "An adapter has the limits and the biases of its base and of the pictures that it was trained on."
    )


def _reproduce(f: CardFacts) -> str:
    if not f.provenance:
        return ""
    text = "## How it was made\n\n" + table(("what", "value"), f.provenance)
    if not f.again:
        return text
    return (
        f"{text}\n\nTo train it again, put pictures with their captions into `pictures/` and these lines into "
        f"`train.toml`, then run `krona train train.toml --output run`:\n\n```toml\n{f.again}\n```"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown.

    >>> print(table(("a", "b"), [("1", "x|y")]))
    | a | b |
    |---|---|
    | 1 | x\\|y |
    """
    told = [_line([_cell(c) for c in cells]) for cells in (head, *rows)]
    return "\n".join([told[0], "|" + "---|" * len(head), *told[1:]])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Text of a cell: what would end it, start HTML or another line is taken out of action."""
    return re.sub(r"[^\S\u00a0]+", " ", str(text)).replace("|", "\\|").replace("<", "&lt;").strip()


# --- the card --------------------------------------------------------------------------------------------------------


def render(
    facts: CardFacts,
    theirs: str | None = None,
    *,
    generated_before: Mapping[str, Any] | None = None,
    sections_before: Sequence[str] = (),
) -> str:
    """The text of the card; `theirs` is the one on the Hub, whose own words and order survive.

    A section that was written before and is gone now was removed by the owner, and stays away.
    """
    import yaml

    new, parts = front_matter(facts), sections(facts)
    data, body = split(_as_on_unix(theirs)) if theirs is not None else ({}, "")
    data = merged_front_matter(new, data, generated_before or {})
    body = body if body.strip() else f"# {_cell(facts.title)}\n"
    head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{head}---\n\n{_with_sections(body, parts, sections_before).strip()}\n"


def _as_on_unix(text: str) -> str:
    """A card without what editors on Windows put into it, which hides where its sections begin."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _with_sections(body: str, parts: Mapping[str, str], before: Sequence[str]) -> str:
    present: set[str] = set()

    def again(found: re.Match[str]) -> str:
        name = found["name"]
        present.add(name)
        return _marked(name, parts[name]) if name in parts else ""

    _check_ends(_SECTION.sub("", body))
    body = _SECTION.sub(again, body)
    added = [_marked(n, text) for n, text in parts.items() if n not in present and n not in before]
    return "\n\n".join([body.strip("\n"), *(a.strip("\n") for a in added)]) + "\n"


def _check_ends(rest: str) -> None:
    """Raise FormatError for a begin or an end in what no section is: what stands there would never be made anew."""
    if found := _EDGE.search(rest):
        edge, name = found.groups()
        missing = "end" if edge == "begin" else "begin"
        raise FormatError(
            f"the section {name} of the card on the Hub has lost its {missing}.",
            fix=f"Put <!-- krona:{missing} {name} --> back there, or remove the other one too.",
        )


def _marked(name: str, text: str) -> str:
    return f"<!-- krona:begin {name} -->\n{text}\n<!-- krona:end {name} -->\n"
