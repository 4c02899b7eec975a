"""The pruned search against a dense computation of all factorizations of every shape."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krona_hub.errors import InexpressibleError, UsageError
from krona_hub.kron import best_first, krylov
from krona_hub.kron.candidates import Factorization, is_lora, most_right_rank, nothing, parameters_of, realize
from krona_hub.kron.factorization_search import error_of, frontier, smallest_within, within_budget
from krona_hub.kron.shapes import KronShape, choices
from krona_hub.kron.terms import nearest_kron, rearrange

SIZES = [(6, 8), (12, 18), (16, 24), (20, 20), (24, 10), (7, 12), (7, 11), (1, 12), (9, 1)]


def lora_layer(size, rank, seed, planted=None, noise=0.0):
    """A random LoRA in float64; with `planted` = (a1, a2, terms) a sum of thin Kronecker products, with noise."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    if planted is None:
        decay = 0.7 ** torch.arange(rank)
        return randn(size[0], rank) * decay, randn(rank, size[1])
    a1, a2, terms = planted
    b1, b2, ranks = size[0] // a1, size[1] // a2, max(1, rank // terms)
    ups, downs = [], []
    for k in range(terms):
        a, u, v = randn(a1, 1) * 0.8**k, randn(b1, ranks), randn(ranks, b2)
        ups.append(torch.kron(a, u))
        downs.append(torch.kron(randn(1, a2), v))
    up, down = torch.cat(ups, 1), torch.cat(downs)
    return up + noise * up.std() * randn(*up.shape), down + noise * down.std() * randn(*down.shape)


def every_form(up, down):
    """Compute all factorizations from the dense SVD of every rearrangement, the oracle of the search."""
    w = up @ down
    whole = float(w.norm())
    size = tuple(w.shape)
    sigma = torch.linalg.svdvals(w)
    for rank in range(1, min(*size, up.shape[1]) + 1):
        yield Factorization(KronShape(1, 1, *size), 1, rank, rank * sum(size), float(sigma[rank:].norm()) / whole)
    for shape in choices(*size):
        _, s, vh = torch.linalg.svd(rearrange(w, shape), full_matrices=False)
        parts = torch.linalg.svdvals(vh.reshape(-1, shape.b1, shape.b2))
        for terms in range(1, shape.max_terms + 1):
            for rank in [None, *range(1, most_right_rank(shape) + 1)]:
                cut = parts[:terms, (rank or min(shape.b1, shape.b2)) :] * s[:terms, None]
                error = float(torch.cat([cut.flatten(), s[terms:]]).norm()) / whole
                yield Factorization(shape, terms, rank, parameters_of(shape, terms, rank), error)


def best(forms, max_error):
    return min((f for f in forms if f.relative_error <= max(max_error, 1e-12)), key=lambda f: f.order)


def same(a, b):
    return (a.shape, a.terms, a.right_rank, a.parameters) == (b.shape, b.terms, b.right_rank, b.parameters)


def check_against_exhaustive(layers, errors):
    for up, down in layers:
        forms = list(every_form(up, down))
        others = [f for f in forms if not f.is_lora]
        for error in errors:
            choice = smallest_within([(up, down)], error)[0]
            expected = best(forms, error)
            if expected.is_lora:
                assert choice.form.is_lora
                assert choice.form.parameters == expected.parameters
                assert same(choice.best_other, best(others, error))
            else:
                assert same(choice.form, expected), (choice.form, expected)
                assert choice.best_other is None
            assert choice.form.relative_error == pytest.approx(expected.relative_error, rel=1e-6, abs=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(SIZES), st.integers(1, 8), st.integers(0, 9999), st.sampled_from([0.02, 0.05, 0.2, 0.5, 0.9]))
def test_the_choice_for_a_random_layer_is_that_of_an_exhaustive_search(size, rank, seed, error):
    check_against_exhaustive([lora_layer(size, rank, seed)], [error])


@settings(deadline=None, max_examples=40)
@given(
    st.sampled_from([(12, 18), (16, 24), (20, 20), (24, 10)]),
    st.integers(1, 8),
    st.integers(0, 9999),
    st.sampled_from([0.0, 0.001, 0.01]),
    st.sampled_from([0.0, 1e-6, 0.02, 0.05, 0.3]),
    st.data(),
)
def test_the_choice_for_a_planted_layer_is_that_of_an_exhaustive_search(size, rank, seed, noise, error, data):
    shape = data.draw(st.sampled_from([s for s in choices(*size) if not is_lora(s, None)]))
    terms = data.draw(st.integers(1, min(rank, shape.max_terms, 4)))
    check_against_exhaustive([lora_layer(size, rank, seed, (shape.a1, shape.a2, terms), noise)], [error])


