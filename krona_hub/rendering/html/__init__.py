"""Self-contained HTML reports on a file, a parameter count, a conversion or a training run. No network, no library."""
