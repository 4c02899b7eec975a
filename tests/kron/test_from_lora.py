"""nearest_kron_of_lora against the dense SVD of R(ΔW), for each of its three methods."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krona_hub.errors import ShapeError
from krona_hub.kron import krylov
from krona_hub.kron.from_lora import nearest_kron_of_lora, nearest_kron_of_loras
from krona_hub.kron.rearrangement import LoraSvd, Rearranged
from krona_hub.kron.shapes import KronShape
from krona_hub.kron.terms import KronTerms, as_lora, nearest_kron, rearrange

sizes = st.integers(1, 6)
shapes = st.builds(KronShape, sizes, sizes, sizes, sizes)
WAYS = {"svd": (10**9, (4, 20)), "krylov": (0, (10**9, 20)), "gram": (0, (0, 10**9))}  # SMALL, FEW


@pytest.fixture(params=WAYS)
def way(request, monkeypatch):
    small, few = WAYS[request.param]
    monkeypatch.setattr(krylov, "SMALL", small)
    monkeypatch.setattr(krylov, "FEW", few)
    return request.param


def random_lora(shape, rank, seed=0, n=1):
    generator = torch.Generator().manual_seed(seed)
    out, in_ = shape.full
    ups = torch.randn(n, out, rank, generator=generator, dtype=torch.float64)
    return ups, torch.randn(n, rank, in_, generator=generator, dtype=torch.float64)


def planted_lora(terms: KronTerms, noise: float = 0.0):
    """The exact LoRA of a Kronecker sum, by the SVD of ΔW."""
    u, s, vh = torch.linalg.svd(terms.dense().double(), full_matrices=False)
    rank = int((s > 1e-13 * s[0]).sum())
    return u[:, :rank] * s[:rank], vh[:rank]


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(1, 7), st.integers(0, 999))
def test_every_number_of_terms_equals_the_dense_oracle(shape, rank, seed):
    ups, downs = random_lora(shape, rank, seed)
    up, down = ups[0], downs[0]
    w = up @ down
    for terms in range(1, shape.max_terms + 1):
        fit, dense = nearest_kron_of_lora(up, down, shape, terms), nearest_kron(w, shape, terms)
        assert fit.relative_error == pytest.approx(dense.relative_error, rel=1e-6, abs=1e-13)
        torch.testing.assert_close(fit.terms.dense(), dense.terms.dense(), atol=1e-7 * float(w.norm()), rtol=1e-7)


@pytest.mark.parametrize("terms", [1, 3])
def test_error_and_singular_values_equal_a_dense_reference(way, terms):
    shape, n = KronShape(8, 4, 6, 10), 3
    ups, downs = random_lora(shape, 5, n=n)
    for up, down, fit in zip(ups, downs, nearest_kron_of_loras(ups, downs, shape, terms), strict=True):
        sigma = torch.linalg.svdvals(rearrange(up @ down, shape))
        torch.testing.assert_close(fit.terms.left.flatten(1).norm(dim=1) ** 2, sigma[:terms], rtol=1e-6, atol=0)
        torch.testing.assert_close(fit.terms.right.flatten(1).norm(dim=1) ** 2, sigma[:terms], rtol=1e-6, atol=0)
        true = (up @ down - fit.terms.dense()).norm() / (up @ down).norm()
        assert fit.relative_error == pytest.approx(float(true), rel=1e-9)
        assert fit.relative_error == pytest.approx(float(sigma[terms:].norm() / sigma.norm()), rel=1e-6)


@pytest.mark.parametrize("size", [1e-3, 1e-6, 1e-9, 1e-12])
def test_small_errors_are_reported_as_they_are(way, size):
    """A planted product with a second one `size` times as large: the error is `size`, far below √eps too."""
    shape, generator = KronShape(8, 4, 6, 10), torch.Generator().manual_seed(1)

    def thin(p, q, generator=generator):
        return torch.outer(torch.randn(p, generator=generator), torch.randn(q, generator=generator)).double()

    a, b = torch.stack([thin(8, 4), thin(8, 4)]), torch.stack([thin(6, 10), thin(6, 10)])
    a, b = (torch.linalg.qr(x.flatten(1).mT).Q.mT.reshape(x.shape) for x in (a, b))
    w = KronTerms(a * torch.tensor([1.0, size])[:, None, None], b)
    up = torch.cat([torch.kron(x, y) for x, y in zip(w.left, w.right, strict=True)], dim=1)
    down = torch.cat([torch.eye(40).double()] * 2)
    fit = nearest_kron_of_lora(up, down, shape)
    assert fit.relative_error == pytest.approx(size, rel=1e-3, abs=1e-15)


def test_values_that_coincide_are_all_found(way):
    """R is a multiple of a projection: every singular value is the same, and a Krylov space closes at once."""
    left = torch.eye(12, dtype=torch.float64)[:4].reshape(4, 4, 3)
    right = torch.eye(20, dtype=torch.float64)[:4].reshape(4, 5, 4)
    w = KronTerms(left, right)
    for terms in (1, 2, 4):
        fit = nearest_kron_of_lora(*planted_lora(w), w.shape, terms)
        assert fit.relative_error == pytest.approx((1 - terms / 4) ** 0.5, abs=1e-12)


def test_values_far_apart_keep_their_digits(way):
    generator = torch.Generator().manual_seed(3)
    left = torch.linalg.qr(torch.randn(32, 3, generator=generator).double()).Q.mT.reshape(3, 8, 4)
    right = torch.linalg.qr(torch.randn(60, 3, generator=generator).double()).Q.mT.reshape(3, 6, 10)
    w = KronTerms(left * torch.tensor([1.0, 1e-5, 1e-9])[:, None, None].double(), right)
    for terms, error in ((1, 1e-5), (2, 1e-9), (3, 0.0)):
        fit = nearest_kron_of_lora(*planted_lora(w), w.shape, terms)
        assert fit.relative_error == pytest.approx(error, rel=1e-4, abs=1e-14)


def test_layers_in_a_batch_do_not_touch_each_other(way):
    shape = KronShape(4, 6, 9, 3)
    ups, downs = random_lora(shape, 4, n=5)
    ups[1] *= 1e-6
    ups[2] = 0
    ups[3, :, 1:] = 0
    for up, down, fit in zip(ups, downs, nearest_kron_of_loras(ups, downs, shape, 2), strict=True):
        alone = nearest_kron_of_lora(up, down, shape, 2)
        assert fit.relative_error == pytest.approx(alone.relative_error, rel=1e-9, abs=1e-14)
        torch.testing.assert_close(
            fit.terms.dense(), alone.terms.dense(), atol=1e-6 * float((up @ down).norm()), rtol=0
        )


def test_a_zero_delta_has_zero_error(way):
    fit = nearest_kron_of_lora(torch.zeros(12, 3), torch.randn(3, 8), (3, 4), 2)
    assert fit.relative_error == 0.0
    assert fit.terms.dense().abs().max() == 0


def test_a_rank_above_the_size_of_the_layer_is_no_obstacle():
    up, down = torch.randn(6, 40).double(), torch.randn(40, 10).double()
    expected = nearest_kron(up @ down, (3, 5), 2).relative_error
    assert nearest_kron_of_lora(up, down, (3, 5), 2).relative_error == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_results_are_float32_at_least(dtype):
    fit = nearest_kron_of_lora(torch.ones(4, 2, dtype=dtype), torch.ones(2, 6, dtype=dtype), (2, 2))
    assert fit.terms.left.dtype == fit.terms.right.dtype == torch.float32


@settings(deadline=None, max_examples=40)
@given(shapes, st.integers(1, 7), st.integers(1, 3), st.integers(0, 99))
def test_the_operator_is_the_rearranged_matrix(shape, rank, n, seed):
    """Products, transposed products, Gram matrix and blocks are those of R, in rotated coordinates."""
    ups, downs = random_lora(shape, rank, seed, n)
    op = Rearranged.of(LoraSvd.of(ups, downs), shape)
    dense = op.dense()
    for one, up, down in zip(dense, ups, downs, strict=True):
        exact = torch.linalg.svdvals(rearrange(up @ down, shape))
        mine = torch.linalg.svdvals(one)
        torch.testing.assert_close(mine, exact[: len(mine)])
    x, y = torch.randn(n, 2, op.shape[1]).double(), torch.randn(n, 2, op.shape[0]).double()
    torch.testing.assert_close(op.matmul(x), x @ dense.mT)
    torch.testing.assert_close(op.T.matmul(y), y @ dense)
    torch.testing.assert_close(op.gram(), dense @ dense.mT)


def test_sizes_that_do_not_fit_say_what_does():
    with pytest.raises(ShapeError, match="Choose 4x2, the nearest shape that does"):
        nearest_kron_of_lora(torch.ones(4, 1), torch.ones(1, 6), (3, 2))
    with pytest.raises(ShapeError, match=r"holds 1 to 4"):
        nearest_kron_of_lora(torch.ones(4, 1), torch.ones(1, 6), (2, 2), terms=5)
    with pytest.raises(ShapeError, match="equal r"):
        nearest_kron_of_lora(torch.ones(4, 1), torch.ones(2, 6), (2, 2))


def test_a_lora_seen_as_columns_and_rows_keeps_its_rank():
    up, down = torch.randn(12, 3).double(), torch.randn(3, 8).double()
    fit = nearest_kron_of_lora(up, down, KronShape(12, 1, 1, 8), 3)
    torch.testing.assert_close(fit.terms.dense(), as_lora(up, down).dense())
    assert fit.relative_error < 1e-14
