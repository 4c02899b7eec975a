"""Generate the pages of commands, errors, base models and applications, and the blocks of README.md and other pages.

    python -m scripts.make_docs

A block is a fenced block under a comment. `<!-- run: krona inspect lora.safetensors -->` is filled with the output of
that command in a folder with the files of `scripts/example_files.py`, and `<!-- table: loads-in -->` with a table. A
test generates all pages again and compares them.
"""

from __future__ import annotations

import inspect
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import click

from krona_hub import errors
from krona_hub.bases import catalog
from krona_hub.bases.families import FAMILIES
from krona_hub.cli import failure_report
from krona_hub.cli.main import COMMANDS, load
from krona_hub.rendering import applications
from krona_hub.rendering.base_models import BaseFacts, listed
from krona_hub.rendering.tables import loads_matrix
from scripts.example_files import example_folder, output_of
from scripts.rounding_table import rounding_table

ROOT = Path(__file__).parent.parent
WIDTH = 100  # columns of the help texts
BLOCK = re.compile(r"(<!-- (run|table): (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
STATUSES = {
    0: "success", 1: "internal error: a bug in krona", 2: "wrong usage or invalid file", 3: "refused: too lossy",
    4: "not logged in, or no access", 5: "base model mismatch, or conflict", 6: "integrity error", 7: "not found",
    8: "disk, memory or another limit", 9: "rate limit exceeded", 10: "offline", 130: "stopped",
}  # fmt: skip


def commands_page() -> str:
    """Return the page with the --help of every command, in the order of `krona --help`."""
    os.environ["COLUMNS"] = str(WIDTH)
    helps = {"krona": output_of("krona --help", ROOT)}
    helps |= {f"krona {name}": output_of(f"krona {name} --help", ROOT) for name in COMMANDS}
    pages = [f"## {title}\n\n```text\n{trimmed(text)}\n```\n" for title, text in helps.items()]
    statuses = "\n".join(f"| {status} | {meaning} |" for status, meaning in STATUSES.items())
    return (
        "# Commands\n\nGenerated from `--help` by `scripts/make_docs.py`.\n\n"
        + "\n".join(pages)
        + f"\n## Exit statuses\n\n| status | meaning |\n|---|---|\n{statuses}\n"
    )


def trimmed(text: str) -> str:
    lines = [line.rstrip() for line in text.strip("\n").split("\n")]
    return "\n".join(lines).strip("\n")


def errors_page() -> str:
    """Return the page with all error codes, their meanings and exit statuses, sorted by code."""
    classes = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, errors.KronaError)]
    rows = [(e.code, e.__name__, e.exit_code, inspect.getdoc(e).split("\n")[0]) for e in classes]
    rows.append((failure_report.BUG, "", 1, "A bug in krona. Report it with the output of `KRONA_TRACEBACK=1`."))
    rows.append((failure_report.STOPPED, "", 130, "Stopped with Ctrl-C."))
    table = "\n".join(f"| {code} | `{name}` | {status} | {meaning} |" for code, name, status, meaning in sorted(rows))
    return (
        "# Errors\n\nGenerated from `krona_hub/errors.py` by `scripts/make_docs.py`.\n\n"
        "An error prints one line of cause and one line of fix to stderr. With `--json` it prints "
        '`{"error": {"code", "cause", "fix"}}` to stdout. The meaning of a code never changes. In Python, every error '
        "is a `krona_hub.KronaError` with `.code`, `.cause`, `.fix` and `.exit_code`.\n\n"
        f"| code | class | exit status | meaning |\n|---|---|---|---|\n{table.replace('| `` |', '|  |')}\n"
    )


def loads_in_table() -> str:
    """Return the table of base models and the applications that load adapters of them."""
    rows = [f"| {title} | {' | '.join(row.values())} |" for title, row in applications.matrix().items()]
    names = " | ".join(facts.name for facts in applications.listed())
    return "\n".join([f"| base model | {names} |", "|---|" + "---|" * len(applications.listed()), *rows]) + "\n"


def formats_table() -> str:
    """Return the table of formats and the applications that read them."""
    found = loads_matrix()
    tools = list(next(iter(found.values())))
    rows = [f"| `{name}` | {' | '.join(row[tool].mark for tool in tools)} |" for name, row in found.items()]
    return "\n".join([f"| format | {' | '.join(tools)} |", "|---|" + "---|" * len(tools), *rows]) + "\n"


def tools_page() -> str:
    """Return the page of all applications: evidence, base models, names and arithmetic."""
    every = applications.listed()
    rows = "\n".join(f"| [`{f.name}`](#{f.name}) | {f.title} | {f.kind} | {f.evidence} |" for f in every)
    return (
        "# Applications\n\nGenerated from the tables in `krona_hub/formats/compatibility/applications/` by "
        "`scripts/make_docs.py`; `krona tools` prints the same.\n\n"
        "`run`: the application's own code was run, on CPU, and its names or deltas were compared with what the files "
        "mean. `read`: its source says so. Both with version, commit and date; another version may differ. What is "
        "neither run nor read is *not known*, and krona says so instead of guessing: `krona inspect` answers yes, no "
        "or not known for a file, and `krona convert --for` writes a file only where the answer would be yes.\n\n"
        "A naming such as `lora_unet_ authors` is a prefix and a spelling of the module path after it: `diffusers` is "
        "the path in the diffusers class, `authors` that of the released checkpoint, `own` that of ComfyUI's model. "
        "After a prefix that ends in `_`, dots become underscores. The first naming is the one that is written; where "
        "it lacks a layer, the next one is.\n\n"
        f"| name | application | kind | evidence |\n|---|---|---|---|\n{rows}\n\n"
        f"## Base models\n\n{loads_in_table()}\n"
        "`–`: it does not run the base model or loads no adapter for it. `?`: not known.\n\n"
        f"## Formats\n\n{formats_table()}\n" + "\n".join(map(_tool_section, every))
    )


