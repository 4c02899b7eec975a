"""Totals and words."""

from pathlib import Path

import pytest

from krona_hub.conversion.report import ConversionReport, LayerReport, total_error


def layer(name="x", error=0.0, norm=1.0, before=100, after=50):
    return LayerReport(name, "LoRA r4", "2x2 ⊗ 2x2", before, after, 4 * before, 4 * after, error, norm)


def report(*layers):
    return ConversionReport("in", "kohya-lora", "krona", None, Path("out"), layers)


def test_the_total_error_weighs_layers_by_their_norm():
    assert total_error([layer(error=0.6, norm=3), layer(error=0.0, norm=4)]) == pytest.approx(1.8 / 5)


def test_an_adapter_of_zeros_has_no_error():
    assert report(layer(norm=0.0)).relative_error == 0.0


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (0.0, "Exact"),
        (0.005, "Nearly identical"),
        (0.05, "Close"),
        (0.2, "Noticeably"),
        (0.5, "Very"),
        (0.98, "Destroyed"),
    ],
)
def test_the_verdict_follows_the_error(error, words):
    assert report(layer(error=error)).verdict.startswith(words)


def test_the_verdict_says_what_it_costs():
    assert report(layer()).verdict.endswith(" 50 parameters (−50.0 %).")
    assert report(layer(after=125)).verdict.endswith(" 125 parameters (+25.0 %).")
    assert report(layer(after=2800)).verdict.endswith(" 28.0× as many parameters.")
    assert report(layer(after=100)).verdict.endswith("Same number of parameters.")


def test_energy_kept_is_what_an_orthogonal_projection_keeps():
    assert report(layer(error=0.6)).energy_kept == pytest.approx(0.64)
