"""The model card of an adapter: front matter and sections, around whatever the owner writes between them.

Krona writes only between `<!-- krona:begin NAME -->` and `<!-- krona:end NAME -->`. In the front matter the owner's
values take precedence, except for the keys that identify the repository.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from krona_hub.errors import FormatError

OURS = ("base_model", "base_model_relation", "library_name", "pipeline_tag")  # keys of the front matter
ABREAST, IMAGE_WIDTH = 4, 192  # samples per row, and their width in pixels
LORA_TAGS = ("lora", "template:sd-lora")  # the Hub's snippet for them needs a LoRA in the repository
_FRONT = re.compile(r"\A---\r?\n(.*?\r?\n)?---\r?\n?", re.DOTALL)
_SECTION = re.compile(r"<!-- krona:begin (?P<name>[\w-]+) -->\n.*?<!-- krona:end (?P=name) -->\n?", re.DOTALL)
_EDGE = re.compile(r"^<!-- krona:(begin|end) ([\w-]+) -->", re.MULTILINE)

LICENSES: Mapping[str, tuple[str, str]] = {  # base model -> the Hub's license id, and a name if that id is "other"
    "stable-diffusion-v1-5/stable-diffusion-v1-5": ("creativeml-openrail-m", ""),
    "stabilityai/stable-diffusion-2-1": ("openrail++", ""),
    "stabilityai/stable-diffusion-2-1-base": ("openrail++", ""),
    "stabilityai/stable-diffusion-xl-base-1.0": ("openrail++", ""),
    "stabilityai/stable-diffusion-xl-refiner-1.0": ("openrail++", ""),
    "stabilityai/stable-diffusion-3.5-medium": ("other", "stabilityai-ai-community"),
    "stabilityai/stable-diffusion-3.5-large": ("other", "stabilityai-ai-community"),
    "black-forest-labs/FLUX.1-dev": ("other", "flux-1-dev-non-commercial-license"),
    "black-forest-labs/FLUX.1-schnell": ("apache-2.0", ""),
}  # from the cards of these models; fine-tunes and other models state their own
HUB_LICENSES = (
    "apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m "
    "afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 "
    "cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 "
    "cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 "
    "cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 agpl-3.0 gfdl gpl "
    "gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc lppl-1.3c ms-pl mpl-2.0 odc-by odbl openrail++ osl-3.0 postgresql "
    "ofl-1.1 ncsa unlicense zlib pddl unknown other"
)  # https://huggingface.co/docs/hub/repositories-licenses: the Hub rejects cards with any other id


@dataclass(frozen=True)
class CardSample:
    """A sample image on the card."""

    file: str  # in the repository
    prompt: str = ""


@dataclass(frozen=True)
class CardFacts:
    """Everything a card states, as values and as rows of formatted text."""

    repo: str
    title: str
    base_model: str
    family: str | None
    tags: tuple[str, ...]
    licence: str | None  # of the adapter, if its file states one
    trigger_words: tuple[str, ...]
    weights: str  # file name
    lora: str | None  # file name of the export, if there is one
    parameters: Sequence[tuple[str, str]]  # property, value
    layers: Sequence[tuple[str, ...]]  # largest layers: name, factorization, parameters
    conversions: Sequence[tuple[str, ...]]  # file, contents, relative error, parameters
    training: Sequence[tuple[str, str]]
    files: Sequence[tuple[str, ...]]  # name, size, sha256
    loads: Sequence[tuple[str, ...]]  # application, files that it loads or the reason why none
    provenance: Sequence[tuple[str, str]]
    again: str = ""  # settings that repeat the training, as TOML
    samples: tuple[CardSample, ...] = ()
    plots: tuple[str, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)  # additional front matter


# --- front matter ----------------------------------------------------------------------------------------------------


def front_matter(facts: CardFacts) -> dict[str, Any]:
    """Return the front matter that krona writes into a new card."""
    data: dict[str, Any] = dict(_license(facts))
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


def _license(facts: CardFacts) -> dict[str, str]:
    if facts.licence:
        return _hub_license(facts.licence)
    license_id, name = LICENSES.get(facts.base_model, ("", ""))
    link = f"https://huggingface.co/{facts.base_model}/blob/main/LICENSE.md" if name else ""
    named = {"license": license_id, "license_name": name, "license_link": link}
    return {key: value for key, value in named.items() if value}


def _hub_license(name: str) -> dict[str, str]:
    """Map a license to the Hub's ids; one that the Hub does not know becomes "other", with its name.

    >>> _hub_license("CreativeML OpenRAIL-M"), _hub_license("My own terms")
    ({'license': 'creativeml-openrail-m'}, {'license': 'other', 'license_name': 'my-own-terms'})
    """
    name = re.sub(r"[^a-z0-9.+]+", "-", name.lower()).strip("-")
    if name in HUB_LICENSES.split():
        return {"license": name}
    return {"license": "other", "license_name": name or "see-the-card"}


def merged_front_matter(
    new: Mapping[str, Any], theirs: Mapping[str, Any], generated_before: Mapping[str, Any]
) -> dict[str, Any]:
    """Merge the owner's front matter with krona's: krona sets the identifying keys and those never edited.

    >>> merged_front_matter({"base_model": "a/b", "license": "x"}, {"license": "mit"}, {"license": "x"})
    {'license': 'mit', 'base_model': 'a/b'}
    """
    merged = dict(theirs)
    for key, before in generated_before.items():  # written before, but not any more
        if key not in new and theirs.get(key) == before:
            del merged[key]
    for key, value in new.items():
        if key in OURS or key not in theirs or theirs[key] == generated_before.get(key):
            merged[key] = value
    merged["tags"] = _tags(new, theirs, generated_before)
    return {key: value for key, value in merged.items() if value not in (None, [])}


def _tags(new: Mapping[str, Any], theirs: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Krona's tags, then the owner's; tags that krona wrote earlier do not count as the owner's."""
    ours = list(new.get("tags", ()))
    once = {*before.get("tags", ()), *LORA_TAGS}
    given = theirs.get("tags") or []
    return [*ours, *(t for t in ([given] if isinstance(given, str) else given) if t not in ours and t not in once)]


