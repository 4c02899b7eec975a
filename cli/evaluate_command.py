"""`krona evaluate`: how much pictures look like a subject, and like their prompts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from krona_hub.cli.console import emit, krona_command, log, show_facts, show_table

if TYPE_CHECKING:
    from krona_hub.evaluation import EvaluationReport


OPTIONS = (
    click.Option(
        ["--like", "references"], required=True, type=click.Path(), metavar="DIR", help="Pictures of the subject."
    ),
    click.Option(
        ["--prompt"], metavar="TEXT", help="What all pictures should show [what krona generate wrote into each]."
    ),
    click.Option(
        ["--clip"],
        metavar="MODEL",
        help="A CLIP on this machine: a folder or a Hub id [openai/clip-vit-large-patch14].",
    ),
    click.Option(["--dino"], metavar="MODEL", help="A DINO on this machine [facebook/dino-vits16]."),
    click.Option(["--device"], default="cpu", metavar="NAME", help="Where CLIP and DINO run [cpu]."),
)


@krona_command(
    "evaluate",
    arguments=(click.Argument(["pictures"], type=click.Path()),),
    options=OPTIONS,
    examples=(
        "krona evaluate photos --like photos",
        'krona evaluate photos --like photos --prompt "a photo of sks toy"',
    ),
)
def command(
    pictures: str, references: str, prompt: str | None, clip: str | None, dino: str | None, device: str
) -> None:
    """Score pictures: the subject against other pictures of it, and the prompt.

    PICTURES is a picture or a folder, such as krona generate makes; its columns are told apart. "identity" needs no
    model: it compares vivid colours and how high up they are, for drawn toys in muted rooms. CLIP-I, CLIP-T and DINO
    are computed where the models are on this machine; nothing is downloaded.
    """
    from krona_hub.evaluation import evaluate

    report = evaluate(pictures, references, prompt=prompt, clip=clip, dino=dino, device=device)
    emit({**vars(report), "columns": report.columns}, lambda: show(report))
    for line in report.left_out:
        log(line)


def show(report: EvaluationReport) -> None:
    """A row for each column of pictures."""
    names = [measure.name for measure in report.measures]
    rows = [
        (column or "pictures", *(f"{means[name]:.3f}" for name in names)) for column, means in report.columns.items()
    ]
    show_table(("", *(f">{name}" for name in names)), rows)
    show_facts([("pictures", len(report.pictures)), ("of the subject", len(report.references))])
