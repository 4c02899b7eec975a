"""`krona inspect`: what an adapter file is, from its header alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from krona_hub.cli.common import (
    base_option,
    component_option,
    emit,
    file_argument,
    krona_command,
)

if TYPE_CHECKING:
    from krona_hub.formats.describe import Description
    from krona_hub.formats.tools import Verdict


@krona_command(
    "inspect",
    examples=(
        "krona inspect lora.safetensors",
        "krona inspect lokr.safetensors --layers",
        "krona inspect krona.safetensors --json",
    ),
)
@file_argument
@base_option
@component_option
@click.option("--layers", is_flag=True, help="List every module.")
@click.option("--sha256", "hashed", is_flag=True, help="Hash the whole file as well.")
def command(file: str, base: str | None, component: str | None, layers: bool, hashed: bool) -> None:
    """Say what an adapter file is: format, base model, modules, ranks, scale, size, and which tools load it.

    Only the header of the file is read.
    """
    from krona_hub.formats.describe import describe
    from krona_hub.formats.tools import loads_in
    from krona_hub.sources import resolve

    path = resolve(file)
    about = describe(path, base=base, component=component)
    verdicts = loads_in(about)
    sha256 = _sha256(about.header.path) if hashed else None
    emit(as_document(file, about, verdicts, sha256), lambda: _show(file, about, verdicts, sha256, every=layers))


def as_document(file: str, about: Description, verdicts: Mapping[str, Verdict], sha256: str | None) -> dict[str, Any]:
    """Everything that is known about the file."""
    return {
        "file": file,
        "sha256": sha256,
        "bytes": about.header.file_size,
        "format": about.format,
        "candidates": about.candidates,
        "parameters": about.parameters,
        "scale_rule": about.scale_rule,
        "trigger_words": about.trigger_words,
        "training": about.training,
        "modules": about.modules,
        "extras": about.extras,
        "unmatched": about.unmatched,
        "metadata": about.header.metadata,
        "loads_in": verdicts,
    }
