"""Prompts of a calibration: files, defaults, and what is held out."""

import pytest

from krona_hub.calibration.prompts import FAMILIES, prompt_sets
from krona_hub.errors import DataError, NotFoundError, UsageError

LINES = [f"a photo of a toy number {i}" for i in range(8)]


@pytest.mark.parametrize("family", [*FAMILIES, "sdxl", None])
def test_defaults_contain_the_trigger_word_and_hold_out_every_fourth(family):
    sets = prompt_sets("default", trigger="sks toy", family=family)
    assert len(sets.subject) == len(sets.other) == 48 and len(sets.held_out) == len(sets.held_out_other) == 16
    assert all("sks toy" in prompt for prompt in (*sets.subject, *sets.held_out))
    assert not any("sks toy" in prompt or "{" in prompt for prompt in (*sets.other, *sets.held_out_other))
    assert len(set(sets.all)) == len(sets.all)


def test_a_file_has_a_prompt_per_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# with the subject\n" + "\n\n".join(LINES) + f"\n{LINES[0]}\n", "utf-8")
    sets = prompt_sets(path, "none")
    assert sets.held_out == (LINES[3], LINES[7]) and set(sets.subject) == set(LINES) - set(sets.held_out)
    assert sets.other == sets.held_out_other == ()


def test_few_prompts_are_not_held_out():
    assert prompt_sets(LINES[:3], "none").held_out == ()


def test_held_out_prompts_can_be_given():
    sets = prompt_sets(LINES[:6], LINES[6:], ["something else"])
    assert sets.subject == tuple(LINES[:6]) and sets.held_out == ("something else",)


def test_an_overlap_is_refused():
    with pytest.raises(UsageError, match="overlap: a photo of a toy number 2"):
        prompt_sets(LINES, "none", [LINES[2]])
    with pytest.raises(UsageError, match="overlap"):
        prompt_sets(LINES, [LINES[3]])


def test_unusable_files_are_coded_errors(tmp_path):
    empty, latin = tmp_path / "empty.txt", tmp_path / "latin.txt"
    empty.write_text("\n# nothing\n")
    latin.write_bytes("ein grüner Ball".encode("latin-1"))
    for path, error, words in (
        (empty, DataError, "contains no prompt"),
        (latin, DataError, "not valid UTF-8"),
        (tmp_path / "absent.txt", NotFoundError, "no such file"),
        (tmp_path, DataError, "directory"),
    ):
        with pytest.raises(error, match=words) as refusal:
            prompt_sets(path)
        assert refusal.value.fix


def test_defaults_need_a_trigger_word():
    with pytest.raises(UsageError, match="trigger word"):
        prompt_sets("default")
