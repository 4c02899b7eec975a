"""Rows of a Kronecker sum, against the rows of the dense matrix."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krona_hub.errors import UnsupportedError
from krona_hub.kron.rows import take_rows, transposed
from krona_hub.kron.terms import KronTerms, LowRank

SMALL = st.integers(1, 4)


@st.composite
def sums(draw):
    terms, a1, a2, b1, b2, rank = (draw(SMALL) for _ in range(6))
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def numbers(p, q):
        return torch.randn(terms, p, q, generator=random).double()

    def factor(p, q):
        if draw(st.booleans()):
            return LowRank(numbers(p, rank), numbers(rank, q))
        return numbers(p, q)

    return KronTerms(factor(a1, a2), factor(b1, b2))


@settings(deadline=None)
@given(sums(), st.data())
def test_taken_rows_are_the_rows_of_the_dense_matrix_in_the_order_asked_for(terms, data):
    height = terms.shape.full[0]
    edges = st.tuples(st.integers(0, height), st.integers(0, height)).map(sorted).filter(lambda e: e[0] < e[1])
    ranges = data.draw(st.lists(edges, min_size=1, max_size=3))
    dense = terms.dense()
    wanted = torch.cat([dense[start:stop] for start, stop in ranges])
    assert torch.allclose(take_rows(terms, ranges).dense(), wanted)


@settings(deadline=None)
@given(sums())
def test_the_transpose_is_the_transpose_of_the_dense_matrix(terms):
    assert torch.allclose(transposed(terms).dense(), terms.dense().mT)


def test_a_range_of_whole_blocks_needs_no_further_terms():
    terms = KronTerms(torch.rand(1, 6, 2), torch.rand(1, 5, 3))
    part = take_rows(terms, [(10, 20)])
    assert part.terms == 1 and torch.equal(part.right, terms.right)


def test_a_cut_through_blocks_has_as_many_terms_as_the_formula_says():
    terms = KronTerms(torch.rand(1, 8, 8), torch.rand(1, 480, 160))  # FORMATS.md §13
    part = take_rows(terms, [(0, 1280)])
    assert (part.terms, tuple(part.shape)) == (3, (8, 8, 160, 160))


@pytest.mark.parametrize("job", [lambda t: take_rows(t, [(0, 2)]), transposed])
def test_interleaved_rows_are_refused(job):
    with pytest.raises(UnsupportedError):
        job(KronTerms(torch.rand(1, 2, 2), torch.rand(1, 3, 3), rows="shuffled"))
