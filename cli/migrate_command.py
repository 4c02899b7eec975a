"""`krona migrate`: a native file in another schema version."""

from __future__ import annotations

import click

from krona_hub.cli.console import emit, krona_command, log, show_text
from krona_hub.cli.options import dry_run_option, file_argument, output_option, overwrite_option
from krona_hub.errors import counted
from krona_hub.schema.migrate import Migration, migrate_file

OPTIONS = (
    click.Option(["--to"], metavar="X.Y", required=True, help="Schema version to write."),
    output_option,
    overwrite_option,
    dry_run_option,
    click.Option(["--allow-loss"], is_flag=True, help="Leave out vectors, which schema 1.0 does not have."),
)


@krona_command(
    "migrate", arguments=(file_argument,), options=OPTIONS, examples=("krona migrate krona.safetensors --to 1.0",)
)
def command(file: str, to: str, out: str | None, overwrite: bool, dry_run: bool, allow_loss: bool) -> None:
    """Rewrite a native krona file in another schema version, older or newer.

    Only the header changes; tensors are copied byte by byte. Schema 2.0 adds vectors (changes of biases and norms) to
    1.0; a file without vectors is written in 1.0. Without --output, the new file is named
    NAME.schema-X.Y.safetensors and is written beside the old one, which stays unchanged.
    """
    done = migrate_file(file, to, out, overwrite=overwrite, dry_run=dry_run, allow_loss=allow_loss)
    lost = f"; {counted(done.left_out, 'vector')} left out" if done.left_out else ""
    emit(_document(done, dry_run), lambda: show_text(f"{done.path}: schema {done.start} -> {done.to}{lost}"))
    if dry_run:
        log("Dry run: nothing was written.")


def _document(done: Migration, dry_run: bool) -> dict[str, object]:
    return {"path": str(done.path), "from": str(done.start), "to": str(done.to), "written": not dry_run} | (
        {"left_out": done.left_out} if done.left_out else {}
    )
