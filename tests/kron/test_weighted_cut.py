"""Cuts under second moments: the optimum of the whole matrices, from two small ones."""

import pytest
import torch

from krona_hub.kron.weighted.cut import weighted_cut

EXACT = 1e-8  # relative to the whole loss: float64 with condition numbers up to 1e4


def moment(size, samples, generator, spread=2.0):
    """A second moment of rank `samples` at most, with uneven directions."""
    scales = torch.exp(spread * torch.randn(size, generator=generator, dtype=torch.float64))
    x = torch.randn(samples, size, generator=generator, dtype=torch.float64) * scales
    return x.mT @ x / samples


def loss(error, c, g):
    return float(torch.trace(g @ error @ c @ error.mT))


def root(m):
    values, vectors = torch.linalg.eigh(m)
    return vectors @ torch.diag(values.clamp(min=0).sqrt()) @ vectors.mT


CASES = [(30, 40, 6, 200), (40, 24, 12, 200), (16, 90, 16, 200), (24, 24, 1, 200), (30, 40, 8, 5)]


@pytest.mark.parametrize(("out", "in_", "rank", "samples"), CASES)
def test_every_cut_is_the_optimum_of_the_whole_matrices(out, in_, rank, samples):
    generator = torch.Generator().manual_seed(out + rank)
    up, down = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((out, rank), (rank, in_)))
    c, g = moment(in_, samples, generator), moment(out, samples, generator)
    cut = weighted_cut(down @ c @ down.mT, up.mT @ g @ up)
    values = torch.linalg.svdvals(root(g) @ up @ down @ root(c))  # the slow oracle: Eckart & Young
    whole = float(values.square().sum())
    for k in range(rank + 1):
        a, b = cut.cut(up, down, k)
        assert a.shape == (out, k) and b.shape == (k, in_)
        best = float(values[k:].square().sum())
        assert float(cut.losses[k]) == pytest.approx(best, abs=EXACT * whole), "the predicted loss"
        assert loss(up @ down - a @ b, c, g) == pytest.approx(best, abs=EXACT * whole), "the loss of the cut"


def test_without_weights_it_is_the_plain_cut():
    generator = torch.Generator().manual_seed(1)
    up, down = torch.randn(20, 7, generator=generator), torch.randn(7, 33, generator=generator)
    cut = weighted_cut(down.double() @ down.double().mT, up.double().mT @ up.double())
    u, s, v = torch.linalg.svd((up @ down).double())
    for k in range(8):
        a, b = cut.cut(up, down, k)
        assert torch.allclose(a @ b, (u[:, :k] * s[:k]) @ v[:k], atol=1e-5)


def test_no_other_product_of_that_rank_loses_less():
    generator = torch.Generator().manual_seed(2)
    up, down = torch.randn(12, 5, generator=generator), torch.randn(5, 10, generator=generator)
    c, g = moment(10, 100, generator), moment(12, 100, generator)
    a, b = weighted_cut(down.double() @ c @ down.double().mT, up.double().mT @ g @ up.double()).cut(up, down, 2)
    delta = (up @ down).double()
    best = loss(delta - a @ b, c, g)
    for _ in range(200):
        other_a = a + 0.03 * torch.randn(a.shape, generator=generator, dtype=torch.float64) * a.norm()
        other_b = b + 0.03 * torch.randn(b.shape, generator=generator, dtype=torch.float64) * b.norm()
        assert loss(delta - other_a @ other_b, c, g) > best


def test_a_layer_that_sees_nothing_loses_nothing():
    cut = weighted_cut(torch.zeros(3, 3), torch.eye(3))
    assert cut.losses.tolist() == [0.0] * 4
    up, down = cut.cut(torch.ones(4, 3), torch.ones(3, 5), 3)
    assert bool(up.isfinite().all() and down.isfinite().all())