def split(text: str) -> tuple[dict[str, Any], str]:
    """Split a card into (front matter, body). Raises FormatError if the front matter is not valid YAML."""
    import yaml

    found = _FRONT.match(text)
    if not found:
        return {}, text
    try:
        data = yaml.safe_load(found[1] or "") or {}
    except yaml.YAMLError as error:
        raise FormatError("The front matter of the card on the Hub is not valid YAML.", fix="Fix it there.") from error
    return (data, text[found.end() :]) if isinstance(data, dict) else ({}, text[found.end() :])


# --- sections --------------------------------------------------------------------------------------------------------


def sections(facts: CardFacts) -> dict[str, str]:
    """Return name -> text of the sections that apply to this adapter."""
    made = {
        "about": _about(facts),
        "use": _use(facts),
        "samples": _samples(facts),
        "parameters": _parameters(facts),
        "conversion": _conversion(facts),
        "training": _training(facts),
        "files": _files(facts),
        "loads": _loads(facts),
        "licence": _license_section(facts),
        "reproduce": _reproduce(facts),
    }
    return {name: text for name, text in made.items() if text}


def _about(f: CardFacts) -> str:
    words = ", ".join(f"`{_cell(w)}`" for w in f.trigger_words)
    trigger_words = f"\n\nTrigger words: {words}." if words else ""
    return (
        f"A Kronecker adapter for [{f.base_model}](https://huggingface.co/{f.base_model}) in the krona-hub format. Its "
        f"weight updates are sums of Kronecker products, ΔW = Σₖ Aₖ ⊗ Bₖ.{trigger_words}"
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
            "\nOr load the LoRA export with diffusers alone:\n",
            "```python\nfrom diffusers import DiffusionPipeline\n",
            f'pipe = DiffusionPipeline.from_pretrained("{base}")',
            f'pipe.load_lora_weights("{f.repo}", weight_name="{f.lora}")\n```',
        ]
    name = f.repo.split("/")[1]
    lines += [
        "\nDownload a copy, verified against the digests of the Hub and of the manifest:\n",
        f"```sh\nkrona pull {f.repo} -o {name}\n```\n",
        f'Offline, load that copy with `krona_hub.load_into(pipe, "{name}/{f.weights}")`.',
    ]
    return "\n".join(lines)


def _samples(f: CardFacts) -> str:
    if not f.samples:
        return ""
    return "## Samples\n\n" + "\n".join(_image_rows(f.samples))


def _image_rows(samples: Sequence[CardSample]) -> Iterator[str]:
    """A grid: rows of a few images, each with its prompt below. The first row is the table header."""
    wide = min(ABREAST, len(samples))
    for start in range(0, len(samples), wide):
        row = samples[start : start + wide]
        images = [f'<img src="{s.file}" alt="{_attribute(s.prompt or "a sample")}" width="{IMAGE_WIDTH}">' for s in row]
        blank = [""] * (wide - len(row))
        yield _line([*images, *blank])
        if not start:
            yield "|" + ":---:|" * wide
        yield _line([*(_cell(s.prompt) for s in row), *blank])


def _attribute(text: str) -> str:
    return _cell(text).replace("&lt;", "<").replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")


