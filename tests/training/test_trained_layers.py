"""The shapes of trained layers, and the initial adapter."""

import pytest
import torch

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.bases.catalog import get
from krona_hub.errors import BaseMismatchError, ShapeError, UsageError
from krona_hub.kron.terms import KronTerms, as_lora
from krona_hub.training.configuration import checked, settings_of
from krona_hub.training.model.trained_layers import fresh_adapter, highest_rank, plan_targets, started_from


def targets(base="sd15", **given):
    return plan_targets(get(base), checked(given))


def test_the_paper_preset_has_the_papers_parameters():
    found = plan_targets(get("sdxl"), settings_of({}, preset="paper-sdxl"))
    assert sum(t.parameters for t in found) == 3_874_560  # what `krona params` counts for 64x4
    assert {(t.shape.a1, t.shape.a2) for t in found} == {(64, 4)}


def test_regular_expressions_give_modules_their_own_a1_and_a2():
    found = targets(shape="64x4", shapes={r"attn2\.to_[kv]$": "32x8", r"mid_block.*attn2\.to_k$": "16x16"})
    shapes = {t.layer: (t.shape.a1, t.shape.a2) for t in found}
    for layer, shape in shapes.items():
        key_or_value = layer.endswith(("attn2.to_k", "attn2.to_v"))
        middle = "mid_block" in layer and layer.endswith("attn2.to_k")
        assert shape == ((16, 16) if middle else (32, 8) if key_or_value else (64, 4))


def test_a_pattern_that_finds_nothing_and_a_shape_that_does_not_divide_are_told():
    with pytest.raises(UsageError, match="matches none"):
        targets(shape="64x4", shapes={"nowhere": "8x8"})
    with pytest.raises(ShapeError, match=r"128 of 128 layers do not fit.*nearest"):
        targets(shape="63x4")


@pytest.mark.parametrize("budget", [400_000, 1_000_000, 5_000_000])
def test_auto_keeps_within_the_budget_and_spends_it_on_rank(budget):
    found = targets(budget=budget)
    assert 0.4 * budget < sum(t.parameters for t in found) <= budget
    assert all(highest_rank(t.shape) > 4 * t.parameters / sum(t.shape.full) for t in found)


def test_equal_layers_get_equal_shapes_and_more_budget_no_less_rank():
    small, large = targets(budget=500_000), targets(budget=2_000_000)
    by_size = {}
    for t in small:
        assert by_size.setdefault(t.module.matrix, t.shape) == t.shape
    assert all(highest_rank(a.shape) <= highest_rank(b.shape) for a, b in zip(small, large, strict=True))


def test_a_budget_counts_layers_whose_shape_is_given():
    found = targets(shapes={r"attn1": "64x4"}, budget=1_500_000)
    assert sum(t.parameters for t in found) <= 1_500_000
    with pytest.raises(ShapeError, match="budget"):
        targets(shapes={r"attn1": "64x4"}, budget=100_000)


def test_text_encoders_are_trained_on_request():
    found = targets(shape="16x4", text_encoders="attn")
    assert {t.layer.split(".")[0] for t in found} == {"unet", "text_encoder"}


def test_a_fresh_adapter_is_zero_and_its_a_has_the_papers_spread():
    settings = checked({"shape": "64x4", "terms": 3, "rows": "shuffled"})
    found = plan_targets(get("sd15"), settings)
    adapter = fresh_adapter(found, settings)
    assert adapter.parameters == sum(t.parameters for t in found)
    layer = next(iter(adapter.layers.values()))
    assert not layer.low_rank_delta().any() and layer.sums[0].rows == "shuffled" and layer.sums[0].terms == 3
    a = torch.cat([d.sums[0].left.flatten() for d in adapter.layers.values()])
    assert abs(float(a.std()) * 64 - 1) < 0.02 and abs(float(a.mean()) * 64) < 0.02


def test_low_rank_b_is_zero_at_first_and_counted():
    settings = checked({"shape": "4x4", "rank": 3})
    found = plan_targets(get("sd15"), settings)
    adapter = fresh_adapter(found, settings)
    assert adapter.parameters == sum(t.parameters for t in found)
    assert all(d.sums[0].right.rank == 3 and not d.low_rank_delta().any() for d in adapter.layers.values())


LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"  # (1280, 768)


def lora(rank=4):
    torch.manual_seed(2)
    delta = LayerDelta((as_lora(torch.randn(1280, rank), torch.randn(rank, 768)),), (1280, 768))
    return Adapter({LAYER: delta})


@pytest.mark.parametrize("rows", ["kron", "shuffled"])
def test_a_start_in_another_form_is_the_nearest_one(rows):
    settings = checked({"shape": "32x4", "terms": 2, "rows": rows, "targets": r"mid_block.*attn2\.to_k"})
    start = started_from(lora(), get("sd15"), settings)
    wanted, got = lora()[LAYER].low_rank_delta(), start[LAYER].low_rank_delta()
    error = float((got - wanted).norm() / wanted.norm())
    overlap = float((got * (wanted - got)).sum() / wanted.square().sum())
    assert error < 1 and abs(overlap) < 1e-5  # a projection: what is left is orthogonal to it
    assert start[LAYER].sums[0].rows == rows


def test_a_start_in_the_same_form_is_taken_as_it_is():
    settings = checked({"shape": "32x4", "targets": r"mid_block.*attn2\.to_k"})
    terms = KronTerms(torch.randn(1, 32, 4, dtype=torch.bfloat16), torch.randn(1, 40, 192))
    start = started_from(Adapter({LAYER: LayerDelta((terms,), (1280, 768))}), get("sd15"), settings)
    assert torch.equal(start[LAYER].sums[0].left, terms.left.float())
    assert torch.equal(start[LAYER].sums[0].right, terms.right)


def test_without_a_shape_the_start_keeps_its_own_form():
    start = started_from(lora(), get("sd15"), checked({}))
    assert torch.equal(start[LAYER].low_rank_delta(), lora()[LAYER].low_rank_delta())


@pytest.mark.parametrize("values", [{}, {"shape": "32x4", "targets": r"mid_block.*attn2\.to_k"}])
def test_a_start_keeps_its_vectors(values):
    vectors = {"unet.conv_norm_out.bias": torch.randn(320), "unet.conv_in.bias": torch.randn(320)}
    start = started_from(Adapter(lora().layers, vectors=vectors), get("sd15"), checked(values))
    assert start.vectors.keys() == vectors.keys()
    assert all(torch.equal(start.vectors[name], vectors[name]) for name in vectors)


def test_layers_of_a_start_that_are_not_trained_are_told():
    with pytest.raises(BaseMismatchError, match="not trained"):
        started_from(lora(), get("sd15"), checked({"shape": "32x4", "targets": r"attn1\.to_q"}))
