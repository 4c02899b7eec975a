"""Settings of every test run."""

import os

# pytest-xdist already has a process per core; torch threads that wait for each other's cores make it many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")
