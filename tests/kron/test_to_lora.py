"""Kronecker sums to LoRA, against the SVD of the dense matrix."""

import pytest
import torch
from hypothesis import given, settings

from krona_hub.errors import UsageError
from krona_hub.kron.shapes import KronShape
from krona_hub.kron.terms import KronTerms, LowRank, as_lora
from krona_hub.kron.to_lora import exact_lora, lora_rank_bound, nearest_lora, nearest_loras
from tests.kron.test_norms import any_sum, deltas, dense, random_sum


@settings(deadline=None)
@given(deltas)
def test_the_best_lora_of_any_rank_is_that_of_the_dense_svd(delta):
    whole = dense(delta)
    sigma = torch.linalg.svdvals(whole)
    for rank in (1, 3, 12):
        fit = nearest_lora(delta, rank)
        kept = len(fit.singular_values)
        assert fit.up.shape[1] == fit.down.shape[0] == kept <= rank
        torch.testing.assert_close(fit.singular_values, sigma[:kept], rtol=1e-9, atol=1e-11 * float(sigma[0]))
        expected = float(sigma[kept:].norm() / sigma.norm())
        assert fit.relative_error == pytest.approx(expected, rel=1e-9, abs=1e-13)
        true = float((fit.up.double() @ fit.down.double() - whole).norm() / whole.norm())
        assert fit.relative_error == pytest.approx(true, abs=1e-6)


@settings(deadline=None)
@given(any_sum)
def test_the_exact_lora_is_exact_and_of_the_rank_of_the_matrix(terms):
    up, down = exact_lora(terms)
    whole = dense([terms])
    assert float((up.double() @ down.double() - whole).norm() / whole.norm()) < 1e-6
    assert up.shape[1] == torch.linalg.matrix_rank(whole, rtol=1e-6)
    assert up.shape[1] <= lora_rank_bound([terms])


def test_a_lora_comes_back_as_the_same_numbers():
    up, down = torch.randn(6, 2), torch.randn(2, 10)
    back = exact_lora(as_lora(up, down))
    assert torch.equal(back[0], up)
    assert torch.equal(back[1], down)


def test_a_low_rank_right_factor_multiplies_its_rank_by_that_of_a():
    a = torch.outer(torch.randn(4), torch.randn(6))[None]
    up, _ = exact_lora(KronTerms(a, LowRank(torch.randn(1, 5, 3), torch.randn(1, 3, 7))))
    assert up.shape == (20, 3)


@pytest.mark.parametrize("rows", ["kron", "shuffled"])
def test_a_batch_equals_its_layers_one_by_one(rows):
    layers = [[random_sum(KronShape(4, 2, 3, 5), 1, seed, rows)] for seed in range(3)]
    layers.insert(1, [random_sum(KronShape(4, 2, 3, 5), 2, 9, rows)])
    for together, delta in zip(nearest_loras(layers, 2), layers, strict=True):
        alone = nearest_lora(delta, 2)
        torch.testing.assert_close(together.up @ together.down, alone.up @ alone.down)
        assert together.relative_error == pytest.approx(alone.relative_error, rel=1e-12)


@settings(deadline=None)
@given(deltas)
def test_an_error_is_kept_by_the_smallest_rank_that_keeps_it(delta):
    for bound in (0.0, 0.05, 0.5):
        fit = nearest_lora(delta, max_error=bound)
        assert fit.relative_error <= max(bound, 1e-12)
        rank = len(fit.singular_values)
        assert rank == 1 or nearest_lora(delta, rank - 1).relative_error > bound


def test_a_rank_caps_what_an_error_asks_for():
    delta = [random_sum(KronShape(4, 2, 3, 5), 2, 9)]
    assert nearest_lora(delta, rank=2, max_error=0.0).up.shape[1] == 2


@pytest.mark.parametrize("terms", [1, 2])
def test_a_zero_delta_is_a_lora_of_rank_one(terms):
    delta = [KronTerms(torch.zeros(terms, 2, 3), torch.zeros(terms, 4, 5))]
    fit = nearest_lora(delta, rank=4)
    assert fit.relative_error == 0.0
    assert fit.up.shape == (8, 1)
    assert not (fit.up @ fit.down).any()


@pytest.mark.parametrize("limits", [{"rank": 0}, {"max_error": -0.1}, {"max_error": float("nan")}])
def test_impossible_wishes_are_usage_errors(limits):
    with pytest.raises(UsageError):
        nearest_lora([random_sum(KronShape(4, 2, 3, 5), 1, 1)], **limits)
