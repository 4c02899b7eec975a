"""A term that was cut into row parts is put together again, and parts that are not one term never are."""

from functools import partial
from itertools import pairwise

import pytest
import torch

from krona_hub.kron.norms import recompress
from krona_hub.kron.row_stack import as_single_term
from krona_hub.kron.rows import take_rows
from krona_hub.kron.terms import KronTerms, LowRank

EQUAL = ((0, 8), (8, 16), (16, 24))
UNEQUAL = ((0, 16), (16, 20), (20, 24))
SHAPES = [(1, 3, 24, 4), (2, 3, 12, 4), (4, 3, 6, 4), (8, 2, 3, 5), (12, 5, 2, 3), (24, 2, 1, 6), (3, 1, 8, 7)]


def factor(p, q, rank, dtype, random):
    rand = partial(torch.randn, generator=random)
    if rank:
        return LowRank(rand(1, p, rank).to(dtype), rand(1, rank, q).to(dtype))
    return rand(1, p, q).to(dtype)


def term(shape, ranks=(0, 0), dtype=torch.float32, seed=0):
    a1, a2, b1, b2 = shape
    random = torch.Generator().manual_seed(seed)
    return KronTerms(factor(a1, a2, ranks[0], dtype, random), factor(b1, b2, ranks[1], dtype, random))


def cut(whole, ranges):
    return [(start, [take_rows(whole, [(start, stop)])]) for start, stop in ranges]


def relative(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def dense(s):
    return s.map(torch.Tensor.double).dense()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("ranges", [EQUAL, UNEQUAL])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_stored_numbers_come_back_from_any_shape_and_any_cut(shape, ranges, dtype):
    whole = term(shape, dtype=dtype)
    again = as_single_term(cut(whole, ranges), 24)
    assert again.shape == whole.shape
    assert torch.equal(again.left, whole.left) and torch.equal(again.right, whole.right)
    assert again.left.dtype == again.right.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [(1, 0), (0, 2), (2, 2), (1, 3)])
@pytest.mark.parametrize("ranges", [EQUAL, UNEQUAL])
def test_low_rank_factors_come_back_with_the_same_numbers(ranks, ranges, dtype):
    whole = term((4, 6, 6, 8), ranks, dtype)
    again = as_single_term(cut(whole, ranges), 24)
    assert again.shape == whole.shape
    assert all(torch.equal(a, b) for a, b in zip(again.tensors, whole.tensors, strict=True))


