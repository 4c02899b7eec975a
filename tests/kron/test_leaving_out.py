"""A budget may leave layers out: against all combinations of ranks, 0 among them, of small layers."""

from itertools import pairwise, product
from math import sqrt

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krona_hub.errors import UsageError
from krona_hub.kron.allocation import Point, spend
from krona_hub.kron.candidates import nothing
from krona_hub.kron.factorization_search import smallest_lora_error, within_budget
from tests.kron.test_factorization_search import lora_layer

SIZES = [(6, 8), (12, 18), (7, 12), (16, 24)]
layer = st.tuples(st.sampled_from(SIZES), st.integers(1, 3), st.integers(0, 999), st.sampled_from([1.0, 0.3, 0.05]))


def made(size, rank, seed, loudness):
    up, down = lora_layer(size, rank, seed)
    return loudness * up, down


def only_loras(shape, terms, right_rank):
    return shape[:2] == (1, 1) and terms == 1 and right_rank is not None


def tails(up, down):
    """Squared error of rank 0, 1, … of a LoRA."""
    squares = torch.linalg.svdvals(up @ down)[: up.shape[1]].square().flip(0)
    return [*squares.cumsum(0).flip(0).tolist(), 0.0]


def size_of(layer):
    return layer[0].shape[0] + layer[1].shape[1]


def best_of_all(layers, budget):
    """The smallest squared error of all combinations of ranks within the budget."""
    losses = [tails(*layer) for layer in layers]
    ranks = product(*(range(len(loss)) for loss in losses))
    fitting = (r for r in ranks if sum(k * size_of(x) for k, x in zip(r, layers, strict=True)) <= budget)
    return min(sum(loss[k] for k, loss in zip(r, losses, strict=True)) for r in fitting)


def split_step(layers, budget):
    """The gain of the step, largest gain per parameter first, that no longer fits: what greed can lose at most."""
    steps = []
    for x in layers:
        loss = tails(*x)
        steps += [((a - b) / size_of(x), size_of(x), a - b) for a, b in pairwise(loss)]
    for _, size, saved in sorted(steps, reverse=True):
        if size > budget:
            return saved
        budget -= size
    return 0.0


def lost(layers, forms):
    return sum(f.relative_error**2 * tails(*x)[0] for x, f in zip(layers, forms, strict=True))


def chosen(layers, budget, **options):
    return [choice.form for choice in within_budget(layers, budget, **options)]


@settings(deadline=None, max_examples=40)
@given(st.lists(layer, min_size=1, max_size=4), st.floats(0.0, 1.0))
def test_the_error_is_that_of_all_combinations_of_ranks_up_to_one_step(specs, share):
    layers = [made(*spec) for spec in specs]
    least = min(map(size_of, layers))
    budget = least + int(share * (sum(size_of(x) * x[0].shape[1] for x in layers) - least))
    forms = chosen(layers, budget, allowed=only_loras)
    whole = sum(tails(*x)[0] for x in layers)
    best = best_of_all(layers, budget)
    assert 0 < sum(f.parameters for f in forms) <= budget
    assert best - 1e-9 * whole <= lost(layers, forms) <= best + split_step(layers, budget) + 1e-9 * whole
    values = [torch.linalg.svdvals(u @ d)[: u.shape[1]] for u, d in layers]
    baseline = smallest_lora_error(values, [(u.shape[0], d.shape[1]) for u, d in layers], budget)
    assert baseline == pytest.approx(sqrt(lost(layers, forms) / whole), abs=1e-6)


@settings(deadline=None, max_examples=15)
@given(st.lists(layer, min_size=2, max_size=4), st.floats(0.1, 1.0))
def test_kronecker_shapes_never_make_it_worse_than_the_best_cut(specs, share):
    layers = [made(*spec) for spec in specs]
    budget = max(min(map(size_of, layers)), int(share * sum(size_of(x) * x[0].shape[1] for x in layers)))
    forms, plain = chosen(layers, budget), chosen(layers, budget, allowed=only_loras)
    assert sum(f.parameters for f in forms) <= budget
    assert lost(layers, forms) <= lost(layers, plain) * (1 + 1e-9) + 1e-18


@settings(deadline=None, max_examples=15)
@given(st.lists(layer, min_size=1, max_size=4))
def test_more_parameters_never_lose_more(specs):
    layers = [made(*spec) for spec in specs]
    least, most = min(map(size_of, layers)), sum(size_of(x) * x[0].shape[1] for x in layers)
    budgets = sorted({least + (most - least) * i // 6 for i in range(7)})
    losses = [lost(layers, chosen(layers, budget, allowed=only_loras)) for budget in budgets]
    assert all(b <= a * (1 + 1e-9) for a, b in pairwise(losses))
    assert losses[-1] <= 1e-20 * sum(tails(*x)[0] for x in layers)


def test_more_parameters_lose_less_with_all_shapes():
    layers = [made((16, 24), 4, seed, 0.5**seed) for seed in range(5)]
    losses = [lost(layers, chosen(layers, budget)) for budget in (40, 80, 160, 320, 640, 800)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-20


def test_a_budget_of_the_size_of_the_source_leaves_nothing_out():
    layers = [made((16, 24), 3, 0, 1.0), made((12, 18), 3, 1, 1e-3), made((20, 20), 2, 2, 1e-6)]
    forms = chosen(layers, sum(size_of(x) * x[0].shape[1] for x in layers))
    assert [f.is_lora and f.right_rank for f in forms] == [3, 3, 2]


def test_a_required_layer_stays_however_little_it_gains():
    layers = [made((16, 24), 3, 0, 1.0), made((16, 24), 3, 1, 1e-3)]
    free = chosen(layers, 80, allowed=only_loras)
    kept = chosen(layers, 80, allowed=only_loras, required={1})
    assert [f.parameters for f in free] == [80, 0] and [f.parameters for f in kept] == [40, 40]
    with pytest.raises(UsageError, match=r"2 layers that cannot be left out\. Choose at least 80, the size of their"):
        chosen(layers, 79, allowed=only_loras, required={0, 1})
    with pytest.raises(
        UsageError, match=r"1 layer that cannot be left out\. Choose at least 40, the size of the smallest"
    ):
        chosen(layers, 39, allowed=only_loras, required={1})


def test_zero_layers_are_left_out_first_but_never_all_layers():
    zero, other = (torch.zeros(16, 2), torch.randn(2, 24)), made((16, 24), 2, 0, 1.0)
    assert [f.is_nothing for f in chosen([zero, other], 80)] == [True, False]
    assert sorted(f.is_nothing for f in chosen([zero, zero, zero], 1000)) == [False, True, True]


def test_a_layer_left_out_has_no_best_alternative():
    choices = within_budget([made((16, 24), 2, 0, 1.0), made((16, 24), 2, 1, 1e-4)], 80)
    assert choices[1].form.is_nothing and choices[1].best_other is None and str(choices[1].form) == "left out"


def test_any_additive_loss_may_be_spent():
    """Such as a measured effect: the layer with the smaller energy, which matters more, is kept."""
    form = within_budget([made((16, 24), 1, 0, 1.0)], 40, allowed=only_loras)[0].form
    layers = [[Point(0, effect, nothing((16, 24))), Point(40, 0.0, form)] for effect in (0.2, 3.0, 1.0)]
    assert [point.form.is_nothing for point in spend(layers, 80)[0]] == [True, False, False]
