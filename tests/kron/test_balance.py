"""Powers of two move between factors so that float16 holds them; the sum does not change by a single bit."""

import pytest
import torch

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.errors import NonFiniteError
from krona_hub.formats.writing.encode import cast
from krona_hub.kron.balance import balanced, loses_values
from krona_hub.kron.terms import KronTerms, LowRank, as_lora


def random(*shape, size=1.0, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * size


def uneven(left_low, right_low, left_size, right_size):
    """Two terms; the numbers of each side are of the given size, with products on request."""

    def factor(p, q, rank, size, seed):
        if rank is None:
            return random(2, p, q, size=size, seed=seed)
        return LowRank(random(2, p, rank, size=size, seed=seed), random(2, rank, q, size=size, seed=seed + 1))

    return KronTerms(factor(4, 3, left_low, left_size, 1), factor(5, 6, right_low, right_size, 3))


def error(found, exact):
    dense = exact.map(torch.Tensor.double).dense()
    return float((found.map(torch.Tensor.double).dense() - dense).norm() / dense.norm())


@pytest.mark.parametrize("left_low", [None, 2])
@pytest.mark.parametrize("right_low", [None, 3])
@pytest.mark.parametrize(("left_size", "right_size"), [(1.0, 1e-5), (1e-6, 1e3), (1e5, 1e-3)])
def test_a_cast_to_float16_rounds_once_where_numbers_of_equal_size_would_fit(
    left_low, right_low, left_size, right_size
):
    terms = uneven(left_low, right_low, left_size, right_size)
    delta = LayerDelta((terms,), terms.shape.full)
    assert loses_values(terms, terms.to(torch.float16))
    assert torch.equal(balanced(terms).map(torch.Tensor.double).dense(), terms.map(torch.Tensor.double).dense())
    assert error(cast(delta, torch.float16).sums[0], terms) < 2 * torch.finfo(torch.float16).eps


def test_factors_in_the_range_keep_their_numbers():
    terms = uneven(2, 3, 1.0, 1e-2)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        small = cast(LayerDelta((terms,), terms.shape.full), dtype).sums[0]
        assert all(torch.equal(s, t.to(dtype)) for s, t in zip(small.tensors, terms.tensors, strict=True))


def test_a_tiny_component_of_a_lora_survives_beside_large_ones():
    """Its column of up would vanish in float16, although its product is as large as those of the others."""
    up, down = random(7, 3), random(3, 11, seed=1)
    up[:, 1] *= 2.0**-26
    down[1] *= 2.0**12
    lora = as_lora(up, down * 2.0**-2)
    small = cast(LayerDelta((lora,), (7, 11)), torch.float16).sums[0]
    only = as_lora(up[:, 1:2], down[1:2] * 2.0**-2)
    kept = as_lora(small.right.up[0][:, 1:2], small.right.down[0][1:2])
    assert error(kept, only) < 1e-3
    assert float(small.left) == 1.0  # most formats do not store it


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_number_that_no_balance_fits_is_refused(dtype):
    largest = 3.4e38
    terms = KronTerms(torch.full((1, 2, 3), largest), torch.full((1, 4, 2), largest))
    with pytest.raises(NonFiniteError, match="overflows"):
        cast(LayerDelta((terms,), terms.shape.full), dtype)


def test_zeros_and_empty_sums_stay_as_they_are():
    zero = KronTerms(torch.zeros(1, 2, 2), torch.full((1, 3, 2), 1e-7))
    assert torch.equal(balanced(zero).right, zero.right)
    empty = KronTerms(torch.zeros(0, 2, 2), torch.zeros(0, 3, 2))
    assert balanced(empty) is empty
    assert not loses_values(empty, empty.to(torch.float16))
