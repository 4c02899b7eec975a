"""Low-rank factors and shuffled rows against their dense definitions."""

import pytest
import torch

from krona_hub.kron.terms import KronTerms, LowRank, as_lora


def test_a_lora_is_one_term_with_a_low_rank_right_factor():
    up, down = torch.randn(6, 2), torch.randn(2, 10)
    torch.testing.assert_close(as_lora(up, down).dense(), up @ down)


def test_low_rank_factors_on_both_sides_multiply_out():
    left = LowRank(torch.randn(2, 3, 1), torch.randn(2, 1, 4))
    right = LowRank(torch.randn(2, 5, 2), torch.randn(2, 2, 7))
    w = KronTerms(left, right)
    torch.testing.assert_close(w.dense(), sum(map(torch.kron, left.dense(), right.dense())))
    assert w.parameters == 2 * (3 + 4) + 2 * 2 * (5 + 7)


def test_shuffled_rows_follow_the_published_layer():
    """W[i1·a1 + j1, j2·b2 + i2] = U[i1, i2]·D[j2, j1], with A = Dᵀ and B = U (FORMATS.md §8)."""
    d, u = torch.randn(4, 3), torch.randn(5, 2)  # D (a2, a1), U (b1, b2)
    expected = torch.einsum("xy,zw->xwzy", u, d).reshape(15, 8)
    w = KronTerms(d.mT[None], u[None], rows="shuffled")
    torch.testing.assert_close(w.dense(), expected)
    x = torch.randn(2, 8)
    torch.testing.assert_close(w.apply(x), x @ expected.mT)


def test_scaling_multiplies_the_delta_and_widens_half_precision():
    w = as_lora(torch.randn(4, 2).half(), torch.randn(2, 4).half())
    torch.testing.assert_close(w.scaled(-0.5).dense(), -0.5 * w.dense())


@pytest.mark.parametrize("rows", ["kron", "shuffled"])
def test_factors_of_different_types_multiply_in_the_widest(rows):
    """A scale folded into A makes it float32 beside a bfloat16 B; files mix types within a product too."""
    up, down = torch.randn(2, 3, 2).double(), torch.randn(2, 2, 4).half()
    terms = KronTerms(torch.randn(2, 2, 5).bfloat16(), LowRank(up, down), rows)
    exact = KronTerms(terms.left.double(), LowRank(up, down.double()), rows)
    assert torch.equal(terms.dense(), exact.dense())
    x = torch.randn(7, 20).bfloat16()
    torch.testing.assert_close(terms.apply(x), x.double() @ exact.dense().mT)
