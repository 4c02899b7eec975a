"""Deltas as products through their narrowest middle."""

import pytest
import torch

from krona_hub.kron.hadamard import Hadamard
from krona_hub.kron.terms import KronTerms, LowRank, as_lora
from krona_hub.kron.weighted.middle import middle_of


def rand(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


SUMS = {
    "LoRA": ([as_lora(rand(12, 3), rand(3, 20))], 3),
    "one term, narrow through B": ([KronTerms(rand(1, 2, 2), rand(1, 6, 10))], 12),
    "one term, narrow through A": ([KronTerms(rand(1, 6, 2), rand(1, 2, 10))], 4),
    "column and row, two terms": ([KronTerms(rand(2, 12, 1), rand(2, 1, 20))], 2),
    "low-rank B": ([KronTerms(rand(1, 2, 2), LowRank(rand(1, 6, 2), rand(1, 2, 10)))], 4),
    "low-rank A": ([KronTerms(LowRank(rand(1, 6, 1), rand(1, 1, 10)), rand(1, 2, 2))], 2),
    "both low-rank": ([KronTerms(LowRank(rand(1, 4, 2), rand(1, 2, 5)), LowRank(rand(1, 3, 1), rand(1, 1, 4)))], 2),
    "two sums": ([as_lora(rand(12, 3), rand(3, 20)), KronTerms(rand(1, 12, 1), rand(1, 1, 20))], 4),
    "more terms than rows": ([KronTerms(rand(9, 3, 4), rand(9, 4, 5))], 12),
    "shuffled rows": ([KronTerms(rand(1, 3, 4), rand(1, 4, 5), "shuffled")], 12),
    "LoHa": ([KronTerms(torch.ones(1, 1, 1), Hadamard(*(LowRank(rand(1, 12, 1), rand(1, 1, 20)),) * 2))], 1),
    "nothing": ([], 12),
}


@pytest.mark.parametrize("name", SUMS)
def test_the_product_is_the_delta(name):
    sums, inner = SUMS[name]
    up, down = middle_of(sums, (12, 20))
    assert up.shape == (12, inner) and down.shape == (inner, 20)
    dense = sum((s.dense().double() for s in sums), torch.zeros(12, 20, dtype=torch.float64))
    assert torch.allclose(up.double() @ down.double(), dense, atol=1e-5)


@pytest.mark.parametrize("name", SUMS)
def test_a_transposed_delta_has_the_same_width(name):
    sums, inner = SUMS[name]
    if name in ("shuffled rows", "nothing", "LoHa"):
        return
    flipped = [
        KronTerms(*(f.transposed() if isinstance(f, LowRank) else f.mT for f in (s.left, s.right))) for s in sums
    ]
    up, down = middle_of(flipped, (20, 12))
    assert up.shape[1] == inner
    dense = sum(s.dense().double() for s in sums)
    assert torch.allclose((up.double() @ down.double()).mT, dense, atol=1e-5)


def test_a_lora_keeps_its_own_factors():
    up, down = rand(12, 3), rand(3, 20)
    middle = middle_of([as_lora(up, down)], (12, 20))
    assert torch.equal(middle.up, up) and torch.equal(middle.down, down)


def test_a_wide_delta_goes_through_its_shorter_side():
    for size in ((6, 30), (30, 6)):
        up, _ = middle_of([as_lora(rand(size[0], 9), rand(9, size[1]))], size)
        assert up.shape[1] == 6
