"""Settings: accepted and rejected values, and the round trip through TOML."""

import pytest

from krona_hub.errors import NotFoundError, ShapeError, UsageError
from krona_hub.training.configuration import PRESETS, checked, read_toml, settings_of, to_toml
from krona_hub.training.settings import KINDS, TrainingSettings


def test_a_misspelt_field_is_refused_with_the_right_one():
    with pytest.raises(UsageError, match=r"learning_rat.*learning_rate"):
        checked({"learning_rat": 1.0})


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("steps", 0, "at least 1"),
        ("steps", 2.5, "an integer"),
        ("steps", True, "an integer"),
        ("learning_rate", float("nan"), "out of range"),
        ("caption_dropout", 1.5, "at most 1"),
        ("rows", "shufled", "shuffled"),
        ("flip", "yes", "true or false"),
        ("shapes", {"(": "4x4"}, "regular expression"),
        ("shapes", {"to_q": "4by4"}, "64x4"),
        ("shape", "64", "64x4"),
        ("seed", 2**63, "out of range"),
        ("caption_template", "a photo", "{caption}"),
    ],
)
def test_a_wrong_value_is_refused_in_words(field, value, words):
    with pytest.raises((UsageError, ShapeError)) as caught:
        checked({field: value})
    assert words in str(caught.value)


def test_what_is_written_is_read_back_the_same(tmp_path):
    settings = checked(
        {
            "prompt": 'a "photo"\n\\ of é', "steps": 7, "learning_rate": 1e-5, "flip": True, "resolution": 96,
            "sample_prompts": ["one, two", "three"], "shapes": {r"attn2\.to_[kv]$": "32x8", "x": "auto"},
            "export": "lora, lycoris",
        }
    )  # fmt: skip
    path = tmp_path / "config.toml"
    path.write_text(to_toml(settings), "utf-8")
    assert checked(read_toml(path)) == settings
    assert settings.export == ("lora", "lycoris")


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('preset = "paper-sd"\nsteps = 30\nseed = 3\n')
    settings = settings_of({"seed": 4}, file=path)
    assert (settings.steps, settings.seed, settings.shape, settings.rows) == (30, 4, "64x4", "shuffled")


def test_every_preset_is_made_of_sound_settings():
    for name, values in PRESETS.items():
        assert settings_of({}, preset=name).steps == values.get("steps", TrainingSettings().steps)


def test_an_unknown_preset_and_a_missing_file_are_told():
    with pytest.raises(UsageError, match="paper-sdxl"):
        settings_of({}, preset="paper-sdx")
    with pytest.raises(NotFoundError):
        settings_of({}, file="nowhere.toml")


def test_a_broken_file_is_told_with_its_name(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text("steps = = 3")
    with pytest.raises(UsageError, match=r"a\.toml"):
        settings_of({}, file=path)


def test_paths_of_a_file_are_beside_it(tmp_path):
    (tmp_path / "photos").mkdir()
    path = tmp_path / "a.toml"
    path.write_text('data = "photos"\nbase = "org/model"\n')
    settings = settings_of({}, file=path)
    assert (settings.data, settings.base) == (str(tmp_path / "photos"), "org/model")


def test_the_run_folder_of_a_file_is_beside_it_before_there_is_one(tmp_path):
    path = tmp_path / "a.toml"
    path.write_text('output = "runs/toy"\n')
    assert settings_of({}, file=path).output == str(tmp_path / "runs/toy")
    path.write_text(f'output = "{tmp_path}/elsewhere"\n')
    assert settings_of({}, file=path).output == f"{tmp_path}/elsewhere"


def test_every_field_has_help_and_a_panel():
    assert all(kind.metadata["help"].endswith((".", "]", "…")) and kind.metadata["panel"] for kind in KINDS.values())