@pytest.mark.parametrize("seed", range(12))
def test_scaled_parts_stay_one_term_where_each_row_of_a_is_in_one_part(seed):
    random = torch.Generator().manual_seed(seed)
    b1 = [2, 4, 8][seed % 3]
    whole = term((24 // b1, 3, b1, 5), (seed % 2, 2 * (seed % 2)), seed=seed)
    scales = torch.rand(3, generator=random).tolist()
    ranges = [EQUAL, ((0, 16), (16, 24))][seed // 6]
    parts = [(first, [s.scaled(c) for s in sums]) for c, (first, sums) in zip(scales, cut(whole, ranges), strict=False)]
    again = as_single_term(parts, 24)
    wanted = torch.cat([dense(sums[0]) for _, sums in parts])
    assert again.shape == whole.shape and relative(dense(again), wanted) < 1e-6


def test_parts_scaled_alike_stay_one_term_where_rows_of_a_are_in_two_parts():
    whole = term((4, 3, 6, 4))
    parts = [(first, [s.scaled(0.3) for s in sums]) for first, sums in cut(whole, EQUAL)]
    again = as_single_term(parts, 24)
    assert torch.equal(again.left, whole.left * 0.3) and torch.equal(again.right, whole.right)
    parts[0] = (0, [parts[0][1][0].scaled(2)])
    assert as_single_term(parts, 24) is None


@pytest.mark.parametrize("seed", range(8))
def test_the_numbers_decide_and_not_the_terms_that_the_parts_are_stored_as(seed):
    shape = SHAPES[1 + seed % 5]
    whole = term(shape, dtype=torch.float64, seed=seed)
    parts = []
    for first, (s,) in cut(whole, EQUAL):
        other = recompress([s], s.shape, min(s.terms, s.shape.max_terms)).terms  # other terms, of equal sum
        parts.append((first, [other.to(torch.float32) if seed % 2 else other]))
    again = as_single_term(parts, 24)
    assert again.shape == whole.shape
    assert relative(dense(again), dense(whole)) < (1e-6 if seed % 2 else 1e-13)


def test_several_sums_per_part_are_added():
    whole = term((4, 3, 6, 4), dtype=torch.float64)
    parts = [(first, [s.scaled(0.25), s.scaled(0.75)]) for first, (s,) in cut(whole, EQUAL)]
    assert relative(dense(as_single_term(parts, 24)), dense(whole)) < 1e-13


def test_low_rank_parts_in_another_basis_come_back_with_the_lowest_rank():
    whole = term((4, 12, 6, 16), (1, 2), torch.float64)
    parts = cut(whole, EQUAL)
    turn = torch.linalg.qr(torch.randn(2, 2, generator=torch.Generator().manual_seed(1)).double()).Q
    s = parts[1][1][0]
    turned = KronTerms(s.left, LowRank(s.right.up @ turn, turn.mT @ s.right.down))
    again = as_single_term([parts[0], (8, [turned]), parts[2]], 24)
    assert again.right.rank == 2 and relative(dense(again), dense(whole)) < 1e-6


def test_missing_and_zero_parts_are_zero_rows():
    left = torch.randn(1, 12, 3, generator=torch.Generator().manual_seed(0))
    left[:, 4:8] = 0
    whole = KronTerms(left, torch.rand(1, 2, 4))
    parts = cut(whole, EQUAL)
    for given in (parts, [parts[0], parts[2]]):
        again = as_single_term(given, 24)
        assert torch.equal(again.left, whole.left) and torch.equal(again.right, whole.right)
    straddling = cut(term((4, 3, 6, 4)), EQUAL)  # row 1 of A is in q and in k, which is missing
    assert as_single_term([straddling[0], straddling[2]], 24) is None


def test_a_whole_of_zeros_is_one_term():
    whole = KronTerms(torch.zeros(1, 4, 3), torch.rand(1, 6, 4))
    again = as_single_term(cut(whole, EQUAL), 24)
    assert again.shape.full == (24, 12) and not again.dense().any()


@pytest.mark.parametrize("seed", range(6))
def test_terms_trained_apart_are_refused(seed):
    parts = [(first, [term((4, 3, 2, 4), (0, 2 * (seed % 2)), seed=10 * seed + first)]) for first in (0, 8, 16)]
    assert as_single_term(parts, 24) is None
    near = cut(term((4, 3, 6, 4)), EQUAL)
    s = near[2][1][0]
    near[2] = (16, [KronTerms(s.left, s.right * torch.linspace(1, 1 + 1e-4, 4))])
    assert as_single_term(near, 24) is None


def test_sums_with_other_columns_or_interleaved_rows_are_refused():
    one, other = term((4, 3, 2, 4)), term((4, 4, 2, 3))
    assert as_single_term([(0, [one]), (8, [other])], 16) is None
    assert as_single_term([(0, [KronTerms(one.left, one.right, "shuffled")])], 8) is None


@pytest.mark.parametrize("seed", range(20))
def test_random_shapes_heights_and_ranks_agree_with_the_dense_matrix(seed):
    random = torch.Generator().manual_seed(seed)

    def pick(*values):
        return values[int(torch.randint(len(values), (), generator=random))]

    b1 = pick(2, 3, 4, 6, 8, 12)
    height = b1 * pick(2, 3, 5, 10)
    edges = sorted({0, height, *(2 * int(n) for n in torch.randint(1, height // 2, (3,), generator=random))})
    whole = term((height // b1, pick(2, 3), b1, pick(2, 5)), (pick(0, 1), pick(0, 2)), seed=seed)
    again = as_single_term(cut(whole, list(pairwise(edges))), height)
    assert relative(dense(again), dense(whole)) < 1e-6
    assert again.parameters <= whole.parameters
