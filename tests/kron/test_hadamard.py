"""Elementwise products of two low-rank matrices, against the dense products."""

import pytest
import torch

from krona_hub.errors import ShapeError
from krona_hub.kron.hadamard import Hadamard, expanded, is_hadamard
from krona_hub.kron.norms import inner, minus, norm, relative_difference
from krona_hub.kron.rows import among_rows, take_rows, transposed
from krona_hub.kron.terms import (
    KronTerms,
    LowRank,
    as_lora,
    factor_tensors,
    map_factor,
    rank_bound,
    stored_rank,
    transpose_factor,
)  # fmt: skip
from krona_hub.kron.to_lora import exact_lora, long_lora, lora_rank_bound, nearest_lora
from krona_hub.merging.arithmetic.stored_layout import lay_out

ONE = torch.ones(1, 1, 1, dtype=torch.float64)


def hadamard(p=9, q=14, ranks=(2, 3), terms=1, dtype=torch.float64, seed=0):
    """(factor, its matrices in float64)"""
    rand = torch.Generator().manual_seed(seed)
    made = [[torch.randn(terms, *s, generator=rand).to(dtype) for s in ((p, r), (r, q))] for r in ranks]
    (a, b), (c, d) = ([t.double() for t in pair] for pair in made)
    return Hadamard(*(LowRank(*pair) for pair in made)), (a @ b) * (c @ d)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(1, 1), (2, 3), (5, 4)])
def test_up_and_down_are_the_elementwise_product(ranks, dtype):
    factor, want = hadamard(ranks=ranks, terms=2, dtype=dtype)
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    assert factor.rank == ranks[0] * ranks[1] == factor.up.shape[2] == factor.down.shape[1]
    assert tuple(factor.shape) == (2, 9, 14)
    torch.testing.assert_close((factor.up @ factor.down).double(), want, **tolerance)
    torch.testing.assert_close(factor.dense().double(), want, **tolerance)
    assert factor.dense().dtype == factor.up.dtype == torch.promote_types(dtype, torch.float32)


def test_it_stores_four_tensors():
    factor, _ = hadamard()
    terms = KronTerms(ONE, factor)
    assert len(factor_tensors(factor)) == 4
    assert terms.parameters == 1 + (2 + 3) * (9 + 14)
    assert (rank_bound(factor), stored_rank(factor), lora_rank_bound([terms])) == (6, 6, 6)
    thick, _ = hadamard(ranks=(5, 4))
    assert (rank_bound(thick), lora_rank_bound([KronTerms(ONE, thick)])) == (9, 9)


def test_shapes_must_agree():
    one, two = hadamard()[0].first, hadamard(p=8)[0].first
    with pytest.raises(ShapeError, match="one shape"):
        Hadamard(one, two)


def test_map_transpose_and_scale():
    factor, want = hadamard()
    half = map_factor(torch.Tensor.bfloat16, factor)
    assert isinstance(half, Hadamard) and {t.dtype for t in half.tensors} == {torch.bfloat16}
    turned = transpose_factor(factor)
    assert isinstance(turned, Hadamard)
    torch.testing.assert_close(turned.dense(), want.mT)
    for terms in (KronTerms(ONE, factor), KronTerms(factor, ONE), KronTerms(factor, torch.rand(1, 2, 3))):
        torch.testing.assert_close(terms.scaled(-0.5).dense(), terms.dense() * -0.5)
        torch.testing.assert_close(minus(terms).dense(), -terms.dense(), rtol=0, atol=0)
        torch.testing.assert_close(transposed(terms).dense(), terms.dense().mT, rtol=0, atol=0)


def test_one_tensor_twice_is_scaled_once():
    product = hadamard()[0].first
    terms = KronTerms(torch.ones(1, 12, 12), Hadamard(product, product))
    layout = lay_out(terms).scaled(3.0)
    torch.testing.assert_close(KronTerms(layout.outer, layout.inner).dense(), terms.dense() * 3)


