"""Norms, inner products and differences against the dense matrices."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krona_hub.errors import ShapeError
from krona_hub.kron import norms
from krona_hub.kron.shapes import KronShape, choices
from krona_hub.kron.terms import KronTerms, LowRank, as_lora, nearest_kron

SIZE = (12, 18)
WAYS = ("shape", "lora", "dense")


def random_sum(shape, terms, seed, rows="kron", ranks=(None, None), dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def factor(p, q, rank):
        if rank is None:
            return torch.randn(terms, p, q, generator=generator).to(dtype)
        up, down = torch.randn(terms, p, rank, generator=generator), torch.randn(terms, rank, q, generator=generator)
        return LowRank(up.to(dtype), down.to(dtype))

    return KronTerms(factor(shape.a1, shape.a2, ranks[0]), factor(shape.b1, shape.b2, ranks[1]), rows)


def dense(parts):
    """The oracle: ΔW in float64, from factors widened first."""

    def wide(f):
        return LowRank(f.up.double(), f.down.double()) if isinstance(f, LowRank) else f.double()

    return sum(KronTerms(wide(s.left), wide(s.right), s.rows).dense() for s in parts)


any_sum = st.builds(
    random_sum,
    st.sampled_from(list(choices(*SIZE))),
    st.integers(1, 3),
    st.integers(0, 999),
    st.sampled_from(["kron", "shuffled"]),
    st.tuples(st.sampled_from([None, 1, 2]), st.sampled_from([None, 1, 3])),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
)
deltas = st.lists(any_sum, min_size=1, max_size=3)


@settings(deadline=None)
@given(deltas, deltas)
def test_norm_inner_and_difference_equal_the_dense_ones(a, b):
    wa, wb = dense(a), dense(b)
    assert norms.norm(a) == pytest.approx(float(wa.norm()), rel=1e-12)
    assert norms.inner(a, b) == pytest.approx(float((wa * wb).sum()), abs=1e-11 * float(wa.norm() * wb.norm()))
    assert norms.relative_difference(a, b) == pytest.approx(float((wa - wb).norm() / wb.norm()), rel=1e-11)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("rows", ["kron", "shuffled"])
def test_each_way_gives_the_same_numbers(way, rows, monkeypatch):
    shape = KronShape(3, 6, 4, 3)
    a, b = ([random_sum(shape, 2, seed, rows, (None, 2))] for seed in (1, 2))
    monkeypatch.setattr(norms, "_cheapest", lambda _: way)
    monkeypatch.setattr(norms, "BLOCK", 50)  # several blocks of rows
    wa, wb = dense(a), dense(b)
    assert norms.norm(a) == pytest.approx(float(wa.norm()), rel=1e-12)
    assert norms.inner(a, b) == pytest.approx(float((wa * wb).sum()), rel=1e-11)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("size", [1e-6, 1e-10, 1e-12])
def test_a_difference_far_below_the_root_of_rounding_is_measured(way, size, monkeypatch):
    shape = KronShape(3, 6, 4, 3)
    whole = random_sum(shape, 2, 1, dtype=torch.float64)
    change = random_sum(shape, 1, 2, dtype=torch.float64).scaled(size)
    monkeypatch.setattr(norms, "_cheapest", lambda _: way)
    expected = float(dense([change]).norm() / dense([whole]).norm())
    assert norms.relative_difference([whole, change], [whole]) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize("way", WAYS)
def test_a_delta_does_not_differ_from_itself(way, monkeypatch):
    delta = [random_sum(KronShape(3, 6, 4, 3), 2, 1)]
    monkeypatch.setattr(norms, "_cheapest", lambda _: way)
    assert norms.relative_difference(delta, delta) < 1e-14


def test_a_lora_equals_its_terms_in_another_shape():
    up, down = torch.randn(12, 3).double(), torch.randn(3, 18).double()
    columns = KronTerms(up.mT[:, :, None], down[:, None, :])
    assert norms.relative_difference([as_lora(up, down)], [columns]) < 1e-14


def test_differences_from_zero():
    one, zero = random_sum(KronShape(3, 6, 4, 3), 1, 1), KronTerms(torch.zeros(1, 3, 6), torch.zeros(1, 4, 3))
    assert norms.relative_difference([zero], [zero]) == 0.0
    assert norms.relative_difference([one], [zero]) == float("inf")
    assert norms.relative_difference([zero], [one]) == pytest.approx(1.0)
    assert norms.norm([]) == 0.0


def test_tiny_numbers_are_not_squared_away():
    one = random_sum(KronShape(3, 6, 4, 3), 2, 1, dtype=torch.float64)
    assert norms.norm([one.scaled(1e-170)]) == pytest.approx(1e-170 * norms.norm([one]), rel=1e-9)


def test_parts_of_different_sizes_are_refused():
    with pytest.raises(ShapeError, match="sums must have one size"):
        norms.norm([random_sum(KronShape(3, 6, 4, 3), 1, 1), random_sum(KronShape(3, 6, 4, 4), 1, 1)])


def test_scaling_is_linear():
    delta = [random_sum(KronShape(3, 6, 4, 3), 2, 1), random_sum(KronShape(1, 1, 12, 18), 1, 2, ranks=(None, 3))]
    assert norms.relative_difference([*norms.scaled(delta, 1.5), *norms.scaled(delta, -0.5)], delta) < 1e-6


@pytest.mark.parametrize(("rows", "ranks"), list(product(["kron", "shuffled"], [(None, None), (None, 2)])))
def test_recompression_is_the_nearest_sum(rows, ranks):
    shape = KronShape(3, 6, 4, 3)
    delta = [random_sum(shape, 2, 1, rows, ranks), random_sum(shape, 3, 2, rows)]
    fit = norms.recompress(delta, shape, 2)
    whole = dense(delta)
    assert fit.terms.rows == rows
    assert fit.relative_error == pytest.approx(float((fit.terms.dense() - whole).norm() / whole.norm()), rel=1e-5)
    if rows == "kron":
        assert fit.relative_error == pytest.approx(nearest_kron(whole, shape, 2).relative_error, rel=1e-9)


def test_recompression_of_mixed_shapes_equals_the_dense_fit():
    thick = [random_sum(KronShape(3, 6, 4, 3), 2, 1), random_sum(KronShape(6, 2, 2, 9), 1, 2, "shuffled")]
    thin = [random_sum(KronShape(1, 1, 12, 18), 1, 3, ranks=(None, 2)), random_sum(KronShape(12, 1, 1, 18), 1, 4)]
    for delta in (thick, thin):
        fit = norms.recompress(delta, (4, 3), 2)
        assert fit.relative_error == pytest.approx(nearest_kron(dense(delta), (4, 3), 2).relative_error, rel=1e-9)
