"""Vectors beside the layers of an adapter: the model with base + strength · vector as its parameters."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from krona_hub import Adapter, extract_adapter, load_into, unload
from krona_hub.errors import BaseMismatchError, ConflictError, NonFiniteError, NotFoundError, ShapeError
from krona_hub.layers import attach, attached, branches_of, detach, fuse, set_scales, swap, unfuse
from krona_hub.layers.attachment import vector_branches_of, without
from tests import tiny
from tests.formats import made
from tests.layers.test_attaching import assert_close, assert_equal, modules, weights
from tests.merging.oracle import rounded

STRENGTHS = (0.0, 0.7, -1.0)


class Toy(nn.Module):
    """One of each kind of module whose parameters can have vectors, and a parameter of the block itself."""

    def __init__(self):
        from diffusers.models.normalization import RMSNorm

        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(2, 6))
        self.lin = nn.Linear(10, 6)
        self.layer_norm = nn.LayerNorm(6)
        self.rms = RMSNorm(6, eps=1e-6, elementwise_affine=True)
        self.conv = nn.Conv2d(6, 8, 3, padding=1)
        self.group_norm = nn.GroupNorm(4, 8)
        self.last = nn.Linear(8, 4, bias=False)

    def forward(self, x):
        x = self.rms(self.layer_norm(self.lin(x)) * (1 + self.scale_shift_table[0]) + self.scale_shift_table[1])
        x = self.group_norm(self.conv(x.movedim(-1, 1)))
        return self.last(x.movedim(1, -1).tanh())


VECTORS = (
    "lin.bias", "conv.bias", "layer_norm.weight", "layer_norm.bias", "group_norm.weight", "group_norm.bias",
    "rms.weight", "scale_shift_table",
)  # fmt: skip
LAYERS = {"unet.lin": (6, 10), "unet.conv": (8, 6, 3, 3), "unet.last": (4, 8)}


def toy(dtype=torch.float64) -> Toy:
    torch.manual_seed(3)
    model = Toy().requires_grad_(False)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model.to(dtype)


def only_vectors(model, *names: str, seed: int = 5, size: float = 1.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: model.state_dict()[name].shape for name in names}
    return Adapter({}, vectors={f"unet.{n}": size * torch.randn(s, generator=generator) for n, s in shapes.items()})


def both(model, *names: str, seed: int = 5) -> Adapter:
    vectors = only_vectors(model, *names, seed=seed).vectors
    return Adapter(made.lora(LAYERS, ranks=(2 + seed % 2,)).layers, vectors=vectors)


def merged(model, *adapters: tuple[Adapter, float]):
    """A copy of the model with base + Σ strength · (ΔW or vector) in its state_dict."""
    model = copy.deepcopy(model)
    state = model.state_dict()
    for adapter, strength in adapters:
        deltas = {f"{layer}.weight": delta.dense() for layer, delta in adapter.layers.items()}
        for name, delta in {**deltas, **adapter.vectors}.items():
            key = name.partition(".")[2]
            state[key] += strength * delta.to(state[key]).reshape(state[key].shape)
    model.load_state_dict(state)
    return model


def inputs(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, 5, 7, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def assert_same(got: torch.Tensor, want: torch.Tensor, limit: float = 1e-6) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    assert (got - want).abs().max() <= limit * want.abs().max()


# --- what is computed ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("name", VECTORS)
def test_a_vector_alone_gives_the_output_of_the_changed_parameter(name, strength):
    model = toy()
    adapter, before = only_vectors(model, name), model(inputs())
    report = attach(model, adapter, scale=strength)
    assert report.vectors == (f"unet.{name}",) and report.matched == ()
    want = merged(toy(), (adapter, strength))(inputs())
    assert_same(model(inputs()), want)
    assert torch.equal(want, before) == (strength == 0)
    if not strength:
        assert torch.equal(model(inputs()), before)


@pytest.mark.parametrize("strength", STRENGTHS)
def test_vectors_and_layers_give_the_output_of_the_merged_model(strength):
    model = toy()
    adapter = both(model, *VECTORS)
    report = attach(model, adapter, scale=strength)
    assert str(report) == "default: 3 of 3 modules and 8 of 8 vectors"
    assert_same(model(inputs()), merged(toy(), (adapter, strength))(inputs()))


def test_two_adapters_add_up_at_strengths_that_change():
    model = toy()
    one, two = both(model, *VECTORS), both(model, "lin.bias", "rms.weight", seed=6)
    alone = model(inputs())
    attach(model, one, "one", 0.5)
    attach(model, two, "two", -0.4)
    assert attached(model) == {"one": 0.5, "two": -0.4}
    assert_same(model(inputs()), merged(toy(), (one, 0.5), (two, -0.4))(inputs()))
    set_scales(model, {"one": 0.0, "two": 1.5})
    assert_same(model(inputs()), merged(toy(), (two, 1.5))(inputs()))
    set_scales(model, {"two": 0.0})
    assert torch.equal(model(inputs()), alone)
    set_scales(model, {"one": 1.0, "two": 1.0})
    detach(model, "one")
    assert_same(model(inputs()), merged(toy(), (two, 1.0))(inputs()))


@pytest.mark.parametrize("axis", ["out", "in"])
def test_dora_leaves_the_changed_bias_alone(axis):
    model = toy()
    plain = both(model, "lin.bias", "conv.bias")
    dora = made.as_dora(plain, lambda layer: model.get_submodule(layer.partition(".")[2]).weight, axis)
    dora = Adapter(dora.layers, vectors=plain.vectors)
    attach(model, dora)
    want = copy.deepcopy(toy())
    for layer, delta in dora.layers.items():
        weight = want.get_submodule(layer.partition(".")[2]).weight
        weight += delta.dense(weight).reshape(weight.shape)
    assert_same(model(inputs()), merged(want, (Adapter({}, vectors=plain.vectors), 1.0))(inputs()))


def test_a_small_trained_layer_uses_the_changed_bias():
    model = toy(torch.float32)
    adapter = both(model, "lin.bias", "conv.bias", "layer_norm.weight")
    attach(model, adapter, scale=0.7, trainable=True)
    out = model(inputs(torch.float32))
    assert_same(out, merged(toy(torch.float32), (adapter, 0.7))(inputs(torch.float32)), 1e-5)
    out.sum().backward()
    assert all(p.grad is not None for branch in branches_of(model) for p in branch.parameters())
    assert all(p.grad is None for p in toy().parameters())
    assert_equal(extract_adapter(model, component="unet").vectors, adapter.vectors)


def test_disabled_branches_and_vectors_give_the_base_model():
    model = toy()
    alone = model(inputs())
    attach(model, both(model, *VECTORS), scale=0.7)
    enabled = model(inputs())
    with without([*branches_of(model), *vector_branches_of(model)]):
        assert torch.equal(model(inputs()), alone)
    assert torch.equal(model(inputs()), enabled) and not torch.equal(enabled, alone)


# --- removed without a trace -----------------------------------------------------------------------------------------


def test_unloading_restores_every_bit_class_and_module():
    model = toy(torch.bfloat16)
    base, tree = {k: v.clone() for k, v in model.state_dict().items()}, [(type(m), id(m)) for m in model.modules()]
    before, attributes = model(inputs(torch.bfloat16)), [set(vars(m)) for m in model.modules()]
    for name in ("one", "two"):
        load_into(model, both(model, *VECTORS), 0.7, name)
    assert_equal(model.state_dict(), base)
    unload(model, "one")
    unload(model)
    assert [(type(m), id(m)) for m in model.modules()] == tree
    assert [set(vars(m)) for m in model.modules()] == attributes
    assert_equal(model.state_dict(), base)
    assert torch.equal(model(inputs(torch.bfloat16)), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fused_parameters_are_the_true_sum_rounded_once_and_come_back_bit_by_bit(dtype):
    model = toy(dtype)
    one, two = both(model, *VECTORS), only_vectors(model, "rms.weight", "lin.bias", seed=8)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    attach(model, one, "one", 0.7)
    attach(model, two, "two", -0.3)
    assert fuse(model) == len(LAYERS) + len(VECTORS)
    state = model.state_dict()
    for key in VECTORS:
        total = 0.7 * one.vectors[f"unet.{key}"].double()
        if f"unet.{key}" in two.vectors:
            total -= 0.3 * two.vectors[f"unet.{key}"].double()
        assert torch.equal(state[key], rounded(base[key].double() + total, dtype)), key
    plain = toy(dtype)
    plain.load_state_dict(state)
    assert torch.equal(model(inputs(dtype)), plain(inputs(dtype)))
    for call in (lambda: fuse(model), lambda: set_scales(model, {"two": 1.0}), lambda: attach(model, one, "third")):
        with pytest.raises(ConflictError, match="unfuse"):
            call()
    unfuse(model)
    assert_equal(model.state_dict(), base)
    assert attached(model) == {"one": 0.7, "two": -0.3}


def test_detaching_takes_fused_vectors_out_and_zero_is_not_fused():
    model = toy()
    base = {k: v.clone() for k, v in model.state_dict().items()}
    attach(model, only_vectors(model, *VECTORS), "one", 0.0)
    assert fuse(model) == 0
    unfuse(model)
    set_scales(model, {"one": 0.5})
    assert fuse(model) == len(VECTORS)
    detach(model)
    assert_equal(model.state_dict(), base)


def test_a_vector_that_overflows_is_refused_and_nothing_is_changed():
    model = toy(torch.float16)
    base = {k: v.clone() for k, v in model.state_dict().items()}
    attach(model, both(model, "rms.weight"))
    attach(model, only_vectors(model, "lin.bias", size=1e7), "large")
    with pytest.raises(NonFiniteError, match=r"unet\.lin\.bias overflows"):
        fuse(model)
    assert_equal(model.state_dict(), base)
    set_scales(model, {"large": 0.0})


# --- moves, copies, compiled graphs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_numbers_of_the_file_survive_a_cast_and_are_rounded_once(dtype):
    model = toy(torch.float32)
    adapter = only_vectors(model, *VECTORS)
    attach(model, adapter, scale=0.7)
    model.to(dtype)
    base = toy(dtype).state_dict()
    for key in VECTORS:
        module, _, own = key.rpartition(".")
        want = (base[key].float() + 0.7 * adapter.vectors[f"unet.{key}"]).to(dtype)
        assert torch.equal(getattr(model.get_submodule(module), own), want), key
    assert_equal(extract_adapter(model, component="unet").vectors, adapter.vectors)
    model.to(torch.float64)
    want = merged(toy(torch.float32).to(dtype).double(), (adapter, 0.7))(inputs())
    assert_same(model(inputs()), want)


def test_copies_and_pickles_have_their_own_adapters():
    model = toy()
    adapter = both(model, *VECTORS)
    attach(model, adapter, scale=0.7)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    want, alone = model(inputs()), toy()(inputs())
    loaded = torch.load(file, weights_only=False)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(other(inputs()), want)
        set_scales(other, {"default": 0.0})
        assert torch.equal(other(inputs()), alone)
        detach(other)
        assert torch.equal(other(inputs()), alone)
    assert torch.equal(model(inputs()), want)


def test_the_state_dict_is_that_of_the_base_and_can_be_loaded():
    model, other = toy(), toy(torch.float32).double()
    attach(model, both(model, *VECTORS), scale=0.7)
    state = {key: tensor + 1 for key, tensor in other.state_dict().items()}
    assert model.state_dict().keys() == state.keys()
    model.load_state_dict(state)
    other.load_state_dict(state)
    assert_same(model(inputs()), merged(other, (both(toy(), *VECTORS), 0.7))(inputs()))


@pytest.mark.parametrize("first", [False, True])
def test_one_graph_serves_every_strength_and_swap(first):
    """Compiled before or after the adapter is attached."""
    torch._dynamo.reset()
    model, counter = toy(torch.float32), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    x, graphs = inputs(torch.float32), 0
    if first:
        compiled(x)
        graphs = counter.frame_count
    one, two = both(model, *VECTORS), both(model, *VECTORS, seed=6)
    attach(compiled, one, scale=0.7)
    for strength in (0.7, 0.0, -1.0):
        set_scales(compiled, {"default": strength})
        assert_same(compiled(x), merged(toy(torch.float32), (one, strength))(x), 1e-4)
    swap(compiled, both(model, *VECTORS, seed=5))
    assert_same(compiled(x), merged(toy(torch.float32), (one, -1.0))(x), 1e-4)
    assert counter.frame_count == graphs + 1
    with pytest.raises(ShapeError):
        swap(compiled, two)
    torch._dynamo.reset()


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shape", "cause"),
    [
        ("last.bias", (4,), "no parameter 'bias'"),
        ("nowhere.bias", (4,), "no such layer"),
        ("group_norm.weight", (6,), r"shape \(6,\), but the parameter has \(8,\)"),
        ("tables.scale_shift_table", (2, 6), "no such layer"),
    ],
)
def test_vectors_that_do_not_fit_are_named_and_nothing_is_attached(name, shape, cause):
    model = toy()
    tree, base = [type(m) for m in model.modules()], model(inputs())
    fitting = both(model, *VECTORS)
    odd = Adapter(fitting.layers, vectors={**fitting.vectors, f"unet.{name}": torch.ones(shape)})
    total = len(LAYERS) + len(odd.vectors)
    with pytest.raises(
        BaseMismatchError, match=f"{total - 1} of {total} modules and vectors match; not unet.{name}. .*{cause}"
    ):
        attach(model, odd)
    assert [type(m) for m in model.modules()] == tree and torch.equal(model(inputs()), base)
    report = attach(model, odd, allow_missing=True)
    assert list(report.missing_vectors) == [f"unet.{name}"] and not report.missing
    assert f"{len(odd.vectors) - 1} of {len(odd.vectors)} vectors" in str(report)


def test_names_of_adapters_with_only_vectors_are_known():
    model = toy()
    attach(model, only_vectors(model, "rms.weight"), "teapot")
    with pytest.raises(ConflictError, match="already attached"):
        attach(model, only_vectors(model, "lin.bias"), "teapot")
    for call in (
        lambda: set_scales(model, {"teapto": 1}),
        lambda: detach(model, "teapto"),
        lambda: extract_adapter(model, "teapto"),
        lambda: swap(model, only_vectors(model, "lin.bias"), "teapto"),
    ):
        with pytest.raises(NotFoundError, match="Did you mean 'teapot'"):
            call()
    assert list(extract_adapter(model, "teapot").vectors) == ["unet.rms.weight"]
    assert branches_of(model, "teapot") == []


def test_swapping_refuses_other_vectors():
    model = toy()
    attach(model, only_vectors(model, "rms.weight"))
    with pytest.raises(BaseMismatchError, match=r"different vectors: 1 differ, unet\.lin\.bias"):
        swap(model, only_vectors(model, "rms.weight", "lin.bias"))
    new = only_vectors(model, "rms.weight", seed=9)
    set_scales(model, {"default": 0.7})
    swap(model, new)
    assert_same(model(inputs()), merged(toy(), (new, 0.7))(inputs()))


# --- pipelines -------------------------------------------------------------------------------------------------------


def everything(pipe) -> Adapter:
    """A LoRA of every layer, and a vector for every other parameter of the denoiser and the text encoder."""
    layers = tiny.layers(pipe)
    generator = torch.Generator().manual_seed(4)
    found = {
        f"{component}.{name.removeprefix('text_model.')}": torch.randn(p.shape, generator=generator) * 0.1
        for component, model in tiny.components(pipe).items()
        for name, p in model.named_parameters()
        if f"{component}.{name.removeprefix('text_model.').removesuffix('.weight')}" not in layers
    }
    return Adapter(made.lora(layers).layers, vectors=found)


@torch.no_grad()
def changed(pipe, adapter: Adapter, strength: float):
    for name, vector in adapter.vectors.items():
        path, _, key = name.rpartition(".")
        component = tiny.components(pipe).get(path)
        getattr(component or tiny.module_of(pipe, path), key).add_(vector, alpha=strength)
    for layer, delta in adapter.layers.items():
        weight = tiny.module_of(pipe, layer).weight
        weight += strength * delta.dense().reshape(weight.shape)
    return pipe


@pytest.mark.parametrize("build", [tiny.sd15, tiny.sd3, tiny.flux])
def test_a_pipeline_with_every_vector_is_the_merged_pipeline(build):
    pipe = build()
    adapter, before, tree, base = everything(pipe), tiny.outputs(pipe), modules(pipe), weights(pipe)
    report = load_into(pipe, adapter, 0.3, "toy")
    assert set(report.vectors) == set(adapter.vectors) and len(report.vectors) > 20
    assert_close(tiny.outputs(pipe), tiny.outputs(changed(build(), adapter, 0.3)), 1e-4)
    assert_equal(extract_adapter(pipe, "toy").vectors, adapter.vectors)
    fuse(pipe)
    assert_close(tiny.outputs(pipe), tiny.outputs(changed(build(), adapter, 0.3)), 1e-4)
    unfuse(pipe)
    assert_equal(weights(pipe), base)
    set_scales(pipe, {"toy": 0.0})
    assert_equal(tiny.outputs(pipe), before)
    unload(pipe)
    assert modules(pipe) == tree
    assert_equal(tiny.outputs(pipe), before)


@pytest.mark.parametrize("build", [tiny.sd3, tiny.flux])
def test_vectors_of_fused_projections_are_added_to_their_rows(build):
    pipe = build()
    adapter = everything(pipe)
    want = tiny.outputs(changed(build(), adapter, 0.3))
    pipe.transformer.fuse_qkv_projections()
    base = weights(pipe)
    attach(pipe, adapter, scale=0.3)
    assert_close(tiny.outputs(pipe), want, 1e-4)
    assert_equal(extract_adapter(pipe).vectors, adapter.vectors)
    with pytest.raises(ConflictError, match="Adapters are attached"):
        pipe.transformer.unfuse_qkv_projections()
    fuse(pipe)
    assert_close(tiny.outputs(pipe), want, 1e-4)
    detach(pipe)
    assert_equal(weights(pipe), base)


def test_projections_are_not_fused_around_vectors_alone():
    pipe = tiny.flux()
    vectors = {k: v for k, v in everything(pipe).vectors.items() if k.endswith("to_q.bias")}
    attach(pipe, Adapter({}, vectors=vectors))
    with pytest.raises(ConflictError, match="Adapters are attached"):
        pipe.transformer.fuse_qkv_projections()
    detach(pipe)
    pipe.transformer.fuse_qkv_projections()


def test_vectors_of_other_components_are_counted():
    pipe = tiny.sd15()
    adapter = everything(pipe)
    report = attach(pipe.unet, adapter)
    others = sum(name.startswith("text_encoder.") for name in adapter.vectors)
    assert f"{len(report.elsewhere)} layers and {others} vectors are for other components" in str(report)
    report = attach(pipe.text_encoder, Adapter({}, vectors=adapter.vectors), component="text_encoder")
    assert len(report.vectors) == others


def test_vectors_reach_the_layers_inside_of_peft_adapters_and_are_the_biases_of_peft():
    """PEFT's lora_bias adds scaling · bias to the output, which is a vector at the bias."""
    from peft import LoraConfig

    def wrapped(**options):
        pipe = tiny.sd15()
        torch.manual_seed(0)
        config = LoraConfig(r=2, lora_alpha=3, target_modules=["to_out.0", "conv1"], init_lora_weights=False, **options)
        pipe.unet.add_adapter(config, "peft")
        return pipe.unet

    theirs, ours = wrapped(lora_bias=True), wrapped()
    state = theirs.state_dict()
    vectors = {}
    for path, module in ours.named_modules():
        if hasattr(module, "base_layer"):
            bias = state[f"{path}.lora_B.peft.bias"].normal_()
            vectors[f"unet.{path}.bias"] = 1.5 * bias
            for side in ("A", "B"):
                key = f"lora_{side}.peft.weight"
                module.get_parameter(key).data.copy_(state[f"{path}.{key}"])
    before = [type(m) for m in ours.modules()]
    report = attach(ours, Adapter({}, vectors=vectors))
    assert len(report.vectors) > 5
    assert_close({"x": tiny.output(ours)}, {"x": tiny.output(theirs)})
    detach(ours)
    assert [type(m) for m in ours.modules()] == before


