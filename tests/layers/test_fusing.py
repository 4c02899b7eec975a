"""Adapters in the base weights: the true sum rounded once, and every bit of the old weight back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from krona_hub import apply_to_state_dict
from krona_hub.errors import ConflictError, NonFiniteError, UnsupportedError
from krona_hub.formats.writing.encode import cast
from krona_hub.layers.attaching import attach, detach, swap
from krona_hub.layers.attachment import attached, extract_adapter, set_scales
from krona_hub.layers.fusing import fuse, unfuse
from krona_hub.merging.arithmetic.rounding import Rounding
from tests import tiny
from tests.formats import made
from tests.layers.test_attaching import assert_close, assert_equal, lokr, lora, modules, weights, with_deltas
from tests.merging.oracle import rounded

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("build", [tiny.sd15, tiny.flux])
def test_fused_weights_are_the_true_sum_rounded_once_and_come_back_bit_by_bit(build, dtype):
    pipe, untouched = build().to(dtype), build().to(dtype)
    adapters = [(lora(pipe), 0.7, "lora"), (lokr(pipe, "to_q", "conv1", "fc1"), -0.4, "lokr")]
    base = weights(pipe)
    for adapter, weight, name in adapters:
        attach(pipe, adapter, name, weight)
    beside = tiny.outputs(build()) if dtype == torch.float32 else None
    assert fuse(pipe) == len(adapters[0][0])
    for layer in adapters[0][0].layers:
        total = sum(w * cast(a[layer], torch.float64).dense() for a, w, _ in adapters if layer in a.layers)
        module = tiny.module_of(untouched, layer)
        wanted = rounded(module.weight.double() + total.reshape(module.weight.shape), dtype)
        assert torch.equal(tiny.module_of(pipe, layer).weight, wanted), layer
    if beside:
        assert_close(tiny.outputs(pipe), with_deltas(build(), *((a, w) for a, w, _ in adapters)))
    unfuse(pipe)
    assert_equal(weights(pipe), base)
    assert attached(pipe) == {"lora": 0.7, "lokr": -0.4}


@pytest.mark.parametrize("dtype", DTYPES)
def test_fusing_gives_the_numbers_of_a_merge_with_exact_rounding(dtype):
    pipe = tiny.sd15().to(dtype)
    dora = made.as_dora(lokr(pipe), lambda layer: tiny.module_of(pipe, layer).weight.float())
    merged = apply_to_state_dict(pipe.unet.state_dict(), [(dora, 0.6)], component="unet", rounding=Rounding(exact=True))
    attach(pipe.unet, dora, scale=0.6)
    fuse(pipe.unet)
    state = pipe.unet.state_dict()
    differing = sum(int((state[key] != tensor).sum()) for key, tensor in merged.items())
    assert differing <= 1e-4 * sum(t.numel() for t in merged.values()), "DoRA's norms are summed in another order"
    detach(pipe.unet)
    plain = lokr(pipe)
    merged = apply_to_state_dict(
        pipe.unet.state_dict(), [(plain, 0.6)], component="unet", rounding=Rounding(exact=True)
    )
    attach(pipe.unet, plain, scale=0.6)
    fuse(pipe.unet)
    assert_equal(pipe.unet.state_dict(), merged)


def test_a_fused_model_runs_without_its_adapters_and_saves_as_the_merged_one():
    pipe = tiny.sd15()
    adapter = lokr(pipe)
    attach(pipe, adapter, scale=0.5)
    want = with_deltas(tiny.sd15(), (adapter, 0.5))
    fuse(pipe)
    merged = tiny.sd15()
    for part, model in tiny.components(merged).items():
        model.load_state_dict(getattr(pipe, part).state_dict())
    assert_close(tiny.outputs(merged), want)
    assert_equal(tiny.outputs(pipe), tiny.outputs(merged))
    assert_close({"x": extract_adapter(pipe)["unet.conv_in"].dense()}, {"x": adapter["unet.conv_in"].dense()}, 1e-6)


def test_a_strength_of_zero_is_not_fused():
    pipe = tiny.sd15()
    base = weights(pipe)
    attach(pipe, lora(pipe), scale=0.0)
    assert fuse(pipe) == 0
    assert_equal(weights(pipe), base)


def test_what_would_change_fused_adapters_is_refused_until_they_are_out_again():
    pipe = tiny.sd15()
    adapter = lora(pipe)
    attach(pipe, adapter, "one")
    fuse(pipe)
    for call in (
        lambda: fuse(pipe),
        lambda: set_scales(pipe, {"one": 0.5}),
        lambda: swap(pipe, adapter, "one"),
        lambda: attach(pipe, adapter, "two"),
    ):
        with pytest.raises(ConflictError, match=r"unfuse"):
            call()
    unfuse(pipe)
    with pytest.raises(ConflictError, match="No adapter is fused"):
        unfuse(pipe)
    set_scales(pipe, {"one": 0.5})


def test_detaching_takes_fused_adapters_out_of_the_weights_too():
    pipe = tiny.sd15()
    base, tree = weights(pipe), modules(pipe)
    one, two = lora(pipe), lokr(pipe)
    attach(pipe, one, "one")
    attach(pipe, two, "two")
    fuse(pipe)
    detach(pipe, "one")
    assert_equal(weights(pipe), base)
    assert_close(tiny.outputs(pipe), with_deltas(tiny.sd15(), (two, 1.0)))
    detach(pipe)
    assert modules(pipe) == tree


def test_a_model_that_was_cast_while_fused_gets_the_cast_of_its_old_weights():
    pipe, other = tiny.sd15(), tiny.sd15()
    attach(pipe, lora(pipe))
    fuse(pipe)
    pipe.to(torch.bfloat16)
    unfuse(pipe)
    assert_equal(weights(pipe), weights(other.to(torch.bfloat16)))


def test_a_sum_beyond_the_type_is_refused_and_nothing_is_changed():
    pipe = tiny.sd15().to(torch.float16)
    base = weights(pipe)
    attach(pipe, lora(pipe), scale=1e7)
    with pytest.raises(NonFiniteError, match=r"unet.* overflows torch.float16"):
        fuse(pipe)
    assert_equal(weights(pipe), base)
    set_scales(pipe, {"default": 0.5})


def test_a_weight_that_cannot_be_added_to_is_refused_before_any_is_changed():
    class Packed(nn.Linear):
        @property
        def weight(self):
            return torch.zeros(3, dtype=torch.uint8)

        @weight.setter
        def weight(self, value):
            pass

    packed = Packed.__new__(Packed)
    nn.Module.__init__(packed)
    packed.in_features, packed.out_features = 6, 4
    model = nn.Sequential(nn.Linear(8, 6), packed)
    before = model[0].weight.clone()
    attach(model, made.lora({"unet.0": (6, 8), "unet.1": (4, 6)}))
    with pytest.raises(UnsupportedError, match=r"\.1: .*quantized"):
        fuse(model)
    assert torch.equal(model[0].weight, before)


def test_weights_stay_the_same_parameters():
    pipe = tiny.sd15()
    attach(pipe, lora(pipe))
    before = [id(p) for p in pipe.unet.parameters()]
    fuse(pipe)
    unfuse(pipe)
    assert [id(p) for p in pipe.unet.parameters()] == before


def test_peft_adapters_stay_beside_what_is_fused():
    from peft import LoraConfig

    pipe = tiny.sd15()
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), "peft")
    adapter = made.only(lokr(tiny.sd15(), "to_q", "to_k"), "unet")
    attach(pipe.unet, adapter)
    beside = tiny.output(pipe.unet)
    assert fuse(pipe.unet) == len(adapter)
    assert_close({"x": tiny.output(pipe.unet)}, {"x": beside})
    unfuse(pipe.unet)
    assert_equal({"x": tiny.output(pipe.unet)}, {"x": beside})
