"""Self-contained HTML pages: of a file, a count, a conversion, a training. No network, no library, one file each."""
