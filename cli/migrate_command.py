"""`krona migrate`: a native file in another version of its schema."""

from __future__ import annotations

import click

from krona_hub.cli.common import emit, file_argument, krona_command, output_option, overwrite_option, show_text
from krona_hub.schema.migrate import Migration, migrate_file


@krona_command("migrate", examples=("krona migrate krona.safetensors --to 1.0",))
@file_argument
@click.option("--to", metavar="X.Y", required=True, help="The schema version to write.")
@output_option
@overwrite_option
def command(file: str, to: str, out: str | None, overwrite: bool) -> None:
    """Rewrite a native krona file in another version of its schema, older or newer.

    Only the header changes: tensors are copied byte by byte. Without -o the new file is called
    NAME.schema-X.Y.safetensors and lies beside the old one, which stays as it is.
    """
    done = migrate_file(file, to, out, overwrite=overwrite)
    emit(_document(done), lambda: show_text(f"{done.path}: schema {done.start} -> {done.to}"))


def _document(done: Migration) -> dict[str, str]:
    return {"path": str(done.path), "from": str(done.start), "to": str(done.to)}