# --- with other tools ------------------------------------------------------------------------------------------------


def group_offload(pipe) -> None:
    cpu = torch.device("cpu")
    pipe.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def eight_bits(pipe) -> None:
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def offload(pipe) -> None:
    from accelerate import cpu_offload

    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))


@pytest.mark.parametrize(
    ("tool", "order"),
    [
        (group_offload, "before"),
        (group_offload, "after"),
        (offload, "before"),
        (eight_bits, "before"),
        (eight_bits, "after"),
    ],
)
def test_vectors_reach_parameters_that_wait_elsewhere_or_in_eight_bits(tool, order):
    pipe, other = tiny.sd15(), tiny.sd15()
    vectors = {name: v for name, v in everything(pipe).vectors.items() if name.startswith("unet.")}
    adapter = Adapter({}, vectors=vectors)
    for step in (tool, lambda pipe: load_into(pipe, adapter, 0.3))[:: 1 if order == "before" else -1]:
        step(pipe)
    if tool is eight_bits:
        other.unet.load_state_dict({name: tensor.float() for name, tensor in pipe.unet.state_dict().items()})
    want = tiny.output(changed(other, adapter, 0.3).unet)
    assert_close({"unet": tiny.output(pipe.unet)}, {"unet": want}, 1e-4)


def test_peft_takes_its_adapter_off_and_leaves_the_vectors(tmp_path):
    from krona_hub import write

    pipe, file = tiny.sd15(), tmp_path / "lora.safetensors"
    before = modules(pipe)
    write(made.lora(tiny.layers(pipe, "to_out.0")), file, format="diffusers-lora", base=tiny.save(pipe, tmp_path))
    vectors = Adapter({}, vectors=everything(pipe).vectors)
    pipe.load_lora_weights(file)
    load_into(pipe, vectors, 0.3, "toy")
    pipe.unload_lora_weights()
    assert_close(tiny.outputs(pipe), tiny.outputs(changed(tiny.sd15(), vectors, 0.3)), 1e-4)
    unload(pipe)
    assert modules(pipe) == before


def test_a_saved_model_is_the_base_under_its_own_class(tmp_path):
    """Even if the model itself has a parameter with a vector."""
    from diffusers import PixArtTransformer2DModel

    torch.manual_seed(0)
    model = PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=16, sample_size=8, caption_channels=12, use_additional_conditions=False,
    )  # fmt: skip
    base = {k: v.clone() for k, v in model.state_dict().items()}
    tables = [name for name in base if name.endswith("scale_shift_table")]
    assert "scale_shift_table" in tables and len(tables) == 2
    vectors = {f"transformer.{name}": torch.ones_like(base[name]) for name in tables}
    assert len(attach(model, Adapter({}, vectors=vectors)).vectors) == 2
    assert torch.equal(model.scale_shift_table, base["scale_shift_table"] + 1)
    model.save_pretrained(tmp_path)
    assert_equal(PixArtTransformer2DModel.from_pretrained(tmp_path).state_dict(), base)
    fuse(model)
    model.save_pretrained(tmp_path)
    fused = PixArtTransformer2DModel.from_pretrained(tmp_path).state_dict()
    assert torch.equal(fused["scale_shift_table"], base["scale_shift_table"] + 1)
