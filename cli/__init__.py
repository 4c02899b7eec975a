"""The command line: one file per command."""

import signal
import sys


def start() -> None:
    """Run `krona`; Ctrl-C prints one line and exits with status 130, even during imports and at exit."""
    try:
        from krona_hub.cli.main import run

        status = run()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the result is printed; only interpreter shutdown remains
    except KeyboardInterrupt:
        print("error KH001: Stopped. No partially written file was left behind.", file=sys.stderr)
        status = 130
    sys.exit(status)
