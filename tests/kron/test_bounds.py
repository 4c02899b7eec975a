"""No bound of the search may be below the energy that a shape retains."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krona_hub.kron.best_first import probe, sketch
from krona_hub.kron.bounds import Bounds, fourth_moment, largest_sums
from krona_hub.kron.candidates import most_right_rank
from krona_hub.kron.rearrangement import LoraSvd, Rearranged
from krona_hub.kron.shapes import choices
from krona_hub.kron.terms import rearrange
from tests.kron.test_factorization_search import SIZES, lora_layer

layers = st.builds(
    lora_layer,
    st.sampled_from([s for s in SIZES if min(s) > 1 and s != (7, 11)]),  # which only the trivial shapes divide
    st.integers(1, 6),
    st.integers(0, 999),
)


def unit_layer(pair):
    """Return a layer of norm 1, dense and as the input of the search."""
    up, down = pair
    w = up @ down
    lora = LoraSvd.of(up[None] / w.norm(), down[None])
    return w / w.norm(), lora


@settings(deadline=None, max_examples=40)
@given(layers, st.data())
def test_terms_keep_no_more_than_any_bound_says(pair, data):
    w, lora = unit_layer(pair)
    shape = data.draw(st.sampled_from(list(choices(*w.shape))))
    kept = torch.linalg.svdvals(rearrange(w, shape)).square().cumsum(0)
    bounds, first = Bounds(lora), torch.tensor([0])
    assert (bounds.kept_by_terms(shape, shape.max_terms, first)[0] >= kept - 1e-12).all()
    assert (bounds.kept_by_moment(shape, shape.max_terms, first)[0] >= kept - 1e-12).all()
    op = Rearranged.of(lora, shape)
    assert (probe(op, shape, shape.max_terms)[0][0] >= kept - 1e-12).all()
    assert (sketch(op, 2)[0] >= kept[:2] - 1e-12)[: min(2, len(kept))].all() or min(op.shape) < 2


@settings(deadline=None, max_examples=40)
@given(layers, st.data())
def test_low_rank_factors_lose_no_less_than_any_bound_says(pair, data):
    w, lora = unit_layer(pair)
    shape = data.draw(st.sampled_from([s for s in choices(*w.shape) if most_right_rank(s)]))
    _, s, vh = torch.linalg.svd(rearrange(w, shape), full_matrices=False)
    parts = torch.linalg.svdvals(vh.reshape(-1, shape.b1, shape.b2)).square() * s[:, None] ** 2
    left = Bounds(lora).left_by_ranks(shape, shape.max_terms * min(shape.b1, shape.b2), torch.tensor([0]))[0]
    lost = probe(Rearranged.of(lora, shape), shape, shape.max_terms)[1][0]
    for terms in range(1, len(s) + 1):
        for rank in range(1, min(most_right_rank(shape), shape.b1, shape.b2) + 1):
            assert 1 - parts[:terms, :rank].sum() >= left[terms * rank - 1] - 1e-12
            if rank <= lost.shape[1]:
                true = parts[: min(terms, len(lost)), rank:].sum()
                assert true >= lost[min(terms, len(lost)) - 1, rank - 1] - 1e-9


@settings(deadline=None, max_examples=30)
@given(layers, st.data())
def test_the_fourth_moment_is_the_sum_of_the_fourth_powers(pair, data):
    w, lora = unit_layer(pair)
    shape = data.draw(st.sampled_from(list(choices(*w.shape))))
    left = fourth_moment(lora.u.mT * lora.s[..., None], shape.a1)
    sum_of_powers = (left * fourth_moment(lora.vh, shape.a2)).sum()
    torch.testing.assert_close(sum_of_powers, torch.linalg.svdvals(rearrange(w, shape)).pow(4).sum())


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6).filter(lambda v: sum(v) > 1e-3))
def test_the_largest_values_add_up_to_no_more_than_their_moments_allow(values):
    values = torch.tensor(sorted(values, reverse=True), dtype=torch.float64)
    values = values / values.sum()
    bound = largest_sums(values.square().sum()[None], len(values), len(values))[0]
    assert (bound >= values.cumsum(0) - 1e-9).all()
