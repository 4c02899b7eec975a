"""`FILE:w` on the command line."""

import pytest

from krona_hub.cli.weighted_source import WeightedArgument, parse_weighted
from krona_hub.errors import UsageError

READ = {
    "a.safetensors": ("a.safetensors", 1.0),
    "a.safetensors:0.5": ("a.safetensors", 0.5),
    "a.safetensors:-1": ("a.safetensors", -1.0),
    "a.safetensors:+.5": ("a.safetensors", 0.5),
    "a.safetensors:1e-3": ("a.safetensors", 0.001),
    "a.safetensors:0": ("a.safetensors", 0.0),
    "a:0.5:0.25": ("a:0.5", 0.25),
    "C:/a.safetensors": ("C:/a.safetensors", 1.0),
    "C:/a.safetensors:2": ("C:/a.safetensors", 2.0),
    "hf://ns/name@main/a.safetensors:0.7": ("hf://ns/name@main/a.safetensors", 0.7),
    "hf://ns/name": ("hf://ns/name", 1.0),
    "ns/name:1.": ("ns/name", 1.0),
    "a.safetensors:": ("a.safetensors:", 1.0),
    "a.safetensors:high": ("a.safetensors:high", 1.0),
    "a.safetensors:1_0": ("a.safetensors:1_0", 1.0),
    ":2": (":2", 1.0),
}


@pytest.mark.parametrize("text", READ)
def test_the_strength_is_the_number_after_the_last_colon(text):
    assert parse_weighted(text) == WeightedArgument(*READ[text])


@pytest.mark.parametrize("text", [t for t, (source, w) in READ.items() if w != 1])
def test_what_was_read_is_written_back_so_that_it_reads_the_same(text):
    assert parse_weighted(str(parse_weighted(text))) == parse_weighted(text)


def test_a_path_that_exists_is_taken_whole(tmp_path):
    path = tmp_path / "odd:0.5"
    assert parse_weighted(str(path)).weight == 0.5
    path.touch()
    assert parse_weighted(str(path)) == WeightedArgument(str(path))


@pytest.mark.parametrize("tail", ["nan", "inf", "-inf", "NaN", "Infinity", "1e999"])
def test_a_strength_is_finite(tail):
    with pytest.raises(UsageError, match="Invalid strength"):
        parse_weighted(f"a.safetensors:{tail}")