def _tool_section(facts: applications.ApplicationFacts) -> str:
    written = ", ".join(f"{kind}: `{name}`" for kind, name in facts.writes.items() if name)
    handling = "\n".join(f"| {topic} | {text} |" for topic, text in facts.handling.items())
    families = "\n".join(map(_tool_family, facts.families))
    table = (
        f"| base models | LoRA | LoKr | names | not found |\n|---|---|---|---|---|\n{families}\n" if families else ""
    )
    return (
        f"## {facts.name}\n\n{facts.title}, {facts.kind}; {facts.evidence}. Written for it: {written}. Other base "
        f"models: {facts.other_bases}.\n\n| topic | what it does |\n|---|---|\n{handling}\n\n{table}"
    )


def _tool_family(family: applications.FamilyFacts) -> str:
    names = "; ".join(f"{part}: {', '.join(f'`{n}`' for n in known)}" for part, known in family.names.items())
    lost = "; ".join(f"`{n}`: {', '.join(f'`{p}`' for p in patterns)}" for n, patterns in family.missing.items())
    bases = ", ".join(family.bases) + (" (read)" if family.evidence.startswith("read") else "")
    return f"| {bases} | {family.lora} | {family.lokr} | {names} | {lost or family.note} |"


def bases_page() -> str:
    """Return the page of all base models, by the diffusers class of their denoiser or U-Net."""
    facts = [known for known in listed() if known.name != "tiny-scenes"]
    rows = "\n".join(map(_base_row, facts))
    components = len(catalog.component_names()) - 2  # without those of tiny-scenes
    statuses = [f"- {letter}: {words}" for letter, words in catalog.CONFIG_STATUS.items() if letter != "O"]
    totals = [f"- {letter}: {words}" for letter, words in catalog.TOTAL_STATUS.items() if letter != "O"]
    return (
        "# Base models\n\nGenerated from the catalog by `scripts/make_docs.py`; `krona bases` prints the same list, "
        "and `krona bases NAME` the components, Hub ids and sources of one base model.\n\n"
        f"The catalog lists {len(facts)} base models with {components} components: names and shapes of all layers, "
        "norms and other parameters, built from published configurations with diffusers and transformers on the meta "
        "device (or, without a class, a list of layers). A base model that is not listed works too: `--base` accepts "
        "a checkpoint file, a diffusers or component folder, and a folder with nothing but a `config.json`; without "
        "any, a file keeps its own module names.\n\n"
        "The letters name the source of the configuration and of the total number of parameters:\n\n"
        "Configuration:\n\n" + "\n".join(statuses) + "\n\nTotal:\n\n" + "\n".join(totals) + "\n\n"
        "| name | base model | layers | parameters | checked | other names of modules | same layers, variant of |\n"
        f"|---|---|---|---|---|---|---|\n{rows}\n"
    )


def _base_row(facts: BaseFacts) -> str:
    entry = catalog.component(FAMILIES[facts.name].components[facts.denoiser.component])
    others = [f"= {name}" for name in facts.same_layers]
    others += [f"variant of {facts.variant_of}"] if facts.variant_of else []
    return (
        f"| `{facts.name}` | {facts.title} | {facts.denoiser.layers:,} | {facts.denoiser.parameters:,} "
        f"| {entry.config_status}, {entry.total_status} | {', '.join(facts.spellings)} | {', '.join(others)} |"
    )


TABLES: dict[str, Callable[[], str]] = {"loads-in": loads_in_table, "rounding": rounding_table}


def with_blocks_filled(path: str) -> str:
    """Return a page with all blocks generated again, in order and in one folder."""
    page = (ROOT / path).read_text()
    with tempfile.TemporaryDirectory() as name:
        folder = example_folder(Path(name), bf16="base-bf16" in page)

        def fill(block: re.Match[str]) -> str:
            opening, kind, content, _, end = block.groups()
            if kind == "table":
                return f"{opening}{TABLES[content]()}{end}"
            return f"{opening}```console\n$ {content}\n{trimmed(output_of(content, folder))}\n```\n{end}"

        return BLOCK.sub(fill, page)


PAGES: dict[str, Callable[[], str]] = {
    "docs/commands.md": commands_page,
    "docs/errors.md": errors_page,
    "docs/bases.md": bases_page,
    "docs/tools.md": tools_page,
    "README.md": lambda: with_blocks_filled("README.md"),
    "docs/merging.md": lambda: with_blocks_filled("docs/merging.md"),
    "docs/my-app-ignores-my-lokr.md": lambda: with_blocks_filled("docs/my-app-ignores-my-lokr.md"),
    "docs/generate.md": lambda: with_blocks_filled("docs/generate.md"),
}


def examples() -> list[tuple[str, str]]:
    """Return (command, example) for every example in the help texts."""
    loaded: dict[str, click.Command] = {name: load(name) for name in COMMANDS}
    return [(name, line) for name, command in loaded.items() for line in getattr(command, "examples", ())]


if __name__ == "__main__":
    for path, make in PAGES.items():
        (ROOT / path).write_text(make())
