"""Settings of every test run."""

import os

import pytest

# pytest-xdist already has a process per core; torch threads that wait for each other's cores make it many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def temporary_files_of_killed_processes(tmp_path_factory):
    """Where processes that tests start put theirs: what they cannot clear away goes with the folder of the tests."""
    os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("t"))
