"""Nearest Kronecker sums of dense matrices, against the dense SVD of the rearranged matrix."""

import pytest
import torch

from krona_hub.errors import ShapeError
from krona_hub.kron.from_dense import RearrangedDense, dense_rows, nearest_kron_of_dense
from krona_hub.kron.shapes import KronShape, choices
from krona_hub.kron.terms import KronTerms, as_lora, nearest_kron


def decaying(n, out, in_, seed=0):
    """Matrices whose singular values fall like those of real differences."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(n, out, in_, generator=generator)
    u, s, vh = torch.linalg.svd(weights, full_matrices=False)
    return (u * (s * 0.9 ** torch.arange(s.shape[1]))[:, None]) @ vh


@pytest.mark.parametrize("shape", list(choices(24, 36)), ids=str)
def test_every_shape_is_as_near_as_the_dense_svd(shape):
    weights = decaying(2, 24, 36)
    for terms in {1, min(3, shape.max_terms), shape.max_terms}:
        for weight, fit in zip(weights, nearest_kron_of_dense(weights, shape, terms), strict=True):
            best = nearest_kron(weight.double(), shape, terms)
            true = (weight.double() - fit.terms.dense().double()).norm() / weight.double().norm()
            assert true <= best.relative_error * (1 + 1e-4) + 1e-6
            assert fit.relative_error == pytest.approx(float(true), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("a", [(640, 1), (40, 30), (16, 60)])
def test_few_terms_of_a_large_side_come_from_krylov_and_are_as_near(a):
    weight = decaying(1, 640, 960)
    fit = nearest_kron_of_dense(weight, a, 3)[0]
    sigma = RearrangedDense.of(weight, fit.terms.shape).spectrum().sigma[0]
    best = float(sigma[3:].norm() / sigma.norm())
    assert fit.relative_error == pytest.approx(best, rel=1e-4)
    true = float((weight[0] - fit.terms.dense()).norm() / weight[0].norm())
    assert fit.relative_error == pytest.approx(true, rel=1e-4)


def test_a_nearly_exact_sum_has_its_own_error_and_not_that_of_rounding():
    generator = torch.Generator().manual_seed(1)
    weight = torch.kron(torch.randn(4, 6, generator=generator), torch.randn(5, 7, generator=generator)).double()
    weight += 1e-7 * torch.randn(20, 42, generator=generator)
    fit = nearest_kron_of_dense(weight[None], (4, 6), 1)[0]
    assert fit.relative_error == pytest.approx(nearest_kron(weight, (4, 6)).relative_error, rel=1e-4)
    assert 0 < fit.relative_error < 1e-6


def test_a_zero_matrix_has_no_error():
    fit = nearest_kron_of_dense(torch.zeros(1, 6, 8), (2, 2), 2)[0]
    assert fit.relative_error == 0.0
    assert not fit.terms.dense().any()


def test_what_does_not_fit_is_told():
    with pytest.raises(ShapeError, match="expected \\(n, out, in\\)"):
        nearest_kron_of_dense(torch.zeros(6, 8), (2, 2))
    with pytest.raises(ShapeError, match="does not divide"):
        nearest_kron_of_dense(torch.zeros(1, 6, 8), (4, 2))


def test_the_energy_of_planted_terms_is_concentrated_in_their_number():
    generator = torch.Generator().manual_seed(2)
    terms = KronTerms(torch.randn(3, 8, 8, generator=generator), torch.randn(3, 40, 24, generator=generator))
    spread = RearrangedDense.of(terms.dense()[None], terms.shape).concentration()
    assert 1 < spread < 6
    elsewhere = RearrangedDense.of(terms.dense()[None], KronShape(20, 12, 16, 16)).concentration()
    assert elsewhere > 5 * spread


@pytest.mark.parametrize("seed", range(3))
def test_rows_one_after_the_other_are_the_whole_matrix(seed):
    torch.manual_seed(seed)
    for terms in (KronTerms(torch.randn(2, 3, 4), torch.randn(2, 5, 7)), as_lora(torch.randn(9, 2), torch.randn(2, 4))):
        torch.testing.assert_close(torch.cat(list(dense_rows(terms, torch.float64))), terms.dense().double())
