"""Adapters around the layers of real models: what they compute, and that nothing else changes."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
from safetensors.torch import load_file
from torch import nn

from krona_hub import Adapter, LayerDelta, read
from krona_hub.errors import (
    AmbiguousError,
    BaseMismatchError,
    ConflictError,
    KronaError,
    NotFoundError,
    ShapeError,
    UnsupportedError,
    UsageError,
)
from krona_hub.layers.attaching import attach, detach, swap
from krona_hub.layers.attachment import attached, extract_adapter, set_scales
from krona_hub.layers.kron_layer import KronLayer
from krona_hub.layers.kron_linear import KronLinear
from tests import tiny
from tests.formats import made
from tests.merging.test_pipelines import Golden
from tests.shared import SHARED, shared

INDEX = SHARED / "golden" / "index.json"
SAMPLES = json.loads(INDEX.read_text())["samples"] if INDEX.exists() else []
PIPELINES = {"sd15": tiny.sd15, "sdxl": tiny.sdxl, "sd3": tiny.sd3, "flux": tiny.flux}


def lora(pipe, *endings: str) -> Adapter:
    return made.lora(tiny.layers(pipe, *endings))


def lokr(pipe, *endings: str) -> Adapter:
    return made.lokr(tiny.layers(pipe, *endings), made.by_lycoris(4), ranks=(None, 2), left_ranks=(None, None, 2))


def assert_close(got, want, limit: float = 2e-5) -> None:
    """Within `limit` of the largest number, part by part."""
    assert got.keys() == want.keys()
    for part, tensor in want.items():
        assert (got[part] - tensor).abs().max() <= limit * tensor.abs().max(), part


def assert_equal(got, want) -> None:
    assert got.keys() == want.keys()
    for part, tensor in want.items():
        assert torch.equal(got[part], tensor), part


def modules(pipe) -> dict[str, int]:
    """Path -> identity of every module."""
    return {f"{c}.{path}": id(m) for c, model in tiny.components(pipe).items() for path, m in model.named_modules()}


def weights(pipe) -> dict[str, torch.Tensor]:
    parts = tiny.components(pipe).items()
    return {f"{c}.{key}": t.clone() for c, model in parts for key, t in model.state_dict().items()}


def with_deltas(pipe, *adapters: tuple[Adapter, float]) -> dict[str, torch.Tensor]:
    """What hooks that add w·ΔW x compute: nothing of ours but ΔW."""
    total: dict[str, torch.Tensor] = {}
    for adapter, weight in adapters:
        for layer, delta in tiny.deltas(pipe, adapter).items():
            total[layer] = total.get(layer, 0) + weight * delta
    with tiny.hooked(pipe, total) as hooked:
        return tiny.outputs(hooked)


# --- every golden adapter --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden() -> Golden:
    return Golden(shared("golden", "base"))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s["name"])
@torch.no_grad()
def test_each_layer_of_a_golden_adapter_gives_the_base_output_and_its_reference_delta(sample, golden):
    deltas = load_file(shared("golden", sample["delta"]))
    adapter = read(shared("golden", sample["adapter"]), base=shared("golden", "base"))
    report = attach(golden, adapter, scale=0.7)
    assert set(report.matched) == set(deltas) and not report.missing
    for layer, delta in deltas.items():
        assert_layer_adds(tiny.module_of(golden, layer), 0.7 * delta)
    detach(golden)


def assert_layer_adds(layer: KronLayer, delta: torch.Tensor) -> None:
    """One layer on its own: base output + ΔW x."""
    delta = delta.float()
    generator = torch.Generator().manual_seed(5)
    if isinstance(layer.base, nn.Linear):
        x = torch.randn(3, 5, layer.in_features, generator=generator)
        added = x @ delta.reshape(delta.shape[:2]).mT
    else:
        x = torch.randn(2, layer.in_channels, 6, 7, generator=generator)
        added = nn.functional.conv2d(x, delta.reshape(layer.weight.shape), None, layer.stride, layer.padding)
    wanted = layer.base(x) + added
    assert (layer(x) - wanted).abs().max() <= 2e-5 * wanted.abs().max()


# --- whole pipelines -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_several_adapters_add_up_and_each_has_its_strength(name):
    pipe = PIPELINES[name]()
    one, two = lora(pipe), lokr(pipe, "to_q", "to_v", "fc1", "conv1", "proj_in")
    before, alone = modules(pipe), tiny.outputs(pipe)
    attach(pipe, one, "one", 0.5)
    attach(pipe, two, "two", -0.4)
    assert attached(pipe) == {"one": 0.5, "two": -0.4}
    assert_close(tiny.outputs(pipe), with_deltas(PIPELINES[name](), (one, 0.5), (two, -0.4)))
    set_scales(pipe, {"one": 0.0, "two": 1.0})
    assert_close(tiny.outputs(pipe), with_deltas(PIPELINES[name](), (two, 1.0)))
    set_scales(pipe, {"two": 0})
    assert_equal(tiny.outputs(pipe), alone)
    detach(pipe, "one")
    assert attached(pipe) == {"two": 0.0}
    detach(pipe)
    assert modules(pipe) == before and attached(pipe) == {}


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("name", PIPELINES)
def test_dora_and_a_lora_beside_it_add_what_their_weights_add(name, axis):
    pipe = PIPELINES[name]()
    dora = made.as_dora(lokr(pipe), lambda layer: tiny.module_of(pipe, layer).weight, axis)
    other = lora(pipe, "to_k", "fc2", "proj_out")
    attach(pipe, dora, "dora", 0.6)
    attach(pipe, other, "other", 0.5)
    assert_close(tiny.outputs(pipe), with_deltas(PIPELINES[name](), (dora, 0.6), (other, 0.5)), 5e-5)
    with pytest.raises(ConflictError, match="DoRA"):
        attach(pipe, dora, "again")
    assert set(attached(pipe)) == {"dora", "other"}


def test_a_refused_second_dora_leaves_nothing_behind():
    pipe = tiny.sd15()
    shapes = tiny.layers(pipe, "to_k", "to_v")
    dora = made.as_dora(made.lora(shapes), lambda layer: tiny.module_of(pipe, layer).weight)
    last = {list(shapes)[-1]: shapes[list(shapes)[-1]]}
    attach(pipe, made.as_dora(made.lora(last), lambda layer: tiny.module_of(pipe, layer).weight), "first")
    before = modules(pipe)
    with pytest.raises(ConflictError, match=list(shapes)[-1].replace(".", r"\.")):
        attach(pipe, dora, "second")
    assert modules(pipe) == before and set(attached(pipe)) == {"first"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_before_or_after_is_the_sum_within_that_precision(dtype):
    want = with_deltas(tiny.sd15(), (lokr(tiny.sd15()), 0.5))
    first, then = tiny.sd15(), tiny.sd15()
    first.to(dtype)
    attach(first, lokr(first), scale=0.5)
    attach(then, lokr(then), scale=0.5)
    then.to(dtype)
    for pipe in (first, then):
        for part, model in tiny.components(pipe).items():
            exact = extract_adapter(model, component=part)
            assert all(t.dtype == torch.float32 for d in exact.layers.values() for t in d.tensors), "numbers are kept"
    layer = "text_encoder.encoder.layers.0.mlp.fc1"
    one, two = (tiny.module_of(pipe, layer) for pipe in (first, then))
    x = torch.randn(3, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = tiny.module_of(tiny.sd15(), layer)
    delta = tiny.deltas(tiny.sd15(), lokr(tiny.sd15()))[layer]
    wanted = x.float() @ (weight.weight + 0.5 * delta).mT + weight.bias
    for kron in (one, two):
        assert kron(x).dtype == dtype
        assert (kron(x).float() - wanted).abs().max() < 4 * torch.finfo(dtype).eps * wanted.abs().max()
    assert want


# --- what fits, and what does not ------------------------------------------------------------------------------------


def test_layers_that_are_not_there_are_counted_and_named_and_nothing_is_attached():
    pipe = tiny.sd15()
    adapter = lora(pipe, "to_q", "fc1")
    some = dict(adapter.layers)
    first = next(iter(some))
    delta = some[first]
    odd = {**some, "unet.nowhere.to_q": delta, "text_encoder_2.encoder.layers.0.mlp.fc1": delta}
    before = modules(pipe)
    with pytest.raises(BaseMismatchError, match=f"{len(some)} of {len(odd)} modules match; not .*text_encoder_2"):
        attach(pipe, Adapter(odd))
    assert modules(pipe) == before
    report = attach(pipe, Adapter(odd), allow_missing=True)
    assert str(report).startswith(f"default: {len(some)} of {len(odd)} modules")
    assert report.missing["text_encoder_2.encoder.layers.0.mlp.fc1"] == "The pipeline has no text_encoder_2."
    assert "no such layer" in report.missing["unet.nowhere.to_q"]
    detach(pipe)
    with pytest.raises(BaseMismatchError, match="0 of 1"):
        attach(pipe, Adapter({"unet.nowhere": delta}), allow_missing=True)


def test_a_layer_of_another_shape_is_named_with_both_shapes():
    pipe = tiny.sd15()
    layer = "text_encoder.encoder.layers.0.mlp.fc1"
    wrong = made.lora({layer: (24, 24)})
    with pytest.raises(BaseMismatchError, match=r"mlp.fc1: .*\(24, 24\), but the layer has \(40, 24\)"):
        attach(pipe, wrong)


def test_a_one_by_one_convolution_and_a_linear_layer_take_the_same_delta():
    pipe = tiny.sd15()
    layer = next(name for name in tiny.layers(pipe, "proj_in"))
    shape = tiny.layers(pipe)[layer]
    assert shape[2:] == (1, 1)
    flat = made.lora({layer: shape[:2]})
    attach(pipe, flat)
    assert_close(tiny.outputs(pipe), with_deltas(tiny.sd15(), (flat, 1.0)))


def test_the_same_name_twice_is_refused_until_it_is_detached():
    pipe = tiny.sd15()
    attach(pipe, lora(pipe), "toy")
    with pytest.raises(ConflictError, match="'toy' is already attached"):
        attach(pipe, lora(pipe, "to_q"), "toy")
    detach(pipe, "toy")
    attach(pipe, lora(pipe, "to_q"), "toy")


@pytest.mark.parametrize("name", ["", "a.b", "keys"])
def test_a_name_that_torch_cannot_have_is_refused(name):
    with pytest.raises(UsageError, match="Invalid adapter name"):
        attach(tiny.sd15(), lora(tiny.sd15()), name)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_strength_must_be_a_number(scale):
    pipe = tiny.sd15()
    with pytest.raises(UsageError, match="strength"):
        attach(pipe, lora(pipe), scale=scale)
    attach(pipe, lora(pipe))
    with pytest.raises(UsageError, match="strength"):
        set_scales(pipe, {"default": scale})


def test_unknown_names_are_answered_with_the_nearest():
    pipe = tiny.sd15()
    attach(pipe, lora(pipe), "teapot")
    for call in (lambda: set_scales(pipe, {"teapto": 1}), lambda: detach(pipe, "teapto"),
                 lambda: extract_adapter(pipe, "teapto")):  # fmt: skip
        with pytest.raises(NotFoundError, match="Did you mean 'teapot'"):
            call()


def test_what_is_no_model_is_refused():
    with pytest.raises(UsageError, match="neither a model nor a pipeline"):
        attach("sd15", lora(tiny.sd15()))
    with pytest.raises(UsageError, match="Unknown component"):
        attach(tiny.sd15(), lora(tiny.sd15()), component="vae")


# --- a model alone ---------------------------------------------------------------------------------------------------


def test_a_model_alone_gets_the_layers_of_its_own_component():
    pipe = tiny.sdxl()
    adapter = lora(pipe)
    report = attach(pipe.unet, adapter)
    assert {layer.partition(".")[0] for layer in report.matched} == {"unet"}
    assert {layer.partition(".")[0] for layer in report.elsewhere} == {"text_encoder", "text_encoder_2"}
    with pytest.raises(AmbiguousError, match="component="):
        attach(pipe.text_encoder_2, adapter)
    attach(pipe.text_encoder_2, adapter, component="text_encoder_2")
    attach(pipe.text_encoder, made.only(adapter, "text_encoder"))
    assert_close(tiny.outputs(pipe), with_deltas(tiny.sdxl(), (adapter, 1.0)))
    assert set(extract_adapter(pipe).layers) == set(adapter.layers)


def test_a_component_of_a_pipeline_can_be_chosen():
    pipe = tiny.sdxl()
    report = attach(pipe, lora(pipe), component="text_encoder_2")
    assert all(layer.startswith("text_encoder_2.") for layer in report.matched) and report.elsewhere
    with pytest.raises(BaseMismatchError, match="has no layers for text_encoder"):
        attach(pipe, made.only(lora(pipe), "unet"), "b", component="text_encoder")
    with pytest.raises(BaseMismatchError, match="The pipeline has no transformer"):
        attach(pipe, lora(pipe), "c", component="transformer")


def test_any_torch_module_takes_an_adapter_by_the_paths_of_its_layers():
    model = nn.Sequential(nn.Linear(6, 4), nn.SiLU(), nn.Sequential(nn.Conv1d(4, 8, 3, bias=False)))
    adapter = made.lora({"unet.0": (4, 6), "unet.2.0": (8, 4, 3)})
    attach(model, adapter)
    x = torch.randn(4, 6)
    hidden = nn.functional.silu(x @ (model[0].weight + adapter["unet.0"].dense()).mT + model[0].bias)
    kernel = model[2][0].weight + adapter["unet.2.0"].dense()
    assert torch.allclose(model(x), nn.functional.conv1d(hidden, kernel), atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_with_and_without_text_model_take_the_same_adapter(prefix):
    encoder = nn.ModuleDict({"encoder": nn.ModuleDict({"fc1": nn.Linear(6, 4)})})
    model = nn.ModuleDict({"text_model": encoder}) if prefix else encoder
    adapter = made.lora({f"text_encoder.{prefix}encoder.fc1": (4, 6)})
    assert attach(model, adapter).matched == ("text_encoder.encoder.fc1",)
    assert isinstance(model.get_submodule(f"{prefix}encoder.fc1"), KronLinear)


# --- with other tools ------------------------------------------------------------------------------------------------


def test_peft_adapters_that_are_loaded_stay_and_both_add():
    from peft import LoraConfig

    pipe = tiny.sd15()
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), "peft")
    before, theirs = modules(pipe), tiny.outputs(pipe)
    ours = lokr(pipe, "to_q", "to_k", "conv1", "base_layer")
    ours = Adapter({k.removesuffix(".base_layer"): d for k, d in ours.layers.items()})
    hooked = copy.deepcopy(pipe)
    attach(pipe, ours)
    deltas = {layer: d.dense() for layer, d in ours.layers.items()}
    assert_close(tiny.outputs(pipe), outputs_with_hooks(hooked, deltas))
    assert (tiny.outputs(pipe)["unet"] - theirs["unet"]).abs().max() > 0.1 * theirs["unet"].abs().max()
    detach(pipe)
    assert modules(pipe) == before
    assert_equal(tiny.outputs(pipe), theirs)


def outputs_with_hooks(pipe, deltas) -> dict[str, torch.Tensor]:
    """As tiny.hooked, for layers that another tool has wrapped."""

    def adding(module, delta):
        inner = getattr(module, "base_layer", module)

        def hook(_, inputs, output):
            if isinstance(inner, nn.Linear):
                return output + inputs[0] @ delta.mT
            return output + nn.functional.conv2d(inputs[0], delta, None, inner.stride, inner.padding)

        return module.register_forward_hook(hook)

    for layer, delta in deltas.items():
        adding(tiny.module_of(pipe, layer), delta)
    return tiny.outputs(pipe)


def test_a_peft_model_is_looked_into():
    from peft import LoraConfig, get_peft_model

    pipe = tiny.sd15()
    model = get_peft_model(tiny.sd15().text_encoder, LoraConfig(r=2, target_modules=["q_proj"]))
    adapter = made.only(lora(pipe, "fc1", "q_proj", "text_model.encoder.layers.0.mlp.fc2"), "text_encoder")
    attach(model, adapter)
    want = with_deltas(pipe, (adapter, 1.0))["text_encoder"]
    assert (tiny.output(model) - want).abs().max() < 2e-5 * want.abs().max(), "PEFT's own LoRA starts at zero"


@pytest.mark.parametrize("name", ["sd15", "flux", "sd3"])
def test_fused_projections_get_their_rows(name):
    pipe = PIPELINES[name]()
    adapter = lokr(pipe, "to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "fc1")
    want = with_deltas(PIPELINES[name](), (adapter, 0.5))
    model = pipe.unet if name == "sd15" else pipe.transformer
    model.fuse_qkv_projections()
    before = modules(pipe)
    attach(pipe, adapter, scale=0.5)
    assert_close(tiny.outputs(pipe), want)
    found = extract_adapter(pipe)
    assert set(found.layers) == set(adapter.layers)
    for layer, delta in adapter.layers.items():
        assert torch.allclose(found[layer].dense(), delta.dense(), atol=1e-6), layer
    swap(pipe, changed(adapter, 2.0))
    assert_close(tiny.outputs(pipe), with_deltas(PIPELINES[name](), (adapter, 1.0)))
    detach(pipe)
    assert modules(pipe) == before


@pytest.mark.parametrize("name", ["sd15", "flux", "sd3"])
def test_projections_are_neither_fused_nor_split_around_adapters(name):
    """diffusers copies base weights alone, and would leave the adapters out without a word."""
    pipe, adapter = PIPELINES[name](), lokr(PIPELINES[name](), "to_q", "to_k")
    model = pipe.unet if name == "sd15" else pipe.transformer
    attach(pipe, adapter, "toy")
    attach(pipe, adapter, "second")
    for carrier in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ConflictError, match="Adapters are attached"):
            carrier.fuse_qkv_projections()
        detach(carrier, "toy")
        with pytest.raises(ConflictError, match="Adapters are attached"):
            carrier.fuse_qkv_projections()
        detach(carrier)
        carrier.fuse_qkv_projections()
        assert "fuse_qkv_projections" not in vars(carrier)
    attach(pipe, adapter)
    with pytest.raises(ConflictError, match="Adapters are attached"):
        model.unfuse_qkv_projections()
    detach(pipe)
    model.unfuse_qkv_projections()


def test_interleaved_rows_and_dora_in_fused_projections():
    pipe = tiny.sd15()
    shapes = tiny.layers(pipe, "to_q", "to_k", "to_v")
    plain = made.lokr(shapes, made.by_lycoris(4), ranks=(None,))
    shuffled = Adapter(
        {
            k: LayerDelta(tuple(replace(s, rows="shuffled") for s in d.sums), d.weight_shape)
            for k, d in plain.layers.items()
        }
    )
    dora = made.as_dora(plain, lambda layer: tiny.module_of(pipe, layer).weight)
    pipe.unet.fuse_qkv_projections()
    attach(pipe, shuffled)
    assert_close(tiny.outputs(pipe), with_deltas(tiny.sd15(), (shuffled, 1.0)))
    found = extract_adapter(pipe)
    assert all(torch.allclose(found[layer].dense(), delta.dense()) for layer, delta in shuffled.layers.items())
    with pytest.raises(BaseMismatchError, match="A fused projection does not support DoRA"):
        attach(pipe, dora, "dora")
    with pytest.raises(UnsupportedError, match="cannot be trained"):
        attach(pipe, plain, "trained", trainable=True)
    assert set(attached(pipe)) == {"default"}


@pytest.mark.slow
def test_a_compiled_model_computes_what_the_plain_one_does():
    torch._dynamo.reset()
    pipe = tiny.flux()
    adapter = made.only(lokr(pipe), "transformer")
    alone = tiny.output(pipe.transformer)
    want = with_deltas(tiny.flux(), (adapter, 0.5))["transformer"]
    model = torch.compile(pipe.transformer, backend="eager")
    compiled_output(model)
    attach(model, adapter, scale=0.5)
    assert (compiled_output(model) - want).abs().max() < 2e-5 * want.abs().max()
    detach(model)
    assert (compiled_output(model) - alone).abs().max() < 2e-5 * alone.abs().max()


@torch.no_grad()
def compiled_output(model) -> torch.Tensor:
    """tiny.output knows models by their class, which torch.compile hides."""
    g = torch.Generator().manual_seed(11)
    noise = [torch.randn(*shape, generator=g) for shape in [(1, 16, 4), (1, 6, 24), (1, 24), (16, 3)]]
    return model(
        hidden_states=noise[0], encoder_hidden_states=noise[1], pooled_projections=noise[2],
        timestep=torch.tensor([0.5]), img_ids=noise[3], txt_ids=torch.zeros(6, 3), guidance=torch.tensor([3.5]),
    ).sample  # fmt: skip


@pytest.mark.slow
def test_blocks_that_are_compiled_one_by_one_are_looked_into():
    torch._dynamo.reset()
    pipe = tiny.flux()
    adapter = made.only(lora(pipe), "transformer")
    block = pipe.transformer.transformer_blocks
    block[0] = torch.compile(block[0], backend="eager")
    pipe.transformer.single_transformer_blocks[0].compile(backend="eager")
    tiny.output(pipe.transformer)
    attach(pipe, adapter)
    assert_close({"t": tiny.output(pipe.transformer)}, {"t": with_deltas(tiny.flux(), (adapter, 1.0))["transformer"]})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_its_own_adapters(copied):
    pipe = tiny.sd15()
    adapter = lokr(pipe)
    attach(pipe.unet, adapter, scale=0.5)
    want = tiny.output(pipe.unet)
    other = copied(pipe.unet)
    assert torch.equal(tiny.output(other), want)
    set_scales(other, {"default": 0.0})
    assert torch.equal(tiny.output(pipe.unet), want) and not torch.equal(tiny.output(other), want)
    detach(other)
    assert torch.equal(tiny.output(other), tiny.output(tiny.sd15().unet))
    loaded = copied(pipe.unet)
    loaded.load_state_dict(pipe.unet.state_dict())
    assert torch.equal(tiny.output(loaded), want)


# --- state -----------------------------------------------------------------------------------------------------------


def test_the_state_dict_of_a_model_does_not_know_of_what_is_attached():
    pipe = tiny.sd15()
    before = weights(pipe)
    attach(pipe, lora(pipe))
    assert_equal(weights(pipe), before)
    pipe.unet.load_state_dict({k: torch.zeros_like(t) for k, t in pipe.unet.state_dict().items()})
    assert all(not t.any() for key, t in weights(pipe).items() if key.startswith("unet."))


def test_layers_made_by_hand_stay_when_others_are_detached():
    model = nn.Sequential(KronLinear(nn.Linear(8, 6), shape=(3, 2), name="mine"), nn.Linear(6, 4))
    mine = model[0]
    attach(model, made.lora({"unet.0": (6, 8), "unet.1": (4, 6)}), "theirs")
    assert set(attached(model)) == {"mine", "theirs"}
    detach(model)
    assert model[0] is mine and attached(model) == {"mine": 1.0} and isinstance(model[1], nn.Linear)
    with pytest.raises(AmbiguousError, match="component="):
        extract_adapter(model, "mine")
    assert set(extract_adapter(model, "mine", component="unet").layers) == {"unet.0"}
    detach(model, "mine")
    assert model[0] is mine and attached(model) == {}


@pytest.mark.parametrize("train", [True, False])
def test_a_model_keeps_its_mode_and_gradients_reach_trainable_factors_alone(train):
    pipe = tiny.sd15()
    model = pipe.text_encoder.train(train)
    adapter = made.only(lokr(pipe, "q_proj", "fc1"), "text_encoder")
    attach(model, adapter, trainable=True)
    kron = tiny.module_of(pipe, "text_encoder.encoder.layers.0.mlp.fc1")
    assert kron.training is train
    model(torch.arange(1, 13)[None]).last_hidden_state.square().sum().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == adapter.parameters
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)


# --- extraction and swapping -----------------------------------------------------------------------------------------


def changed(adapter: Adapter, factor: float) -> Adapter:
    return adapter.with_layers(
        {k: replace(d, sums=tuple(s.scaled(factor) for s in d.sums)) for k, d in adapter.layers.items()}
    )


@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_extracted_is_what_was_attached_whatever_the_scale(name):
    pipe = PIPELINES[name]()
    adapter = lokr(pipe)
    attach(pipe, adapter, scale=0.3)
    found = extract_adapter(pipe)
    assert set(found.layers) == set(adapter.layers)
    for layer, delta in adapter.layers.items():
        assert all(torch.equal(a, b) for a, b in zip(found[layer].tensors, delta.tensors, strict=True)), layer


def test_trained_factors_are_extracted_as_copies():
    pipe = tiny.sd15()
    attach(pipe, lokr(pipe, "to_q"), trainable=True)
    first = extract_adapter(pipe)
    with torch.no_grad():
        for parameter in (p for p in pipe.unet.parameters() if p.requires_grad):
            parameter.mul_(2)
    then = extract_adapter(pipe)
    assert all(not torch.equal(first[k].dense(), then[k].dense()) for k in first.layers)
    assert_close({"unet": tiny.output(pipe.unet)}, {"unet": with_deltas(tiny.sd15(), (then, 1.0))["unet"]})


def test_other_numbers_of_the_same_shapes_are_swapped_in_without_new_modules():
    pipe = tiny.sd15()
    adapter = lokr(pipe)
    attach(pipe, adapter, scale=0.5)
    before = modules(pipe)
    tensors = [b.data_ptr() for m in tiny.components(pipe).values() for b in m.buffers()]
    swap(pipe, changed(adapter, -1.0))
    assert modules(pipe) == before
    assert tensors == [b.data_ptr() for m in tiny.components(pipe).values() for b in m.buffers()]
    assert_close(tiny.outputs(pipe), with_deltas(tiny.sd15(), (adapter, -0.5)))
    assert_close({"x": extract_adapter(pipe)["unet.conv_in"].dense()}, {"x": -adapter["unet.conv_in"].dense()}, 1e-6)


def test_swapping_compiles_nothing_again():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4))
    adapter = made.lokr({"unet.0": (6, 8), "unet.1": (4, 6)}, made.by_lycoris(2))
    attach(model, adapter)
    compiled, x = torch.compile(model, backend=counter), torch.randn(3, 8)
    first = compiled(x)
    swap(model, changed(adapter, 3.0))
    set_scales(model, {"default": 0.5})
    assert not torch.allclose(compiled(x), first) and torch.allclose(compiled(x), model(x), atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda pipe: lora(pipe), "new factors differ in size"),
        (lambda pipe: lokr(pipe, "to_q"), "adapters change different layers"),
        (lambda pipe: made.as_dora(lokr(pipe), lambda k: tiny.module_of(pipe, k).weight), "new factors differ in size"),
    ],
)
def test_a_swap_for_another_build_is_refused_and_changes_nothing(other, message):
    pipe = tiny.sd15()
    attach(pipe, lokr(pipe))
    want = tiny.outputs(pipe)
    with pytest.raises((ShapeError, BaseMismatchError), match=message):
        swap(pipe, other(tiny.sd15()))
    assert_equal(tiny.outputs(pipe), want)


def test_dora_magnitudes_are_swapped_with_the_factors():
    pipe = tiny.sd15()
    first = made.as_dora(lokr(pipe), lambda layer: tiny.module_of(pipe, layer).weight)
    attach(pipe, first)
    second = changed(first, 0.5).with_layers(
        {k: replace(d, magnitude=d.magnitude * 1.1) for k, d in changed(first, 0.5).layers.items()}
    )
    swap(pipe, second)
    assert_close(tiny.outputs(pipe), with_deltas(tiny.sd15(), (second, 1.0)), 5e-5)


def test_quantised_and_unknown_layers_are_refused_by_name():
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.in_features, self.out_features = 8, 6
            self.register_buffer("weight", torch.zeros(24, 1, dtype=torch.uint8))

        def forward(self, x):
            return x[..., :6] * 2

    model = nn.Sequential(Packed())
    adapter = made.lora({"unet.0": (6, 8)})
    attach(model, adapter)
    x = torch.randn(3, 8)
    assert torch.allclose(model(x), x[:, :6] * 2 + x @ adapter["unet.0"].dense().mT, atol=1e-5)
    detach(model)
    dora = Adapter({"unet.0": replace(adapter["unet.0"], magnitude=torch.ones(6))})
    with pytest.raises(KronaError, match=r"unet\.0: .*base weight"):
        attach(model, dora)
    assert isinstance(model[0], Packed)
