"""The command line: one file per command."""

import signal
import sys


def start() -> None:
    """The entry point of `krona`: Ctrl-C ends it in one line and with status 130, at its imports and exit too."""
    try:
        from krona_hub.cli.main import run

        status = run()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # all is done and told: only the end of Python is left
    except KeyboardInterrupt:
        print("error KH001: stopped; no half-written file is left.", file=sys.stderr)
        status = 130
    sys.exit(status)
