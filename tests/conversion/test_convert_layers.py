"""Every conversion method against its dense definition, on layers of several kinds."""

import pytest
import torch

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.conversion.convert_layers import apply_method, check_kind
from krona_hub.conversion.methods import Budget, Exact, FixedShape, Keep, MaxError, Rank
from krona_hub.conversion.target import ConversionTarget
from krona_hub.errors import InexpressibleError, KronaError, ShapeError, UsageError
from krona_hub.formats.forms.normal_forms import is_lora, size_of, words_of
from krona_hub.kron.shapes import KronShape
from krona_hub.kron.terms import KronTerms, as_lora, nearest_kron

NATIVE, KOHYA, LOKR = ConversionTarget("krona"), ConversionTarget("kohya-lora"), ConversionTarget("lycoris-lokr")


def lora(out=24, in_=36, rank=3, seed=0):
    torch.manual_seed(seed)
    return LayerDelta((as_lora(torch.randn(out, rank), torch.randn(rank, in_)),), (out, in_))


def kron(a1, a2, b1, b2, terms=1, seed=0):
    torch.manual_seed(seed)
    return LayerDelta((KronTerms(torch.randn(terms, a1, a2), torch.randn(terms, b1, b2)),), (a1 * b1, a2 * b2))


def dense(delta):
    return delta.dense().reshape(delta.matrix_shape).double()


def error(new, old):
    return float((dense(new) - dense(old)).norm() / dense(old).norm())


def convert(delta, method, target=NATIVE):
    return apply_method({"unet.x": delta}, method, target)["unet.x"]


def test_keep_returns_the_very_same_delta():
    delta = lora()
    assert convert(delta, Keep()).delta is delta


@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("delta", [lora(), kron(4, 6, 6, 6, terms=2), lora(rank=20)], ids=["lora", "kron", "thick"])
def test_a_fixed_shape_is_the_nearest_sum_of_that_shape(delta, terms):
    new = convert(delta, FixedShape(8, 4, terms)).delta
    best = nearest_kron(dense(delta), KronShape(8, 4, 3, 9), terms)
    assert new.sums[0].shape == KronShape(8, 4, 3, 9)
    assert error(new, delta) == pytest.approx(best.relative_error, rel=1e-5)


def test_a_shape_that_does_not_divide_names_the_layer_and_the_way_out():
    with pytest.raises(ShapeError, match=r"unet\.x: 5x4 does not divide .*--shape-fallback nearest"):
        convert(lora(), FixedShape(5, 4))
    outcome = convert(lora(), FixedShape(5, 4, fallback=True))
    assert outcome.delta.sums[0].shape[:2] == (6, 4)
    assert "5x4 does not divide the layer; used 6x4" in outcome.note


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_a_rank_gives_the_best_lora_of_that_rank(rank):
    delta = kron(4, 6, 6, 6)
    new = convert(delta, Rank(rank), KOHYA).delta
    s = torch.linalg.svdvals(dense(delta))
    assert is_lora(new)
    assert error(new, delta) == pytest.approx(float(s[rank:].norm() / s.norm()), rel=1e-5)


def test_a_rank_above_the_own_one_leaves_a_lora_alone():
    delta = lora(rank=3)
    assert convert(delta, Rank(8), KOHYA).delta is delta


def test_exact_to_lora_is_equal_at_the_least_rank():
    delta = kron(3, 2, 8, 18)
    new = convert(delta, Exact(), KOHYA).delta
    assert error(new, delta) < 1e-6
    assert words_of(new) == "LoRA r16"  # rank 2 of A times rank 8 of B


@pytest.mark.parametrize("limit", [0.0, 0.05, 0.4])
@pytest.mark.parametrize("target", [NATIVE, LOKR, KOHYA], ids=lambda t: t.format)
def test_max_error_is_kept_and_never_costs_more_than_the_lora_itself(limit, target):
    for delta in (lora(), lora(rank=7, seed=1)):
        new = convert(delta, MaxError(limit), target).delta
        assert error(new, delta) <= limit + 1e-6
        assert size_of(new)[0] <= size_of(delta)[0]


def test_max_error_finds_a_planted_kronecker_product():
    planted = kron(4, 1, 6, 36)  # a LoRA of rank 6 that is really one small term
    up_down = torch.linalg.svd(dense(planted), full_matrices=False)
    up, down = (up_down[0][:, :6] * up_down[1][:6]).float(), up_down[2][:6].float()
    found = convert(LayerDelta((as_lora(up, down),), (24, 36)), MaxError(0.01)).delta
    assert size_of(found)[0] <= 4 + 6 * 36


def test_a_budget_is_respected_over_all_layers_together():
    layers = {f"unet.{i}": lora(rank=4, seed=i) for i in range(3)}
    outcomes = apply_method(layers, Budget(share=0.5), NATIVE)
    spent = sum(size_of(o.delta)[0] for o in outcomes.values())
    assert spent <= 0.5 * sum(size_of(d)[0] for d in layers.values())


def test_peft_shapes_follow_one_factor_in_every_layer():
    layers = {"unet.a": lora(32, 32), "unet.b": lora(64, 48, seed=1)}
    outcomes = apply_method(layers, MaxError(0.2), ConversionTarget("peft-lokr"))
    assert not ConversionTarget("peft-lokr").refusals({n: o.delta for n, o in outcomes.items()})


def test_what_no_form_of_the_target_can_reach_is_refused():
    with pytest.raises(InexpressibleError, match=r"No factorization that the target can load meets --max-error 0\.05"):
        apply_method({"unet.x": lora()}, MaxError(0.05), ConversionTarget("diffusekrona"))


def test_a_budget_below_the_smallest_forms_says_what_they_take():
    with pytest.raises(UsageError, match=r"too small for any layer\. Choose at least \d+, the size of the smallest"):
        apply_method({"unet.x": lora()}, Budget(parameters=1), LOKR)


def test_contradictions_of_way_and_target_are_refused():
    with pytest.raises(UsageError, match="--shape does not apply to a LoRA target"):
        check_kind(FixedShape(8, 4), True, ["x"])
    with pytest.raises(UsageError, match="--rank requires a LoRA target"):
        check_kind(Rank(4), False, ["x"])
    with pytest.raises(KronaError, match="is empty"):
        check_kind(Keep(), False, [])


@pytest.mark.parametrize("rows", ["kron", "shuffled"])
def test_a_shape_with_more_terms_than_the_sum_has_keeps_the_sum(rows):
    torch.manual_seed(0)
    one = KronTerms(torch.randn(1, 4, 3), torch.randn(1, 6, 12), rows)
    delta = LayerDelta((one,), (24, 36))
    (found,) = convert(delta, FixedShape(4, 3, terms=2)).delta.sums
    assert found.terms == 1
    assert found.rows == rows
    assert torch.allclose(found.dense(), one.dense(), atol=1e-5)
