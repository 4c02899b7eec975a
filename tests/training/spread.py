"""`krona train` with a sharded denoiser on CPUs, which the configuration of accelerate enables only on GPUs."""

from krona_hub.cli import start
from krona_hub.training import setup

if __name__ == "__main__":  # not where this file is only collected
    setup.uses_fsdp = lambda accelerator: True
    start()