@pytest.fixture(params=["as usual", "every way forced"])
def thresholds(request, monkeypatch):
    """Force the methods for large layers on small ones: Krylov, Gram matrices, sketches."""
    if request.param == "every way forced":
        monkeypatch.setattr(krylov, "SMALL", 0)
        monkeypatch.setattr(best_first, "DENSE_PROBE", 16)
        monkeypatch.setattr(best_first, "OVERSAMPLING", 2)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_layers_of_64x96_are_chosen_as_exhaustively(thresholds, seed):
    planted = [(8, 4, 2), (16, 6, 3), (4, 8, 4)][seed]
    layers = [lora_layer((64, 96), 8, seed, planted, 0.01), lora_layer((64, 96), 4 + seed, seed)]
    check_against_exhaustive(layers, [0.05, 0.3])


def test_layers_searched_together_are_chosen_as_alone():
    layers = [lora_layer((16, 24), 4, seed, (4, 6, 2) if seed % 2 else None, 0.01) for seed in range(5)]
    layers.insert(2, lora_layer((12, 18), 3, 1))
    for pair, choice in zip(layers, smallest_within(layers, 0.05), strict=True):
        assert same(choice.form, smallest_within([pair], 0.05)[0].form)


def test_a_form_is_realised_with_the_error_and_the_size_it_promises():
    layers = [lora_layer((16, 24), 4, seed, (4, 6, 2) if seed % 2 else None, 0.01) for seed in range(4)]
    for error in (0.05, 0.4):
        for (up, down), choice in zip(layers, smallest_within(layers, error), strict=True):
            for form in filter(None, choice):
                fit = realize(up, down, form)
                true = float((fit.terms.dense() - up @ down).norm() / (up @ down).norm())
                assert fit.relative_error == pytest.approx(true, abs=1e-12)
                assert fit.relative_error == pytest.approx(form.relative_error, rel=1e-6, abs=1e-12)
                assert fit.terms.parameters - form.parameters in (0, 1)  # [[1]] beside a LoRA


def test_the_whole_lora_is_realised_unchanged():
    up, down = torch.randn(12, 3), torch.randn(3, 18)
    fit = realize(up, down, smallest_within([(up, down)], 0.0)[0].form)
    assert torch.equal(fit.terms.right.up[0], up)
    assert torch.equal(fit.terms.right.down[0], down)
    assert fit.relative_error == 0.0


def test_a_zero_delta_takes_the_smallest_form():
    zero = (torch.zeros(12, 3), torch.randn(3, 18))
    choice = smallest_within([zero, lora_layer((12, 18), 3, 1)], 0.05)[0]
    smallest = min(
        parameters_of(s, 1, r) for s in choices(12, 18) for r in ([None, 1] if most_right_rank(s) else [None])
    )
    assert choice.form.parameters == smallest
    assert not realize(*zero, choice.form).terms.dense().any()


def test_a_rank_above_the_size_of_the_layer_still_has_a_smallest_form():
    up, down = torch.randn(6, 20).double(), torch.randn(20, 8).double()
    choice = smallest_within([(up, down)], 0.0)[0]
    assert choice.form.relative_error <= 1e-12
    assert choice.form.parameters <= 48


def test_only_allowed_forms_are_chosen():
    layers = [lora_layer((16, 24), 4, 1, (4, 6, 2), 0.01), lora_layer((16, 24), 4, 2)]

    def one_term(shape, terms, right_rank):
        return terms == 1

    for (up, down), choice in zip(layers, smallest_within(layers, 0.3, allowed=one_term), strict=True):
        forms = [f for f in every_form(up, down) if one_term(f.shape, f.terms, f.right_rank)]
        assert same(choice.form, best(forms, 0.3))
    with pytest.raises(InexpressibleError, match=r"error of 0\.05"):
        smallest_within(layers, 0.05, allowed=lambda shape, terms, rank: shape[:2] == (4, 6) and terms == 1)


