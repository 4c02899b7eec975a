"""`krona evaluate`: subject fidelity and prompt fidelity of images."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from krona_hub.cli.console import emit, krona_command, log, show_facts, show_table

if TYPE_CHECKING:
    from krona_hub.evaluation import EvaluationReport


OPTIONS = (
    click.Option(
        ["--like", "references"],
        required=True,
        type=click.Path(),
        metavar="DIR",
        help="Reference images of the subject.",
    ),
    click.Option(
        ["--prompt"], metavar="TEXT", help="Prompt of all images [the prompt that krona generate stored in each]."
    ),
    click.Option(
        ["--clip"],
        metavar="MODEL",
        help="Local CLIP model: a folder or a cached Hub id [openai/clip-vit-large-patch14].",
    ),
    click.Option(["--dino"], metavar="MODEL", help="Local DINO model [facebook/dino-vits16]."),
    click.Option(["--device"], default="cpu", metavar="NAME", help="Device for CLIP and DINO [cpu]."),
)


@krona_command(
    "evaluate",
    arguments=(click.Argument(["images"], type=click.Path()),),
    options=OPTIONS,
    examples=(
        "krona evaluate photos --like photos",
        'krona evaluate photos --like photos --prompt "a photo of sks toy"',
    ),
)
def command(images: str, references: str, prompt: str | None, clip: str | None, dino: str | None, device: str) -> None:
    """Score images for subject fidelity, against reference images, and for prompt fidelity.

    IMAGES is an image or a folder, such as the output of krona generate, whose columns are scored separately.
    "identity" needs no model: it compares vivid colors and their vertical position, and suits rendered toys in muted
    rooms. CLIP-I, CLIP-T and DINO are computed if the models are on this machine; nothing is downloaded.
    """
    from krona_hub.evaluation import evaluate

    report = evaluate(images, references, prompt=prompt, clip=clip, dino=dino, device=device)
    emit({**vars(report), "columns": report.columns}, lambda: show(report))
    for line in report.left_out:
        log(line)


def show(report: EvaluationReport) -> None:
    """Show a row of scores for each column of images."""
    names = [measure.name for measure in report.measures]
    rows = [(column or "images", *(f"{means[name]:.3f}" for name in names)) for column, means in report.columns.items()]
    show_table(("", *(f">{name}" for name in names)), rows)
    show_facts([("images", len(report.pictures)), ("reference images", len(report.references))])
