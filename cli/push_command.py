"""`krona push`: publish an adapter as a repository on the Hugging Face Hub."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from krona_hub.cli.console import emit, fields_of, flag_is_set, krona_command, log, show_facts, show_table, show_text
from krona_hub.cli.options import base_option, dry_run_option, file_argument
from krona_hub.errors import UsageError
from krona_hub.rendering.humanize import human_bytes

if TYPE_CHECKING:
    from krona_hub.hub import PushReport
    from krona_hub.hub.push_plan import PushPlan

OPTIONS = {
    "Repository contents": (
        click.Option(
            ["--with-lora"],
            is_flag=False,
            flag_value="exact",
            metavar="[RANK]",
            help="Also add a LoRA for diffusers and others: exact, or the best of rank RANK (--with-lora=16).",
        ),
        click.Option(["--with-lokr"], is_flag=True, help="Also add a LyCORIS LoKr for ComfyUI and others."),
        click.Option(
            ["--images"],
            type=click.Path(),
            metavar="DIR",
            help="Folder of sample images; x.txt beside x.png contains its prompt.",
        ),
        click.Option(["--card-only"], is_flag=True, help="Rewrite only the model card; leave the weights unchanged."),
        click.Option(["--no-card"], is_flag=True, help="Leave README.md unchanged."),
        click.Option(
            ["--base-model"], metavar="NS/NAME", help="Hub id of the base model, if the file does not record it."
        ),
        base_option,
        click.Option(
            ["--sign-key"],
            type=click.Path(),
            metavar="PEM",
            help="Sign with this private key; requires krona-hub[sign].",
        ),
    ),
    "Destination": (
        click.Option(["--public/--private", "public"], default=None, help="Visibility of a new repository [private]."),
        click.Option(["--revision"], default="main", metavar="BRANCH", help="Branch to commit to [main]."),
        click.Option(["--create-pr"], is_flag=True, help="Open a pull request instead of committing to the branch."),
        click.Option(["--tag"], metavar="TAG", help="Tag of the commit, e.g. v1."),
        click.Option(["--message", "-m"], metavar="TEXT", help="Commit message."),
        click.Option(["--endpoint"], metavar="URL", help="URL of another Hub [HF_ENDPOINT]."),
    ),
    "Execution": (
        dry_run_option,
        click.Option(["--yes", "-y"], is_flag=True, help="Do not ask for confirmation."),
        click.Option(["--force"], is_flag=True, help="Push even if the repository contains something else."),
    ),
}


@krona_command(
    "push",
    arguments=(
        file_argument,
        click.Argument(["repo"]),
    ),
    options=OPTIONS,
    examples=(
        "krona push krona.safetensors ana/style --dry-run",
        "krona push krona.safetensors ana/style --public --with-lora --tag v1 --yes",
    ),
)
def command(file: str, repo: str, public: bool | None, with_lora: str | None, yes: bool, **options: Any) -> None:
    """Publish an adapter on the Hugging Face Hub.

    Checks the file, writes a model card, shows the changes, makes one commit and compares the files on the Hub with the
    local ones. Pushing the same adapter again changes nothing, and your own edits to the card are kept. The token comes
    from `hf auth login` or HF_TOKEN.
    """
    from krona_hub.hub import push

    options["card"] = not options.pop("no_card")
    report = push(
        file,
        repo,
        private=None if public is None else not public,
        with_lora=_rank(with_lora),
        confirm=None if yes else _confirm,
        **options,
    )
    shown = not (yes or options["dry_run"]) and _is_interactive()
    emit(as_document(report), lambda: show(report, shown=shown))
    if options["dry_run"]:
        log("Dry run: nothing was sent.")


def _rank(text: str | None) -> int | bool:
    if text is None:
        return False
    if text == "exact":
        return True
    if not text.isdecimal() or not int(text):
        raise UsageError(
            f"Invalid rank {text!r} for --with-lora.", fix="Use --with-lora=16, or give --with-lora as the last option."
        )
    return int(text)


def _is_interactive() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and not flag_is_set("json")


def _confirm(plan: PushPlan) -> bool:
    """Show the plan and ask for confirmation; without a terminal, the command line counts as confirmation."""
    if not _is_interactive():
        return True
    show_plan(plan)
    return click.confirm(f"Push to {plan.repo}?", err=True)


def as_document(report: PushReport) -> dict[str, Any]:
    fields = fields_of(report)
    return {**fields, "up_to_date": report.up_to_date, "bytes_to_send": report.plan.bytes_to_send}


def show_plan(plan: PushPlan) -> None:
    """Show the files and their destination."""
    show_table(
        ("file", ">size", "change", "transport"),
        ((r.file, human_bytes(r.size) if r.size else "", r.action, r.transport) for r in plan.rows),
    )
    show_text()
    show_facts(
        (
            ("repository", f"{plan.repo}, new, {plan.visibility}" if plan.is_new else plan.repo),
            ("parent commit", None if plan.is_new or plan.parent is None else plan.parent[:7]),
            ("branch", plan.revision if plan.revision != "main" else None),
            ("opens", "a pull request" if plan.create_pr else None),
            ("tag", plan.tag),
            ("upload", human_bytes(plan.bytes_to_send)),
            *(("note", note) for note in plan.notes),
        )
    )


def show(report: PushReport, *, shown: bool) -> None:
    if not shown and not report.up_to_date:
        show_plan(report.plan)
        show_text()
    notes = report.notes if report.up_to_date else [n for n in report.notes if n not in report.plan.notes]
    up_to_date = f"already up to date: {len(report.plan.rows)} files" if report.up_to_date else None
    show_facts(
        (
            ("result", up_to_date),
            ("url", report.url),
            ("commit", report.plan.parent if report.up_to_date else report.commit),
            ("pull request", report.pull_request),
            ("tag", report.tag),
            ("verified", f"{report.verified} files, by digest" if report.verified else None),
            *(("note", note) for note in notes),
        )
    )