def test_a_negative_error_is_a_usage_error():
    with pytest.raises(UsageError):
        smallest_within([lora_layer((12, 18), 3, 1)], -0.1)


def test_progress_counts_every_layer():
    seen = []
    layers = [lora_layer((12, 18), 3, 1), lora_layer((6, 8), 3, 1)]
    smallest_within(layers, 0.1, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_a_frontier_gets_larger_and_better():
    forms = frontier(*lora_layer((16, 24), 4, 1, (4, 6, 2), 0.01))
    assert len(forms) > 2
    sizes, errors = [f.parameters for f in forms], [f.relative_error for f in forms]
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)


def test_the_error_of_one_shape_is_that_of_the_dense_fit():
    up, down = lora_layer((16, 24), 4, 1)
    for terms in (1, 3):
        expected = nearest_kron(up @ down, (4, 6), terms).relative_error
        assert error_of(up, down, (4, 6), terms) == pytest.approx(expected, rel=1e-9)


# --- budgets ---------------------------------------------------------------------------------------------------------


def loss(layers, forms):
    return sum((f.relative_error * float((u @ d).norm())) ** 2 for (u, d), f in zip(layers, forms, strict=True))


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2, 0.3, 0.5, 0.8])
def test_a_budget_is_kept_and_spent_about_as_well_as_the_exhaustive_family_allows(share):
    """No allocation can have a smaller error than the relaxation: every layer's best value at a common price."""
    layers = [lora_layer((16, 24), 4, seed, (4, 6, 2) if seed % 2 else None, 0.01) for seed in range(4)]
    budget = int(share * 4 * 4 * 40)
    forms = [c.form for c in within_budget(layers, budget)]
    assert sum(f.parameters for f in forms) <= budget
    energies = [float((u @ d).norm()) ** 2 for u, d in layers]
    families = [[nothing((16, 24)), *every_form(u, d)] for u, d in layers]
    bound, step = 0.0, 0.0
    for price in torch.logspace(-5, 1, 200, dtype=torch.float64).tolist():
        values = [
            min(f.relative_error**2 * e + price * f.parameters for f in family)
            for family, e in zip(families, energies, strict=True)
        ]
        if sum(values) - price * budget > bound:
            bound, step = sum(values) - price * budget, price
    gap = step * max(p.form.parameters for p in within_budget(layers, budget))  # one step that did not fit
    assert loss(layers, forms) <= bound + gap + 1e-9


def test_all_of_the_budget_buys_every_layer_exactly():
    layers = [lora_layer((16, 24), 4, seed) for seed in range(3)]
    forms = [c.form for c in within_budget(layers, 3 * 4 * 40)]
    assert loss(layers, forms) < 1e-20


def test_a_louder_layer_gets_more_of_the_budget():
    up, down = lora_layer((16, 24), 4, 1)
    quiet, loud = (c.form for c in within_budget([(0.1 * up, down), (up, down)], 200))
    assert loud.relative_error < quiet.relative_error


def test_a_format_without_lora_spends_its_budget_too():
    """The smallest forms fit a larger budget, so that it does not run out at first: the search needs a price anyway."""
    layers = [lora_layer((16, 24), 4, seed) for seed in range(3)]
    dense = [
        [c.form for c in within_budget(layers, budget, allowed=lambda shape, _, rank: rank is None and min(shape) >= 2)]
        for budget in (100, 200, 400, 800)
    ]
    losses = [loss(layers, forms) for forms in dense]
    assert losses[-1] < 0.5 * losses[0]
    assert sum(form.parameters for form in dense[-1]) > 400


def test_a_budget_that_holds_nothing_says_what_would():
    with pytest.raises(
        UsageError, match=r"5 parameters is too small for any layer\. Choose at least (\d+),"
    ) as refusal:
        within_budget([lora_layer((16, 24), 4, 1), lora_layer((20, 20), 4, 2)], 5)
    least = int(refusal.value.fix.split()[3].rstrip(","))
    for budget in (least, least + 1):
        assert sum(
            c.form.parameters for c in within_budget([lora_layer((16, 24), 4, 1), lora_layer((20, 20), 4, 2)], budget)
        )
    with pytest.raises(UsageError, match=f"at least {least}, the size of the smallest factorization"):
        within_budget([lora_layer((16, 24), 4, 1), lora_layer((20, 20), 4, 2)], least - 1)
