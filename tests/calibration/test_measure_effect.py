"""Measured effect: its limits, its formulas, and that measuring changes nothing."""

from dataclasses import replace

import pytest
import torch

from krona_hub.calibration.denoiser_calls import outputs_of
from krona_hub.calibration.execute import effect_of, gain_for, held_out, recorded
from krona_hub.calibration.measure_effect import EffectSums, Squares, measured
from krona_hub.errors import NonFiniteError
from krona_hub.layers import attached
from tests.calibration.sessions import session_with

ROUNDING = 1e-4


def scaled(adapter, factor):
    sums = {name: tuple(s.scaled(factor) for s in delta.sums) for name, delta in adapter.layers.items()}
    return adapter.with_layers({name: replace(adapter[name], sums=own) for name, own in sums.items()})


@pytest.fixture(scope="module")
def known(session):
    return recorded(session, ["a photo of a zorbi on a white table", "a photo of a zorbi on a tiled table"], "test")


def test_the_source_itself_keeps_everything(session, known):
    kept = measured(session.how, known, session.adapter)
    assert kept.effect == pytest.approx(1, abs=ROUNDING)
    assert kept.drift == pytest.approx(1, abs=ROUNDING) and kept.strength == pytest.approx(1, abs=ROUNDING)


def test_the_base_model_alone_keeps_nothing(session, known):
    kept = measured(session.how, known, session.adapter.with_layers({}))
    assert (kept.effect, kept.drift, kept.strength) == (0, 0, 0)


def test_an_opposite_adapter_keeps_less_than_nothing(session, known):
    kept = measured(session.how, known, scaled(session.adapter, -1))
    assert kept.effect < 0 and kept.strength < 0


def test_the_formulas_are_those_of_the_outputs(session, known):
    half = scaled(session.adapter, 0.5)
    kept = measured(session.how, known, half)
    assert measured(session.how, known, session.adapter, gain=0.5).effect == pytest.approx(kept.effect, abs=ROUNDING)
    difference = [(s - b).double() for s, b in zip(known.source, known.base, strict=True)]
    whole = sum(float(d.square().sum()) for d in difference)
    assert known.effects == pytest.approx(whole / sum(d.numel() for d in difference))
    assert 1 - kept.effect == pytest.approx(sum(s.lost for s in kept.squares) / whole)
    # ‖change − effect‖² = ‖change‖² − 2⟨change, effect⟩ + ‖effect‖²
    assert 1 - kept.effect == pytest.approx(kept.drift - 2 * kept.strength + 1, abs=1e-9)


def test_references_do_not_change_when_a_result_is_attached(session, known):
    """The targets of the source are those of before, and the session is left as it was."""
    calls = known.groups[0]
    before = attached(session.how.pipe)
    measured(session.how, known, scaled(session.adapter, 0.7))
    assert attached(session.how.pipe) == before
    with torch.no_grad():
        again = torch.cat([y.flatten()[None] for y in outputs_of(session.how, calls)])
    assert torch.equal(again, known.source[0])


def test_the_range_holds_the_effect_and_vanishes_for_equal_prompts():
    one = Squares(effect=4.0, lost=1.0, change=2.0, along=2.5)
    same = EffectSums((one,) * 5)
    assert same.effect_range(0) == (0.75, 0.75)
    mixed = EffectSums((one, one, Squares(4.0, 3.0, 2.0, 1.0)))
    low, high = mixed.effect_range(0)
    assert low < mixed.effect < high and mixed.effect_range(0) == (low, high)


def test_the_gain_restores_a_strength_that_was_taken_away(session):
    assert gain_for(session, scaled(session.adapter, 0.8)) == pytest.approx(1.25, abs=0.03)


def test_the_report_counts_held_out_prompts_and_samples(session):
    known = held_out(session)
    report = effect_of(session, known, session.adapter)
    assert report.kept == pytest.approx(1, abs=ROUNDING) and report.other_kept == pytest.approx(1, abs=ROUNDING)
    assert report.samples == 12 * len(report.prompts) and report.prompts == session.request.prompts.held_out
    assert not {*report.prompts, *report.other_prompts} & {
        *session.request.prompts.subject,
        *session.request.prompts.other,
    }
    assert report.verdict == "Nearly identical effect."


def test_outputs_that_are_not_finite_are_refused(known):
    session = session_with()
    with pytest.raises(NonFiniteError, match="with the result is NaN or infinite"):
        measured(session.how, known, scaled(session.adapter, float("inf")))
