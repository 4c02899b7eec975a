"""`krona train` with the denoiser in pieces, on CPUs: what accelerate's configuration asks for on GPUs alone."""

from krona_hub.cli import start
from krona_hub.training import setup

if __name__ == "__main__":  # not where this file is only collected
    setup.uses_fsdp = lambda accelerator: True
    start()