@pytest.mark.parametrize("ranges", [[(0, 4)], [(5, 9), (0, 2)], [(2, 3)]])
def test_rows_of_a_lora_like_sum(ranges):
    factor, want = hadamard()
    part = take_rows(KronTerms(ONE, factor), ranges)
    assert isinstance(part.right, Hadamard)
    torch.testing.assert_close(part.dense(), torch.cat([want[0, a:b] for a, b in ranges]))


def test_rows_of_a_fused_block_drop_unused_ranks():
    """q, k and v of one LoHa, in which q uses one of the two dimensions of the first product."""
    factor, _ = hadamard(p=12)
    up = factor.first.up.clone()
    up[:, :4, 1] = 0
    fused = KronTerms(ONE, Hadamard(LowRank(up, factor.first.down), factor.second))
    part = take_rows(fused, [(0, 4)])
    assert part.right.rank == 3
    torch.testing.assert_close(part.dense(), fused.dense()[:4])


@pytest.mark.parametrize("rows", ["kron", "shuffled"])
def test_rows_of_other_sums(rows):
    factor, _ = hadamard(p=6)
    right = KronTerms(torch.rand(1, 2, 3, dtype=torch.float64), factor, rows)
    torch.testing.assert_close(take_rows(right, [(4, 8)]).dense(), right.dense()[4:8])
    left = KronTerms(factor, torch.rand(1, 2, 3, dtype=torch.float64), rows)
    torch.testing.assert_close(take_rows(left, [(6, 12)]).dense(), left.dense()[6:12])
    tall = among_rows(right, 12, 36)
    torch.testing.assert_close(tall.dense()[12:24], right.dense())
    assert not tall.dense()[:12].any() and not tall.dense()[24:].any()


@pytest.mark.parametrize("ranks", [(1, 2), (2, 3), (6, 5)])
def test_norms_and_differences(ranks):
    factor, want = hadamard(p=40, q=30, ranks=ranks)
    a, b = KronTerms(ONE, factor), as_lora(torch.randn(40, 2).double(), torch.randn(2, 30).double())
    assert norm([a]) == pytest.approx(float(want.norm()), rel=1e-12)
    assert norm([a, b]) == pytest.approx(float((want[0] + b.dense()).norm()), rel=1e-12)
    assert inner([a], [b]) == pytest.approx(float((want[0] * b.dense()).sum()), rel=1e-10)
    assert relative_difference([a.scaled(1 + 1e-9)], [a]) == pytest.approx(1e-9, rel=1e-4)
    assert relative_difference([expanded(a)], [a]) < 1e-14


@pytest.mark.parametrize("ranks", [(2, 3), (6, 5)])
def test_conversion_to_lora(ranks):
    factor, want = hadamard(ranks=ranks)
    terms = KronTerms(ONE, factor)
    for up, down in (exact_lora(terms), long_lora([terms]), nearest_lora([terms], max_error=0.0)[:2]):
        assert up.shape[1] <= min(ranks[0] * ranks[1], 9)
        torch.testing.assert_close((up @ down).double(), want[0])
    sigma = torch.linalg.svdvals(want[0])
    fit = nearest_lora([terms], rank=2)
    assert fit.relative_error == pytest.approx(float(sigma[2:].norm() / sigma.norm()), rel=1e-9)


@pytest.mark.parametrize("ranks", [(1, 2), (5, 4)])
def test_expanded_is_the_smaller_of_product_and_matrix(ranks):
    factor, want = hadamard(ranks=ranks)
    plain = expanded(KronTerms(ONE, factor))
    assert not is_hadamard(plain)
    assert plain.parameters == 1 + min(ranks[0] * ranks[1] * (9 + 14), 9 * 14)
    torch.testing.assert_close(plain.dense(), want[0])
    other = as_lora(torch.ones(3, 1), torch.ones(1, 2))
    assert expanded(other) is other


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_squared_norm_of_a_layout(side):
    factor, want = hadamard(terms=2)
    other = torch.randn(2, 4, 5).double()
    layout = lay_out(KronTerms(factor, other) if side == "left" else KronTerms(other, factor))
    exact = sum(float((want[i] * want[j]).sum() * (other[i] * other[j]).sum()) for i in range(2) for j in range(2))
    assert layout.squared_norm() == pytest.approx(exact, rel=1e-6)
