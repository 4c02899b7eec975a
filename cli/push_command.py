"""`krona push`: an adapter as a repository of the Hugging Face Hub."""

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
    "What goes into it": (
        click.Option(
            ["--with-lora"],
            is_flag=False,
            flag_value="exact",
            metavar="[RANK]",
            help="Add a LoRA for diffusers and others: exact, or the best of rank RANK (--with-lora=16).",
        ),
        click.Option(["--with-lokr"], is_flag=True, help="Add a LyCORIS LoKr, for ComfyUI and others."),
        click.Option(
            ["--images"], type=click.Path(), metavar="DIR", help="Sample pictures; x.txt beside x.png is its prompt."
        ),
        click.Option(["--card-only"], is_flag=True, help="Write the card anew and leave the weights alone."),
        click.Option(["--no-card"], is_flag=True, help="Leave README.md alone."),
        click.Option(
            ["--base-model"], metavar="NS/NAME", help="The base, as the Hub calls it, where the file does not say."
        ),
        base_option,
        click.Option(
            ["--sign-key"], type=click.Path(), metavar="PEM", help="Sign with this private key; needs krona-hub[sign]."
        ),
    ),
    "Where to": (
        click.Option(["--public/--private", "public"], default=None, help="Who sees a new repository [private]."),
        click.Option(["--revision"], default="main", metavar="BRANCH", help="The branch to commit to [main]."),
        click.Option(["--create-pr"], is_flag=True, help="Open a pull request instead."),
        click.Option(["--tag"], metavar="TAG", help="Tag the commit, such as v1."),
        click.Option(["--message", "-m"], metavar="TEXT", help="What the commit says."),
        click.Option(["--endpoint"], metavar="URL", help="The address of another Hub [HF_ENDPOINT]."),
    ),
    "How": (
        dry_run_option,
        click.Option(["--yes", "-y"], is_flag=True, help="Do not ask."),
        click.Option(["--force"], is_flag=True, help="Push though the repository holds something else."),
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

    Checks the file, writes a model card, shows what would change, makes one commit and compares what the Hub then
    holds. Pushing the same again changes nothing, and what you write into the card yourself stays. The token comes
    from `hf auth login` or HF_TOKEN.
    """
    from krona_hub.hub import push

    options["card"] = not options.pop("no_card")
    report = push(
        file,
        repo,
        private=None if public is None else not public,
        with_lora=_rank(with_lora),
        confirm=None if yes else _ask,
        **options,
    )
    shown = not (yes or options["dry_run"]) and _on_a_terminal()
    emit(as_document(report), lambda: show(report, shown=shown))
    if options["dry_run"]:
        log("dry run: nothing was sent.")


def _rank(text: str | None) -> int | bool:
    if text is None:
        return False
    if text == "exact":
        return True
    if not text.isdecimal() or not int(text):
        raise UsageError(f"--with-lora takes a rank, not {text!r}.", fix="Write --with-lora=16, or put it last.")
    return int(text)


def _on_a_terminal() -> bool:
    return sys.stdin.isatty() and sys.stdout.isatty() and not flag_is_set("json")


def _ask(plan: PushPlan) -> bool:
    """Show the plan and wait for a yes; where nobody can answer, the command line was the answer."""
    if not _on_a_terminal():
        return True
    show_plan(plan)
    return click.confirm(f"Push to {plan.repo}?", err=True)


def as_document(report: PushReport) -> dict[str, Any]:
    fields = fields_of(report)
    return {**fields, "up_to_date": report.up_to_date, "bytes_to_send": report.plan.bytes_to_send}


def show_plan(plan: PushPlan) -> None:
    """The table of files, and where they go."""
    show_table(
        ("file", ">size", "change", "sent over"),
        ((r.file, human_bytes(r.size) if r.size else "", r.action, r.transport) for r in plan.rows),
    )
    show_text()
    show_facts(
        (
            ("repository", f"{plan.repo}, new, {plan.visibility}" if plan.is_new else plan.repo),
            ("on top of", None if plan.is_new or plan.parent is None else plan.parent[:7]),
            ("branch", plan.revision if plan.revision != "main" else None),
            ("as", "a pull request" if plan.create_pr else None),
            ("with the tag", plan.tag),
            ("sends", human_bytes(plan.bytes_to_send)),
            *(("note", note) for note in plan.notes),
        )
    )


def show(report: PushReport, *, shown: bool) -> None:
    if not shown and not report.up_to_date:
        show_plan(report.plan)
        show_text()
    notes = report.notes if report.up_to_date else [n for n in report.notes if n not in report.plan.notes]
    same = f"already up to date: {len(report.plan.rows)} files" if report.up_to_date else None
    show_facts(
        (
            ("result", same),
            ("url", report.url),
            ("commit", report.plan.parent if report.up_to_date else report.commit),
            ("pull request", report.pull_request),
            ("tag", report.tag),
            ("verified", f"{report.verified} files, by digest" if report.verified else None),
            *(("note", note) for note in notes),
        )
    )
