"""`python -m krona_hub.cli`, the same as `krona`."""

from krona_hub.cli.main import run

if __name__ == "__main__":
    run()