def _parameters(f: CardFacts) -> str:
    text = "## Size\n\n" + table(("property", "value"), f.parameters)
    return (
        f"{text}\n\nThe largest layers:\n\n{table(('layer', 'factorization', 'parameters'), f.layers)}"
        if f.layers
        else text
    )


def _conversion(f: CardFacts) -> str:
    if not f.conversions:
        return ""
    head = ("file", "contents", "relative error of ΔW", "parameters")
    return f"## Companion exports\n\n{table(head, f.conversions)}"


def _training(f: CardFacts) -> str:
    if not f.training and not f.plots:
        return ""
    plots = "".join(f"![Training loss over the steps]({p})\n\n" for p in f.plots)
    return f"## Training\n\n{plots}{table(('setting', 'value'), f.training) if f.training else ''}".rstrip()


def _files(f: CardFacts) -> str:
    return f"## Files\n\n{table(('file', 'size', 'sha256'), f.files)}"


def _loads(f: CardFacts) -> str:
    return f"## Compatibility\n\n{table(('application', 'loads'), f.loads)}" if f.loads else ""


def _license_section(f: CardFacts) -> str:
    own = f"The adapter's own license: {_cell(f.licence)}. " if f.licence else ""
    page = f"[{f.base_model}](https://huggingface.co/{f.base_model})"
    license_id, name = LICENSES.get(f.base_model, ("", ""))
    which = f", {name or license_id}," if license_id else ", which its page states,"
    return (
        "## License and limitations\n\n"
        f"{own}The license of {page}{which} applies to what is made with it. "
        "An adapter has the limitations and the biases of its base model and of its training images."
    )


def _reproduce(f: CardFacts) -> str:
    if not f.provenance:
        return ""
    text = "## Provenance\n\n" + table(("property", "value"), f.provenance)
    if not f.again:
        return text
    return (
        f"{text}\n\nTo repeat the training, put images with their captions into `pictures/` and these lines into "
        f"`train.toml`, then run `krona train train.toml --output run`:\n\n```toml\n{f.again}\n```"
    )


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table.

    >>> print(table(("a", "b"), [("1", "x|y")]))
    | a | b |
    |---|---|
    | 1 | x\\|y |
    """
    lines = [_line([_cell(c) for c in cells]) for cells in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(text: str) -> str:
    """Escape the text of a cell, so that it cannot end the cell, start HTML or break the line."""
    return re.sub(r"[^\S\u00a0]+", " ", str(text)).replace("|", "\\|").replace("<", "&lt;").strip()


# --- the card --------------------------------------------------------------------------------------------------------


def render(
    facts: CardFacts,
    theirs: str | None = None,
    *,
    generated_before: Mapping[str, Any] | None = None,
    sections_before: Sequence[str] = (),
) -> str:
    """Render the card; `theirs` is the one on the Hub, whose own text and order are kept.

    A section that was written before and is missing now was removed by the owner, and stays removed.
    """
    import yaml

    new, parts = front_matter(facts), sections(facts)
    data, body = split(_with_unix_newlines(theirs)) if theirs is not None else ({}, "")
    data = merged_front_matter(new, data, generated_before or {})
    body = body if body.strip() else f"# {_cell(facts.title)}\n"
    head = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=10_000)
    return f"---\n{head}---\n\n{_with_sections(body, parts, sections_before).strip()}\n"


def _with_unix_newlines(text: str) -> str:
    """Remove the byte order mark and the CRLF of editors on Windows, which hide where sections begin."""
    return text.removeprefix("\ufeff").replace("\r\n", "\n")


def _with_sections(body: str, parts: Mapping[str, str], before: Sequence[str]) -> str:
    present: set[str] = set()

    def replace(found: re.Match[str]) -> str:
        name = found["name"]
        present.add(name)
        return _marked(name, parts[name]) if name in parts else ""

    _check_ends(_SECTION.sub("", body))
    body = _SECTION.sub(replace, body)
    added = [_marked(n, text) for n, text in parts.items() if n not in present and n not in before]
    return "\n\n".join([body.strip("\n"), *(a.strip("\n") for a in added)]) + "\n"


def _check_ends(rest: str) -> None:
    """Raise FormatError for an unpaired begin or end marker, whose section would never be updated."""
    if found := _EDGE.search(rest):
        edge, name = found.groups()
        missing = "end" if edge == "begin" else "begin"
        raise FormatError(
            f"The section {name} of the card on the Hub has lost its {missing} marker.",
            fix=f"Restore <!-- krona:{missing} {name} --> there, or remove the other marker too.",
        )


def _marked(name: str, text: str) -> str:
    return f"<!-- krona:begin {name} -->\n{text}\n<!-- krona:end {name} -->\n"
