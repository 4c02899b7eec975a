"""Curves of singular values, against dense ΔW."""

import pytest
import torch

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.kron.norms import recompress, relative_difference
from krona_hub.kron.terms import KronTerms, LowRank, as_lora
from krona_hub.rendering.html.spectra import rearrangements, spectra_of, truncated


@pytest.fixture
def layers():
    torch.manual_seed(0)
    lora = as_lora(3 * torch.randn(24, 3), torch.randn(3, 40))
    one = KronTerms(torch.randn(1, 4, 2), LowRank(torch.randn(1, 6, 2), torch.randn(1, 2, 20)))
    several = KronTerms(torch.randn(3, 4, 2), torch.randn(3, 6, 20), "shuffled")
    deltas = {"unet.lora": (lora,), "unet.one": (one,), "unet.several": (several,), "unet.mixed": (lora, one)}
    return {name: LayerDelta(sums, (24, 40)) for name, sums in deltas.items()}


def test_values_of_a_lora_and_of_one_term_are_those_of_the_dense_delta(layers):
    spectra, _ = spectra_of(layers)
    for s in spectra[:2]:
        dense = torch.linalg.svdvals(layers[s.layer].low_rank_delta().double())
        assert s.sigma == pytest.approx(dense[: len(s.sigma)].tolist(), rel=1e-5)
        assert len(s.sigma) == {"unet.lora": 3, "unet.one": 4}[s.layer]
        assert s.cost == 24 + 40


def test_several_terms_lose_what_the_nearest_sum_of_fewer_loses(layers):
    several = next(s for s in spectra_of(layers)[0] if s.layer == "unet.several")
    for keep in (1, 2):
        delta = layers["unet.several"]
        fit = recompress(delta.sums, delta.sums[0].shape, keep)
        assert several.error(keep) == pytest.approx(relative_difference([fit.terms], delta.sums), rel=1e-4)
    assert several.error(3) == 0.0


def test_a_layer_of_several_shapes_is_named_and_not_guessed(layers):
    spectra, without = spectra_of(layers)
    assert without == ("unet.mixed",)
    assert len(spectra) == 3


def test_the_curve_ends_at_the_whole_adapter_and_its_errors_are_true(layers):
    lora = {"unet.lora": layers["unet.lora"]}
    curve = truncated(spectra_of(lora)[0], "c")
    assert [size for size, _ in curve.points] == [64, 128, 192]
    sigma = torch.linalg.svdvals(lora["unet.lora"].low_rank_delta().double())
    assert curve.points[0][1] == pytest.approx(float(sigma[1:].norm() / sigma.norm()), rel=1e-5)
    assert curve.points[-1][1] == 0.0


def test_a_delta_of_zeros_has_no_curve():
    zero = {"unet.a": LayerDelta((as_lora(torch.zeros(8, 2), torch.zeros(2, 6)),), (8, 6))}
    spectra, _ = spectra_of(zero)
    assert truncated(spectra, "c").points == ()
    assert rearrangements(zero["unet.a"]) == ()


def test_the_rearranged_spectrum_gives_the_error_of_the_nearest_sums(layers):
    delta = layers["unet.lora"]
    found = rearrangements(delta, [(4, 2), (5, 3)])  # 5x3 does not divide 24x40
    assert [(r.shape.a1, r.shape.a2) for r in found] == [(4, 2)]
    fit = recompress(delta.sums, found[0].shape, 2)
    assert found[0].points[1] == pytest.approx((2 * found[0].shape.parameters, fit.relative_error), rel=1e-4)
