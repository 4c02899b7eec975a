"""What a writer stores is the delta it was given, in another form or not at all."""

import pytest
import torch

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.bases.module_spec import Placement
from krona_hub.errors import InexpressibleError, NonFiniteError
from krona_hub.formats.forms.normal_forms import lora_of, term_of
from krona_hub.formats.reading.placed_layers import layer_of
from krona_hub.formats.writing.encode import cast, normalized, tensors_of, why_not
from krona_hub.formats.writing.fuse_modules import fused
from krona_hub.kron.norms import scaled
from krona_hub.kron.terms import KronTerms, LowRank, as_lora

OUT, IN = 12, 30


def rand(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def delta(*sums, shape=(OUT, IN)):
    return LayerDelta(sums, shape)


LORAS = {
    "one by one on the left": KronTerms(rand(2, 1, 1), LowRank(rand(2, OUT, 3), rand(2, 3, IN))),
    "one by one on the right": KronTerms(LowRank(rand(1, OUT, 2), rand(1, 2, IN)), rand(1, 1, 1)),
    "columns times rows": KronTerms(rand(4, OUT, 1), rand(4, 1, IN)),
    "rows times columns": KronTerms(rand(4, 1, IN), rand(4, OUT, 1)),
    "shuffled where it moves nothing": KronTerms(rand(2, OUT, 1), rand(2, 1, IN), "shuffled"),
}


@pytest.mark.parametrize("name", LORAS)
def test_every_way_to_write_a_lora_is_found_and_means_the_same(name):
    lora = lora_of(delta(LORAS[name]))
    assert torch.allclose(lora.up @ lora.down, LORAS[name].dense(), atol=1e-5)


def test_loras_of_one_layer_concatenate():
    whole = delta(*LORAS.values())
    lora = lora_of(whole)
    assert lora.down.shape[0] == 6 + 2 + 4 + 4 + 2
    assert torch.allclose(lora.up @ lora.down, whole.dense(), atol=1e-5)


def test_a_half_precision_lora_keeps_its_type_and_a_folded_scale_makes_up_wide():
    up, down = rand(OUT, 2, dtype=torch.float16), rand(2, IN, dtype=torch.float16)
    plain = lora_of(delta(as_lora(up, down)))
    assert plain.up.dtype == plain.down.dtype == torch.float16
    scaled = lora_of(delta(as_lora(up, down).scaled(0.5)))
    assert (scaled.up.dtype, scaled.down.dtype) == (torch.float32, torch.float16)


def test_terms_with_multiples_of_one_factor_collect_into_one():
    a, b = rand(1, 4, 5), rand(1, 3, 6)
    same_left = delta(KronTerms(a, b), KronTerms(a * -2, LowRank(rand(1, 3, 1), rand(1, 1, 6))))
    same_right = delta(KronTerms(torch.cat([a, rand(1, 4, 5) ** 2]), torch.cat([b, b * 3])))
    for each in (same_left, same_right):
        term = term_of(each)
        assert term.terms == 1
        assert torch.allclose(term.dense(), each.dense(), atol=1e-5)


def test_other_sums_are_refused_with_the_count_of_their_terms():
    two = delta(KronTerms(rand(2, 4, 5), rand(2, 3, 6)))
    assert term_of(two) is None
    assert "sum of 2 Kronecker terms" in why_not(two, "lycoris-lokr")
    with pytest.raises(InexpressibleError, match=r"unet\.x.*--to lora"):
        normalized(two, "kohya-lora", layer="unet.x")


def test_what_a_lora_tool_refuses_names_the_tool():
    with pytest.raises(InexpressibleError, match="Nunchaku loads LoRA only"):
        normalized(delta(KronTerms(rand(1, 4, 5), rand(1, 3, 6))), "diffusers-lora", "nunchaku", layer="x")


def test_a_cast_that_overflows_is_refused():
    with pytest.raises(NonFiniteError, match="float16"):
        cast(delta(as_lora(rand(OUT, 2) * 1e6, rand(2, IN) * 1e6)), torch.float16)


def test_a_product_of_high_rank_is_stored_dense_and_small_ones_stay():
    shape = (4, 3, 6, 10)
    for rank, stays in ((4, True), (5, False)):
        left, right = rand(1, shape[0], shape[1]), LowRank(rand(1, 6, rank), rand(1, rank, 10))
        stored = normalized(delta(KronTerms(left, right), shape=(24, 30)), "lycoris-lokr")
        assert ("lokr_w2_a" in tensors_of(stored, "lycoris-lokr")) == stays
        assert torch.allclose(stored.dense(), KronTerms(left, right).dense(), atol=1e-5)


def test_fused_loras_are_block_sparse_in_row_order_and_share_equal_downs():
    down = rand(2, IN)
    parts = [(Placement("k", (4, 8)), delta(as_lora(rand(4, 2), down), shape=(4, IN))),
             (Placement("q", (0, 4)), delta(as_lora(rand(4, 3), rand(3, IN)), shape=(4, IN)))]  # fmt: skip
    places = (Placement("q", (0, 4)), Placement("k", (4, 8)), Placement("v", (8, 12)))
    whole = fused("qkv", parts, places)
    lora = lora_of(whole)
    assert whole.weight_shape == (12, IN) and lora.down.shape[0] == 5
    assert not lora.up[4:, :3].any() and not lora.up[8:].any()
    assert torch.allclose(whole.dense()[4:8], parts[0][1].dense(), atol=1e-6)
    same = fused("qkv", [(places[i], delta(as_lora(rand(4, 2) + i, down), shape=(4, IN))) for i in range(3)], places)
    assert lora_of(same).down.shape[0] == 2


def test_kronecker_terms_fuse_where_their_right_factors_agree():
    b = rand(1, 2, 6)
    places = (Placement("q", (0, 4)), Placement("k", (4, 8)), Placement("v", (8, 12)))
    parts = [(p, delta(KronTerms(rand(1, 2, 5) + i, b * (i + 1)), shape=(4, IN))) for i, p in enumerate(places)]
    whole = fused("qkv", parts, places)
    assert whole.sums[0].terms == 1
    assert torch.allclose(whole.dense(), torch.cat([d.dense() for _, d in parts]), atol=1e-5)
    other = [(p, delta(KronTerms(rand(1, 2, 5), rand(1, 2, 6) + i), shape=(4, IN))) for i, p in enumerate(places)]
    with pytest.raises(InexpressibleError, match="--split-qkv"):
        fused("qkv", other, places)


PLACES = (Placement("q", (0, 4)), Placement("k", (4, 8)), Placement("v", (8, 12)))


def read_as_parts(whole):
    """q, k and v, as a reader of the fused module gets them."""
    return [(p, layer_of(whole, p, None)) for p in PLACES]


def test_parts_that_were_one_module_fuse_into_what_was_stored():
    a, b = rand(1, 2, 5, dtype=torch.bfloat16), rand(1, 6, 6, dtype=torch.bfloat16)
    for s in (KronTerms(a, b), KronTerms(a, LowRank(b[:, :, :2], b[:, :2]))):
        parts = read_as_parts(delta(s))
        assert parts[0][1].sums[0].terms == 3
        again = fused("qkv", parts[::-1], PLACES)
        assert all(torch.equal(x, y) for x, y in zip(again.sums[0].tensors, s.tensors, strict=True))
        cast_apart = [(p, cast(part, torch.float32)) for p, part in parts]
        assert torch.equal(fused("qkv", cast_apart, PLACES).dense(), again.dense())


def test_magnitudes_of_the_rows_of_a_fused_module_come_back():
    whole = LayerDelta((KronTerms(rand(1, 2, 5), rand(1, 6, 6)),), (OUT, IN), torch.arange(1.0, 13))
    again = fused("qkv", read_as_parts(whole), PLACES)
    assert torch.equal(again.magnitude, whole.magnitude) and torch.equal(again.sums[0].right, whole.sums[0].right)
    with pytest.raises(InexpressibleError, match="only some are a DoRA"):
        fused("qkv", read_as_parts(whole)[:2], PLACES)


def test_parts_of_a_module_that_no_longer_are_one_term_are_refused():
    parts = read_as_parts(delta(KronTerms(rand(1, 2, 5), rand(1, 6, 6))))
    for changed in (parts[:2], [(PLACES[0], delta(*scaled(parts[0][1].sums, 2), shape=(4, IN))), *parts[1:]]):
        with pytest.raises(InexpressibleError, match="do not form a single term"):
            fused("qkv", changed, PLACES)


def test_zero_terms_do_not_keep_loras_from_being_fused():
    zero = delta(KronTerms(torch.zeros(1, 2, 5), rand(1, 2, 6)), shape=(4, IN))
    lora = delta(as_lora(rand(4, 2), rand(2, IN)), shape=(4, IN))
    whole = fused("qkv", [(PLACES[0], zero), (PLACES[1], lora), (PLACES[2], zero)], PLACES)
    assert lora_of(whole).down.shape[0] == 2
    assert torch.allclose(whole.dense()[4:8], lora.dense()) and not whole.dense()[:4].any()
    nothing = fused("qkv", [(p, zero) for p in PLACES], PLACES)
    assert nothing.sums[0].shape.full == (OUT, IN) and not nothing.dense().any()


def test_full_matrices_fuse_into_a_full_matrix():
    parts = [
        (p, delta(KronTerms(torch.ones(1, 1, 1), rand(1, 4, IN) + i), shape=(4, IN))) for i, p in enumerate(PLACES)
    ]
    whole = fused("qkv", parts, PLACES)
    assert whole.sums[0].shape == (1, 1, OUT, IN)
    assert torch.equal(whole.dense(), torch.cat([part.dense() for _, part in parts]))


def test_swapped_halves_and_transposes_are_what_they_say():
    s = KronTerms(rand(1, 4, 5), rand(1, 3, 6))
    swapped = fused("m", [(Placement("x", swap_halves=True), delta(s))], (Placement("x", swap_halves=True),))
    assert torch.allclose(swapped.dense(), s.dense().roll(OUT // 2, 0))
    turned = fused("m", [(Placement("x", transpose=True), delta(s))], (Placement("x", transpose=True),))
    assert torch.allclose(turned.dense(), s.dense().T)
