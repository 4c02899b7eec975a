"""Adapters in pipelines in memory: they compute base output + ΔW x, and leave no trace when they are taken out."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from krona_hub import attach, detach, extract_adapter, fuse, load_into, read, set_scales, unfuse, unload, write
from krona_hub.adapters.adapter import Adapter
from krona_hub.errors import BaseMismatchError, ConflictError, NotFoundError, UnsupportedError, UsageError
from krona_hub.layers import attached, swap
from krona_hub.layers.kron_layer import KronLayer
from krona_hub.pipelines.load_adapter import base_of
from tests import tiny
from tests.formats import made
from tests.merging.test_pipelines import Golden, assert_computes
from tests.shared import SHARED, shared

INDEX = SHARED / "golden" / "index.json"
SAMPLES = json.loads(INDEX.read_text())["samples"] if INDEX.exists() else []
WEIGHT = 0.7
PIPELINES = {"sd15": tiny.sd15, "sdxl": tiny.sdxl, "sd3": tiny.sd3, "flux": tiny.flux}


@pytest.fixture(scope="module")
def golden_base() -> Golden:
    return Golden(shared("golden", "base"))


def modules_of(pipe):
    """Every module, by component and name: the objects themselves."""
    return {(c, n): m for c, model in tiny.components(pipe).items() for n, m in model.named_modules()}


def weights_of(pipe):
    return {(c, n): t.clone() for c, model in tiny.components(pipe).items() for n, t in model.state_dict().items()}


def assert_same_tensors(a, b):
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s["name"])
def test_a_golden_adapter_computes_what_its_reference_delta_computes(sample, golden_base):
    deltas = load_file(shared("golden", sample["delta"]))
    modules, base = modules_of(golden_base), tiny.outputs(golden_base)
    with tiny.hooked(golden_base, deltas, WEIGHT) as pipe:
        wanted = tiny.outputs(pipe)
    report = load_into(golden_base, shared("golden", sample["adapter"]), WEIGHT)
    assert set(report.matched) == set(deltas) and not report.missing
    changed = {layer.partition(".")[0] for layer in deltas}
    assert_computes(golden_base, wanted, base, changed, least=1e-3)
    unload(golden_base)
    assert modules_of(golden_base) == modules, "the very same objects, under the same names"
    assert_same_tensors(tiny.outputs(golden_base), base)


FORMS = {
    "krona": lambda names: made.lokr(names, made.by_peft(4)),
    "lycoris-lokr": lambda names: made.lokr(names, made.by_lycoris(4), ranks=(2, None)),
    "kohya-lora": made.lora,
    "diffusers-lora": made.lora,
}


@pytest.fixture(params=PIPELINES)
def build(request):
    return PIPELINES[request.param]


def adapter_for(pipe, form: str = "krona") -> Adapter:
    return FORMS[form](tiny.layers(pipe, "to_q", "to_k", "to_out.0", "q_proj", "fc1"))


@pytest.mark.parametrize("form", FORMS)
def test_every_pipeline_loads_every_format_and_computes_with_it(build, form, tmp_path):
    pipe, file = build(), tmp_path / "my style.v2.safetensors"
    adapter, base, before, modules = adapter_for(pipe, form), tiny.outputs(pipe), weights_of(pipe), modules_of(pipe)
    write(adapter, file, format=form, base=tiny.save(pipe, tmp_path / "base"))
    report = load_into(pipe, file)
    assert report.name == "my_style_v2" and set(report.matched) >= set(adapter.layers)  # fused ones bring zeros along
    assert str(report) == f"my_style_v2: {len(report.matched)} of {len(report.matched)} modules"
    assert_computes(pipe, tiny.outputs(tiny.added(build(), read(file, base=tmp_path / "base"))), base)
    assert_same_tensors(weights_of(pipe), before)  # a state_dict does not show the adapter
    assert load_into(pipe, file).name == "my_style_v2_2" and list(attached(pipe)) == ["my_style_v2", "my_style_v2_2"]
    unload(pipe)
    assert modules_of(pipe) == modules
    assert_same_tensors(tiny.outputs(pipe), base)


@pytest.fixture
def two():
    """A pipeline, and two adapters of different forms whose layers overlap in part."""
    pipe = tiny.sd15()
    one = made.lokr(tiny.layers(pipe, "to_q", "conv1", "fc1"), made.by_peft(4))
    return pipe, one, made.lora(tiny.layers(pipe, "to_q", "to_v", "proj_in"))


def summed(*pairs):
    pipe = tiny.sd15()
    for adapter, weight in pairs:
        deltas = {n: weight * d for n, d in tiny.deltas(pipe, adapter).items()}
        for layer, delta in deltas.items():
            tiny.module_of(pipe, layer).weight += delta
    return tiny.outputs(pipe)


def test_several_adapters_add_up_at_their_strengths_until_one_is_taken_out(two):
    pipe, one, other = two
    base = tiny.outputs(pipe)
    attach(pipe, one, "one", 0.5)
    attach(pipe, other, "other", -2.0)
    assert_computes(pipe, summed((one, 0.5), (other, -2.0)), base)
    set_scales(pipe, {"one": 1.5, "other": 0.0})
    assert attached(pipe) == {"one": 1.5, "other": 0.0}
    assert_computes(pipe, summed((one, 1.5)), base)
    detach(pipe, "one")
    set_scales(pipe, {"other": 1.0})
    assert_computes(pipe, summed((other, 1.0)), base, {"unet"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fused_weights_compute_the_same_and_come_back_bit_for_bit(two, dtype):
    pipe, one, other = two
    pipe.to(dtype=dtype)
    before = weights_of(pipe)
    attach(pipe, one, "one", 0.5)
    attach(pipe, other, "other")
    fuse(pipe)
    touched = {n for n in weights_of(pipe) if not torch.equal(weights_of(pipe)[n], before[n])}
    assert len(touched) == len(one.layers.keys() | other.layers.keys())
    for component, name in touched:
        layer = f"{component}.{name.removesuffix('.weight')}".replace(".base", "")
        parts = [s * a.layers[layer].dense() for a, s in ((one, 0.5), (other, 1.0)) if layer in a.layers]
        wanted = (before[component, name].float() + sum(parts)).to(dtype)
        torch.testing.assert_close(weights_of(pipe)[component, name], wanted, rtol=torch.finfo(dtype).eps, atol=1e-6)
    with pytest.raises(ConflictError, match="fused"):
        set_scales(pipe, {"one": 1.0})
    unfuse(pipe)
    assert_same_tensors(weights_of(pipe), before)
    fuse(pipe)
    detach(pipe)
    assert_same_tensors(weights_of(pipe), before)
    assert not any(isinstance(m, KronLayer) for m in modules_of(pipe).values())


@pytest.mark.parametrize("axis", ["out", "in"])
def test_dora_is_attached_and_fused_with_the_norms_of_the_base(axis):
    pipe = tiny.sd15()
    base, plain = tiny.outputs(pipe), made.lora(tiny.layers(pipe, "to_q", "conv1", "fc1"))
    adapter = made.as_dora(plain, lambda name: tiny.module_of(pipe, name).weight, axis)
    attach(pipe, adapter, scale=0.5)
    wanted = summed((adapter, 0.5))
    assert_computes(pipe, wanted, base)
    with pytest.raises(ConflictError, match="Two DoRA"):
        attach(pipe, adapter, "again")
    assert list(attached(pipe)) == ["default"], "nothing of the second one stays"
    fuse(pipe)
    assert_computes(pipe, wanted, base)


def test_a_pipeline_that_goes_to_another_type_and_back_keeps_the_adapters_numbers(two):
    pipe, one, _ = two
    attach(pipe, one)
    pipe.unet.to(torch.bfloat16).to(torch.float32)
    pipe.text_encoder.to(torch.float16)
    back = extract_adapter(pipe)
    assert back.layers.keys() == one.layers.keys()
    for name, delta in one.layers.items():
        assert torch.equal(back[name].dense(), delta.dense())


def test_save_pretrained_saves_the_base(two, tmp_path):
    pipe, one, _ = two
    before = weights_of(pipe)
    attach(pipe, one)
    pipe.unet.save_pretrained(tmp_path)
    again = type(pipe.unet).from_pretrained(tmp_path).state_dict()
    assert_same_tensors({("unet", n): t for n, t in again.items()}, {k: v for k, v in before.items() if k[0] == "unet"})


def test_a_state_dict_of_the_base_loads_into_a_model_with_adapters(two):
    pipe, one, _ = two
    other = {n: t + 1 for n, t in pipe.unet.state_dict().items()}
    attach(pipe, one)
    pipe.unet.load_state_dict(other)
    assert_same_tensors(pipe.unet.state_dict(), other)


def test_a_copy_of_a_pipeline_with_adapters_is_independent(two):
    pipe, one, _ = two
    attach(pipe, one)
    unet, wanted = copy.deepcopy(pipe.unet), tiny.output(pipe.unet)
    detach(pipe)
    assert torch.equal(tiny.output(unet), wanted)
    state = unet.state_dict()
    unet.load_state_dict(state)  # the hook of the copy is about the copy


def test_numbers_are_swapped_in_place(two):
    pipe, one, other = two
    base = tiny.outputs(pipe)
    attach(pipe, one, "x")
    twice = one.with_layers(
        {n: type(d)(tuple(s.scaled(2.0) for s in d.sums), d.weight_shape) for n, d in one.layers.items()}
    )
    tensors = [id(b) for m in modules_of(pipe).values() if isinstance(m, KronLayer) for b in m.branches.buffers()]
    swap(pipe, twice, "x")
    assert_computes(pipe, summed((one, 2.0)), base)
    assert tensors == [
        id(b) for m in modules_of(pipe).values() if isinstance(m, KronLayer) for b in m.branches.buffers()
    ]
    with pytest.raises(BaseMismatchError, match=r"layers: .* differ, text_encoder"):
        swap(pipe, other, "x")


def test_modules_that_are_not_there_are_named_and_nothing_is_attached(two):
    pipe, one, _ = two
    modules = modules_of(pipe)
    more = one.with_layers(
        {**one.layers, "unet.nowhere.to_q": one["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"]}
    )
    with pytest.raises(BaseMismatchError, match=rf"{len(one)} of {len(more)} modules match; not unet.nowhere.to_q"):
        attach(pipe, more)
    assert modules_of(pipe) == modules
    report = attach(pipe, more, allow_missing=True)
    assert set(report.missing) == {"unet.nowhere.to_q"} and len(report.matched) == len(one)
    with pytest.raises(BaseMismatchError, match="0 of"):
        attach(pipe.text_encoder, made.only(one, "unet"), "other", allow_missing=True)


def test_a_module_of_another_size_is_named_and_nothing_stays():
    pipe = tiny.sd15()
    names = tiny.layers(pipe, "attn2.to_k", "attn1.to_q")
    wrong = made.lora({name: (size[0], 48) if "attn2" in name else size for name, size in names.items()})
    modules = modules_of(pipe)
    with pytest.raises(BaseMismatchError, match=r"attn2\.to_k: .*weight of shape \(\d+, 48\)"):
        attach(pipe, wrong)
    assert modules_of(pipe) == modules


def test_a_lone_model_takes_the_layers_of_its_component(two):
    pipe, one, _ = two
    base = tiny.outputs(pipe)
    report = attach(pipe.unet, one)
    assert report.notes == (f"{sum(n.startswith('text') for n in one.layers)} layers are for other components",)
    attach(pipe.text_encoder, one, component="text_encoder")
    assert_computes(pipe, summed((one, 1.0)), base)


def test_what_cannot_be_meant_is_told(two):
    pipe, one, _ = two
    attach(pipe, one, "x")
    with pytest.raises(ConflictError, match="'x' is already attached"):
        attach(pipe, one, "x")
    with pytest.raises(NotFoundError, match="'y' is attached") as caught:
        set_scales(pipe, {"x": 2.0, "y": 1.0})
    assert "Attached: x" in caught.value.fix and attached(pipe) == {"x": 1.0}
    with pytest.raises(UsageError, match="Invalid adapter name"):
        attach(pipe, one, "a.b")
    with pytest.raises(UsageError, match="neither a model nor a pipeline"):
        load_into("sd15", one)


def test_an_adapter_beside_one_of_peft(two):
    from peft import LoraConfig

    pipe, one, _ = two
    names = [n.removeprefix("unet.") for n in one.layers if n.startswith("unet.") and n.endswith("to_q")]
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=3, target_modules=names, init_lora_weights=False))
    alone = tiny.output(pipe.unet)
    attach(pipe, one)
    both = tiny.output(pipe.unet)
    detach(pipe)
    assert torch.equal(tiny.output(pipe.unet), alone)
    assert (both - alone).abs().max() > 1e-3
    pipe.unet.disable_adapters()
    attach(pipe, one)
    assert_computes(pipe, {"unet": summed((one, 1.0))["unet"]}, {"unet": tiny.output(tiny.sd15().unet)})


def test_trained_factors_are_parameters_that_come_out_as_an_adapter(two):
    pipe, one, _ = two
    pipe.unet.requires_grad_(False)
    attach(pipe.unet, one, trainable=True)
    trained = [p for p in pipe.unet.parameters() if p.requires_grad]
    assert len(trained) == sum(len(d.tensors) for n, d in one.layers.items() if n.startswith("unet"))
    before = extract_adapter(pipe.unet)
    out = pipe.unet(torch.randn(1, 4, 16, 16), torch.tensor(5), torch.randn(1, 7, 24)).sample
    out.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    torch.optim.SGD(trained, lr=1.0).step()
    after = extract_adapter(pipe.unet)
    assert before.layers.keys() == after.layers.keys()
    for name in before.layers:
        assert not torch.equal(before[name].dense(), after[name].dense())


# --- what diffusers, PEFT and accelerate do with a pipeline that has adapters ----------------------------------------


def restored(pipe, folder):
    """The pipeline, saved and loaded again."""
    pipe.save_pretrained(folder)
    absent = {name: None for name, part in pipe.components.items() if part is None}
    return type(pipe).from_pretrained(folder, local_files_only=True, **absent)


def test_a_saved_pipeline_is_its_base_and_a_fused_one_the_merged_model(build, tmp_path):
    pipe, adapter = build(), adapter_for(build())
    before, alone, wanted = weights_of(pipe), tiny.outputs(pipe), tiny.outputs(tiny.added(build(), adapter))
    load_into(pipe, adapter)
    assert_same_tensors(weights_of(restored(pipe, tmp_path / "plain")), before)
    fuse(pipe)
    assert_computes(restored(pipe, tmp_path / "fused"), wanted, alone)


def test_a_pipeline_made_of_another_shares_its_adapters(two):
    from diffusers import StableDiffusionImg2ImgPipeline

    pipe, one, _ = two
    alone = tiny.outputs(pipe)
    load_into(pipe, one, 0.5, "x")
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert attached(other) == {"x": 0.5}
    unload(other)
    assert attached(pipe) == {}
    assert_same_tensors(tiny.outputs(pipe), alone)


@pytest.mark.parametrize("order", ["before", "after"])
def test_group_offloading_goes_with_adapters(two, order):
    pipe, one, _ = two
    base, cpu = tiny.outputs(pipe), torch.device("cpu")
    steps = [
        lambda: load_into(pipe, one),
        lambda: pipe.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level"),
    ]
    for step in steps if order == "after" else steps[::-1]:
        step()
    assert_computes(pipe, summed((one, 1.0)), base)


def test_adapters_load_into_a_model_whose_weights_wait_elsewhere(two):
    from accelerate import cpu_offload

    pipe, one, _ = two
    base, modules = tiny.outputs(pipe), modules_of(pipe)
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    load_into(pipe, one)
    assert_computes(pipe, summed((one, 1.0)), base)
    with pytest.raises(UnsupportedError, match="offloaded"):
        fuse(pipe)
    unload(pipe)
    assert modules_of(pipe) == modules
    assert_same_tensors(tiny.outputs(pipe), base)


def test_weights_stored_in_eight_bits_carry_adapters(two):
    pipe, one, _ = two
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    alone = tiny.output(pipe.unet)
    load_into(pipe, one)
    layer = tiny.module_of(pipe, "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    x = torch.randn(3, layer.in_features)
    wanted = layer.base(x) + x @ one["unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"].dense().mT
    assert torch.allclose(layer(x), wanted, atol=1e-5)
    assert (tiny.output(pipe.unet) - alone).abs().max() > 0.1 * alone.abs().max()
    unload(pipe)
    assert torch.equal(tiny.output(pipe.unet), alone)


def test_peft_takes_its_own_adapter_off_and_leaves_ours(two, tmp_path):
    pipe, one, _ = two
    base, file = tiny.outputs(pipe), tmp_path / "lora.safetensors"
    write(made.lora(tiny.layers(pipe, "to_q")), file, format="diffusers-lora", base=tiny.save(pipe, tmp_path))
    pipe.load_lora_weights(file)
    load_into(pipe, one)
    pipe.unload_lora_weights()
    assert_computes(pipe, summed((one, 1.0)), base)
    unload(pipe)
    assert_same_tensors(tiny.outputs(pipe), base)


# --- what load_into itself decides -----------------------------------------------------------------------------------


def test_an_adapter_from_the_hub_is_loaded_from_where_it_was_downloaded(two, tmp_path, monkeypatch):
    pipe, one, _ = two
    file = write(one, tmp_path / "deep.safetensors", base=tiny.save(pipe, tmp_path / "base")).path
    asked = []
    monkeypatch.setattr("krona_hub.pipelines.load_adapter.resolve", lambda source: asked.append(source) or file)
    assert load_into(pipe, "ns/my-style@v1").name == "my_style_v1" and asked == ["ns/my-style@v1"]


def test_what_is_no_delta_is_named_and_not_applied(two):
    from dataclasses import replace

    pipe, one, _ = two
    report = load_into(pipe, replace(one, extras={"<toy>": torch.zeros(2, 24)}))
    assert report.extras == ("<toy>",) and "not applied, because they are not weight deltas: <toy>" in str(report)


def test_extras_of_a_file_are_named_too(two, tmp_path):
    from dataclasses import replace

    pipe, one, _ = two
    rich = replace(one, extras={"<toy>": torch.zeros(2, 24)})
    file = tmp_path / "rich.safetensors"
    write(rich, file, base=tiny.save(pipe, tmp_path / "base"))
    assert load_into(pipe, file).extras == ("<toy>",)


def test_a_file_for_an_encoder_that_the_pipeline_lacks_needs_consent(tmp_path):
    pipe = tiny.sdxl()
    adapter = made.lora(tiny.layers(pipe, "to_q", "fc1"))
    file = tmp_path / "a.safetensors"
    write(adapter, file, format="kohya-lora", base=tiny.save(pipe, tmp_path / "base"))
    pipe.text_encoder_2 = None
    with pytest.raises(BaseMismatchError, match="has no second text encoder"):
        load_into(pipe, file)
    assert attached(pipe) == {}
    report = load_into(pipe, file, allow_missing=True)
    assert len(report.matched) == len([n for n in adapter.layers if not n.startswith("text_encoder_2")])
    assert any("second text encoder" in note for note in report.notes)
    unload(pipe)
    with pytest.raises(BaseMismatchError, match="The pipeline has no text_encoder_2"):
        load_into(pipe, adapter)


def test_one_component_of_a_file_can_be_loaded(tmp_path):
    pipe = tiny.sdxl()
    adapter = made.lora(tiny.layers(pipe, "to_q", "fc1"))
    file = tmp_path / "a.safetensors"
    write(adapter, file, format="kohya-lora", base=tiny.save(pipe, tmp_path / "base"))
    report = load_into(pipe, file, component="unet")
    assert {n.partition(".")[0] for n in report.matched} == {"unet"} and report.elsewhere


def test_a_lone_model_loads_a_file_for_it(two, tmp_path):
    pipe, one, _ = two
    base, file = tiny.outputs(pipe), tmp_path / "a.safetensors"
    unet = made.only(one, "unet")
    write(unet, file, format="lycoris-lokr", base=tiny.save(pipe, tmp_path / "base"))
    load_into(pipe.unet, file)
    assert_computes(pipe, summed((unet, 1.0)), base, {"unet"})


def test_a_pipeline_of_a_known_architecture_is_known_by_name():
    assert base_of(tiny.sd15()).family is None
    with torch.device("meta"):
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8)
    assert base_of(unet).family == "sd15"


@pytest.mark.parametrize("sample", SAMPLES[:1], ids=lambda s: s["name"])
def test_a_base_by_name_is_taken_in_the_place_of_the_pipelines_own(sample, golden_base):
    folder, file = shared("golden", "base"), shared("golden", sample["adapter"])
    assert set(load_into(golden_base, file, base=folder, format=None).matched) == set(read(file, base=folder).layers)
    unload(golden_base)


# --- other devices ---------------------------------------------------------------------------------------------------


def test_factors_go_where_the_pipeline_goes(two):
    pipe, one, _ = two
    dora = made.as_dora(one, lambda name: tiny.module_of(pipe, name).weight)
    load_into(pipe, dora)
    pipe.unet.to("meta")
    assert {t.device.type for m in pipe.unet.modules() for t in (*m.parameters(False), *m.buffers(False))} == {"meta"}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_pipeline_on_a_gpu_is_adapted_fused_and_restored_there(two):
    pipe, one, other = two
    pipe.to("cuda", torch.bfloat16)
    before = weights_of(pipe)
    load_into(pipe, one, 0.5, "one")
    load_into(pipe, other, 1.0, "other")
    fuse(pipe)
    base = tiny.sd15().to(dtype=torch.bfloat16)
    for adapter, name, scale in ((one, "one", 0.5), (other, "other", 1.0)):
        load_into(base, adapter, scale, name)
    fuse(base)
    worst = [(a.cpu() - weights_of(base)[key]).abs().max() for key, a in weights_of(pipe).items()]
    assert max(worst) == 0, "float64 sums, rounded once, are the same on every device"
    unload(pipe)
    assert_same_tensors(weights_of(pipe), before)
