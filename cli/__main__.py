"""Entry point of `python -m krona_hub.cli`, the same as `krona`."""

from krona_hub.cli import start

if __name__ == "__main__":
    start()
