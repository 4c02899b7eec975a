"""Block weights: which layers get which factor, and files of them."""

import pytest

from krona_hub.errors import NotFoundError, UsageError
from krona_hub.merging.block_weights import BlockWeights, read_block_weights

LINES = "# the middle\nunet\\.mid_block = 0.5   # half\n\n'attn2\\.to_[kv]$' = -1e-1\n"
TOML = "'unet\\.mid_block' = 0.5\n'attn2\\.to_[kv]$' = -0.1\n"
JSON = '{"unet\\\\.mid_block": 0.5, "attn2\\\\.to_[kv]$": -0.1}'


@pytest.mark.parametrize(("name", "text"), [("w.txt", LINES), ("w.toml", TOML), ("w.json", JSON)])
def test_lines_toml_and_json_say_the_same(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    assert read_block_weights(tmp_path / name) == {r"unet\.mid_block": 0.5, r"attn2\.to_[kv]$": -0.1}


def test_the_first_pattern_that_is_found_counts():
    factors = BlockWeights({"mid": 0.5, "attn": 0.25})
    names = ["unet.mid_block.attn", "unet.up.attn", "unet.conv_in"]
    assert [factors.of(n) for n in names] == [0.5, 0.25, 1.0]
    factors.check_used()


def test_a_pattern_that_finds_nothing_is_named():
    factors = BlockWeights({"attn": 0.5, "atn2": 0.0})
    factors.of("unet.mid_block.attn2.to_k")
    with pytest.raises(UsageError, match="'atn2' matches no layer"):
        factors.check_used()


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("w.txt", "mid_block\n", "Line 1 .* 'mid_block'"),
        ("w.txt", "mid_block = much\n", "'much' for 'mid_block'"),
        ("w.txt", "mid_block = inf\n", "not a finite number"),
        ("w.txt", "\n# nothing\n", "contains no block weights"),
        ("w.toml", "a b = 1", "Expected '='"),
        ("w.json", "[1]", "contains no block weights"),
    ],
)
def test_a_file_that_cannot_be_meant_is_told(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        read_block_weights(tmp_path / name)


def test_a_missing_file_and_a_bad_expression_are_told(tmp_path):
    with pytest.raises(NotFoundError):
        read_block_weights(tmp_path / "none.txt")
    with pytest.raises(UsageError, match=r"not a valid regular expression"):
        BlockWeights({"to_[kv": 1.0})
