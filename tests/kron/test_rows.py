"""Rows of a Kronecker sum, against the rows of the dense matrix."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krona_hub.errors import ShapeError, UnsupportedError
from krona_hub.kron.rows import among_rows, at_rows, nonzero_terms, take_rows, transposed
from krona_hub.kron.terms import KronTerms, LowRank, as_lora

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


@pytest.mark.parametrize("job", [lambda t: take_rows(t, [(0, 3)]), transposed])
def test_interleaved_rows_that_are_no_whole_groups_are_refused(job):
    with pytest.raises(UnsupportedError):
        job(KronTerms(torch.rand(1, 2, 2), torch.rand(1, 3, 3), rows="shuffled"))


def test_whole_groups_of_interleaved_rows_are_taken_as_they_are():
    terms = KronTerms(torch.rand(2, 3, 2), torch.rand(2, 4, 5), rows="shuffled")
    part = take_rows(terms, [(9, 12), (0, 6)])
    dense = terms.dense()
    assert part.terms == 2 and torch.equal(part.dense(), torch.cat([dense[9:12], dense[:6]]))


@pytest.mark.parametrize("rows", ["kron", "shuffled"])
@pytest.mark.parametrize("low_rank", [False, True])
def test_rows_among_others_stand_where_they_should_and_come_back(rows, low_rank):
    left = LowRank(torch.rand(2, 3, 1), torch.rand(2, 1, 2)) if low_rank else torch.rand(2, 3, 2)
    right = LowRank(torch.rand(2, 4, 2), torch.rand(2, 2, 5)) if low_rank else torch.rand(2, 4, 5)
    terms = KronTerms(left, right, rows)
    tall = among_rows(terms, 24, 36)
    assert torch.allclose(tall.dense()[24:], terms.dense()) and not tall.dense()[:24].any()
    back = take_rows(tall, [(24, 36)])
    assert all(torch.equal(a, b) for a, b in zip(back.tensors, terms.tensors, strict=True))


@settings(deadline=None)
@given(sums(), st.sampled_from(["kron", "shuffled"]), st.integers(0, 20), st.integers(0, 20))
def test_rows_placed_anywhere_are_taken_back_and_all_others_are_zero(terms, rows, above, below):
    terms = replace(terms, rows=rows)
    out, height = terms.shape.full[0], above + terms.shape.full[0] + below
    tall = among_rows(terms, above, height)
    wanted = torch.zeros(height, terms.shape.full[1]).double()
    wanted[above : above + out] = terms.dense()
    assert torch.allclose(tall.dense(), wanted)
    assert torch.allclose(take_rows(tall, [(above, above + out)]).dense(), terms.dense())


def test_rows_at_multiples_of_the_right_factor_and_those_of_a_lora_need_no_further_terms():
    terms = KronTerms(torch.rand(1, 64, 4), torch.rand(1, 96, 2))  # q of the unequal q, k, v of Krea 2
    tall = among_rows(terms, 0, 9216)
    assert tall.terms == 1 and torch.equal(tall.right, terms.right)
    lora = among_rows(as_lora(torch.rand(1536, 2), torch.rand(2, 8)), 6144, 9216)
    assert (lora.terms, lora.right.rank, lora.shape.a1) == (1, 2, 6)
    assert among_rows(as_lora(torch.rand(6144, 2), torch.rand(2, 8)), 0, 9216).parameters == 1 + 2 * (9216 + 8)


@pytest.mark.parametrize(("first", "height"), [(-1, 36), (6, 17)])
def test_rows_beyond_the_matrix_are_refused(first, height):
    with pytest.raises(ShapeError, match="do not fit"):
        among_rows(KronTerms(torch.rand(1, 3, 2), torch.rand(1, 4, 5)), first, height)


@settings(deadline=None)
@given(sums(), st.integers(1, 3), st.data(), st.booleans())
def test_rows_are_embedded_among_zeros_and_taken_out_again(terms, shares, data, shuffled):
    terms = KronTerms(terms.left, terms.right, "shuffled" if shuffled else "kron")
    out, own = terms.shape.full[0], data.draw(st.integers(0, shares - 1))
    tall = at_rows(terms, own * out, shares * out)
    wanted = torch.zeros(shares * out, terms.shape.full[1]).double()
    wanted[own * out : (own + 1) * out] = terms.dense()
    assert torch.allclose(tall.dense(), wanted) and tall.terms == terms.terms
    assert torch.allclose(take_rows(tall, [(own * out, (own + 1) * out)]).dense(), terms.dense())
    assert (tall.shape[:2] == (1, 1)) == (terms.shape[:2] == (1, 1))  # a LoRA stays one


@settings(deadline=None)
@given(sums(), st.data())
def test_terms_of_zeros_are_left_out(terms, data):
    kept = torch.tensor(data.draw(st.lists(st.booleans(), min_size=terms.terms, max_size=terms.terms)))
    scale = kept.double()[:, None, None]
    left = terms.left.map_up(scale.mul) if isinstance(terms.left, LowRank) else terms.left * scale
    partly = KronTerms(left, terms.right)
    found = nonzero_terms(partly)
    assert found.terms == int(kept.sum())
    assert torch.allclose(found.dense(), partly.dense()) if found.terms else not partly.dense().any()
