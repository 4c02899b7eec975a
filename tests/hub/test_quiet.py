"""What the client says beside us: nothing, but for the bar of a long transfer on a terminal."""

import logging
import sys

import pytest
from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars

from krona_hub.sources.client import LARGE, quiet

LOG = logging.getLogger("huggingface_hub")


@pytest.fixture(autouse=True)
def talkative():
    before = LOG.level
    LOG.setLevel(logging.WARNING)
    enable_progress_bars()
    yield
    LOG.setLevel(before)


@pytest.mark.parametrize(
    ("nbytes", "terminal", "bars"), [(LARGE, True, True), (LARGE, False, False), (LARGE - 1, True, False)]
)
def test_only_long_transfers_before_a_terminal_have_a_bar(nbytes, terminal, bars, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    with quiet(nbytes):
        assert are_progress_bars_disabled() is not bars and LOG.level == logging.ERROR
    assert not are_progress_bars_disabled() and LOG.level == logging.WARNING


def test_blocks_that_overlap_as_those_of_threads_do_leave_things_as_they_were():
    first, second = quiet(), quiet()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert are_progress_bars_disabled() and LOG.level == logging.ERROR, "the second still wants it quiet"
    second.__exit__(None, None, None)
    assert not are_progress_bars_disabled() and LOG.level == logging.WARNING
