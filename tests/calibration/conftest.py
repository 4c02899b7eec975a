"""The shipped base model with the shipped adapters, opened once."""

import pytest

from tests.calibration.sessions import LOKR, session_with


@pytest.fixture(scope="session")
def session():
    """A session with the LoRA. Tests attach and detach adapters, and leave it as it was."""
    return session_with()


@pytest.fixture(scope="session")
def lokr_session():
    return session_with(LOKR)
