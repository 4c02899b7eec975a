"""Vectors in merges: each changes its parameter by strength · vector, rounded once, and is listed and undone."""

import re
from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

from krona_hub import merge, plan_merge, unmerge, verify, write
from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.bases.loading import load_base
from krona_hub.bases.module_spec import Placement
from krona_hub.cli.merge_command import plan_document, report_document
from krona_hub.errors import BaseMismatchError, ShapeError, UnsupportedError, UsageError
from krona_hub.kron.terms import as_lora
from krona_hub.merging.arithmetic.patches import Patch
from krona_hub.merging.state_dict import apply_to_state_dict
from tests import tiny
from tests.extraction.test_layouts import as_ldm
from tests.formats import made as formats_made
from tests.merging.made import contents
from tests.merging.oracle import merged, rounded

FILES = {"transformer": "transformer/x.safetensors", "text_encoder": "text_encoder/model.safetensors"}
SHAPES = {
    "transformer.blocks.0.attn1.to_q.weight": (24, 16),
    "transformer.blocks.0.attn1.to_q.bias": (24,),
    "transformer.blocks.0.norm1.weight": (16,),
    "transformer.blocks.0.norm1.bias": (16,),
    "transformer.blocks.0.scale_shift_table": (1, 6, 16),
    "transformer.scale_shift_table": (6, 16),
    "text_encoder.encoder.layers.0.self_attn.q_proj.weight": (12, 20),
    "text_encoder.encoder.layers.0.layer_norm1.weight": (20,),
}
LAYERS = ("transformer.blocks.0.attn1.to_q", "text_encoder.encoder.layers.0.self_attn.q_proj")
PARAMETERS = tuple(name for name in SHAPES if name.removesuffix(".weight") not in LAYERS)
STORED = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


def rand(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def base_of(folder, dtype=torch.bfloat16):
    """A model of two components; the text encoder has the names of transformers 4."""
    for i, (component, file) in enumerate(FILES.items()):
        (folder / component).mkdir(parents=True)
        own = {name: shape for name, shape in SHAPES.items() if name.startswith(f"{component}.")}
        tensors = {name: rand(*shape, seed=7 + i).to(dtype) for name, shape in own.items()}
        inside = "text_model." if component == "text_encoder" else ""
        save_file({inside + n.removeprefix(f"{component}."): t for n, t in tensors.items()}, folder / file)
    return folder


def tensors_of(folder):
    """Every tensor by canonical name."""
    return {
        f"{component}.{n.removeprefix('text_model.')}": t
        for component, file in FILES.items()
        for n, t in load_file(folder / file).items()
    }


def adapter_of(*names, seed=0, dtype=torch.float32, size=0.3):
    """LoRAs of layers and vectors of parameters; the rank of the LoRA is not its alpha."""
    layers, vectors = {}, {}
    for name in names:
        if name in LAYERS:
            out, in_ = SHAPES[f"{name}.weight"]
            layers[name] = LayerDelta((as_lora(0.7 * rand(out, 3, seed=seed), rand(3, in_, seed=seed)),), (out, in_))
        else:
            vectors[name] = (size * rand(*SHAPES[name], seed=seed)).to(dtype)
    return Adapter(layers, vectors=vectors)


def summed(weight, parts, name):
    return weight.double() + sum(w * a.vectors[name].double() for a, w in parts if name in a.vectors)


def assert_nearest(found, wanted, dtype):
    """The sum rounded once; in float32 sums may differ by a unit."""
    if dtype == torch.float32:
        torch.testing.assert_close(found.double(), wanted, rtol=2e-7, atol=1e-7)
    else:
        assert torch.equal(found.float(), rounded(wanted, dtype).float())


# --- the law ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("vector_dtype", [torch.float32, torch.bfloat16])
def test_a_parameter_becomes_the_rounded_sum_of_all_adapters(stored, vector_dtype, tmp_path):
    base = base_of(tmp_path / "base", STORED[stored])
    parts = [
        (adapter_of(*LAYERS, *PARAMETERS, dtype=vector_dtype), 0.8),
        (adapter_of(*PARAMETERS[:3], seed=5, dtype=vector_dtype), -1.3),
    ]
    report = merge(base, parts, tmp_path / "out", exact_rounding=True)
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    for name in PARAMETERS:
        assert after[name].dtype == STORED[stored] and after[name].shape == SHAPES[name]
        assert_nearest(after[name], summed(before[name], parts, name), STORED[stored])
        assert not torch.equal(after[name].float(), before[name].float())
    plain = merge(base, [(replace(a, vectors={}), w) for a, w in parts[:1]], tmp_path / "plain", exact_rounding=True)
    for layer in LAYERS:  # the layers are merged as without vectors
        name = f"{layer}.weight"
        assert torch.equal(after[name].view(torch.uint8), tensors_of(tmp_path / "plain")[name].view(torch.uint8))
    assert len(report.tensors) == len(SHAPES) and len(plain.tensors) == len(LAYERS)


@pytest.mark.parametrize("out_dtype", ["fp32-touched", "fp16", "bf16"])
def test_vectors_follow_the_output_dtype(out_dtype, tmp_path):
    base, adapter = base_of(tmp_path / "base", torch.bfloat16), adapter_of(*PARAMETERS)
    merge(base, [(adapter, 0.5)], tmp_path / "out", out_dtype=out_dtype, exact_rounding=True)
    wanted = {"fp32-touched": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[out_dtype]
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    for name in PARAMETERS:
        assert after[name].dtype == wanted
        assert_nearest(after[name], summed(before[name], [(adapter, 0.5)], name), wanted)


def test_stochastic_rounding_keeps_a_small_vector_on_average(tmp_path):
    (tmp_path / "base/transformer").mkdir(parents=True)
    number, shape = 4096, {"blocks.0.attn1.to_q.weight": (24, 16), "blocks.0.norm1.weight": (4096,)}
    save_file({n: torch.ones(s).bfloat16() for n, s in shape.items()}, tmp_path / "base" / FILES["transformer"])
    step = 2.0**-11  # a sixteenth of a unit of bfloat16 at 1
    adapter = Adapter({}, vectors={"transformer.blocks.0.norm1.weight": torch.full((number,), step)})
    found = {}
    for mode in ("nearest", "stochastic"):
        report = merge(tmp_path / "base", [(adapter, 1.0)], tmp_path / mode, rounding=mode)
        found[mode] = load_file(tmp_path / mode / FILES["transformer"])["blocks.0.norm1.weight"].double() - 1
        assert report.tensors[0].share_lost >= 1
    assert not found["nearest"].any()
    spread = (step * (2.0**-7 - step) / number) ** 0.5
    assert abs(float(found["stochastic"].mean()) - step) < 5 * spread


def test_the_report_measures_what_rounding_loses_of_a_vector(tmp_path):
    base, adapter = base_of(tmp_path / "base"), adapter_of(*PARAMETERS, size=0.01)
    report = merge(base, [(adapter, 0.5)], tmp_path / "out")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    found = {t.layers: t for t in report.tensors}
    assert set(found) == {(name,) for name in PARAMETERS}
    for name in PARAMETERS:
        wanted = 0.5 * adapter.vectors[name].double()
        lost = after[name].double() - before[name].double() - wanted
        assert found[name,].wanted == pytest.approx(float(wanted.norm()), rel=1e-5)
        assert found[name,].lost == pytest.approx(float(lost.norm()), rel=1e-3)
        assert found[name,].share_lost > 0.05


@pytest.mark.parametrize("swap", [False, True])
def test_a_vector_lands_on_the_rows_and_halves_of_a_fused_bias(swap):
    stored, vector = rand(30).half(), rand(8, seed=3)
    delta = Adapter({}, vectors={"unet.x.bias": vector}).delta("unet.x.bias")
    found, _ = merged(stored, [Patch(delta, -0.4, Placement("unet.x.bias", (10, 18), swap))])
    turned = torch.cat([vector[4:], vector[:4]]) if swap else vector
    wanted = stored.double()
    wanted[10:18] += -0.4 * turned.double()
    assert torch.equal(found, rounded(wanted, torch.float16))


@pytest.mark.parametrize("shape", [(96,), (6, 16), (1, 6, 16), (96, 1, 1)])
def test_a_table_may_be_stored_in_another_shape(shape):
    stored, vector = rand(*shape).bfloat16(), rand(1, 6, 16, seed=3)
    found, _ = merged(
        stored, [Patch(Adapter({}, vectors={"unet.x": vector}).delta("unet.x"), 0.6, Placement("unet.x"))]
    )
    assert torch.equal(found, rounded(stored.double() + 0.6 * vector.double().reshape(shape), torch.bfloat16))


def test_a_scalar_parameter_is_a_vector_too():
    delta = Adapter({}, vectors={"text_encoder.logit_scale": torch.tensor(0.25)}).delta("text_encoder.logit_scale")
    found, _ = merged(torch.tensor(2.0), [Patch(delta, 2.0, Placement("text_encoder.logit_scale"))])
    assert found.shape == () and float(found) == 2.5


# --- strengths, components, block weights ----------------------------------------------------------------------------


def test_strength_zero_changes_no_byte(tmp_path):
    base = base_of(tmp_path / "base")
    report = merge(base, [(adapter_of(*LAYERS, *PARAMETERS), 0.0)], tmp_path / "out")
    assert contents(tmp_path / "out") == contents(base) and not report.tensors


def test_a_component_leaves_the_vectors_of_others_alone(tmp_path):
    base, adapter = base_of(tmp_path / "base"), adapter_of(*LAYERS, *PARAMETERS)
    report = merge(base, [(adapter, 1.0)], tmp_path / "out", component="text_encoder")
    assert {name for t in report.tensors for name in t.layers} == {
        name for name in (*LAYERS, *PARAMETERS) if name.startswith("text_encoder.")
    }
    assert report.adapters[0].match_summary == "1 of 1 modules and 1 of 1 vectors matched"


def test_block_weights_match_the_module_of_a_parameter(tmp_path):
    base, adapter = base_of(tmp_path / "base", torch.float32), adapter_of(*PARAMETERS)
    blocks = {r"norm1$": 0.5, r"to_q$": 0.0, r"^transformer\.scale": 2.0}
    merge(base, [(adapter, 0.8)], tmp_path / "out", block_weights=blocks)
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    factors = dict.fromkeys(PARAMETERS, 1.0) | {
        "transformer.blocks.0.norm1.weight": 0.5, "transformer.blocks.0.norm1.bias": 0.5,
        "text_encoder.encoder.layers.0.layer_norm1.weight": 0.5, "transformer.blocks.0.attn1.to_q.bias": 0.0,
        "transformer.scale_shift_table": 2.0,
    }  # fmt: skip
    for name, factor in factors.items():
        assert_nearest(after[name], summed(before[name], [(adapter, 0.8 * factor)], name), torch.float32)
    with pytest.raises(UsageError, match="matches no layer"):
        plan_merge(base, [(adapter, 0.8)], block_weights={"nowhere": 1.0})


def test_every_variant_of_a_component_is_merged(tmp_path):
    base, adapter = base_of(tmp_path / "base", torch.float32), adapter_of(*PARAMETERS)
    file = base / FILES["transformer"]
    save_file({n: t.half() for n, t in load_file(file).items()}, file.with_name("x.fp16.safetensors"))
    report = merge(base, [(adapter, 1.0)], tmp_path / "out")
    own = [n for n in PARAMETERS if n.startswith("transformer.")]
    assert len(report.tensors) == len(PARAMETERS) + len(own)
    half = load_file((tmp_path / "out" / FILES["transformer"]).with_name("x.fp16.safetensors"))
    for name in own:
        path = name.removeprefix("transformer.")
        before = load_file(file)[path].half()
        torch.testing.assert_close(half[path].double(), summed(before, [(adapter, 1.0)], name), rtol=1e-3, atol=1e-3)


# --- matching --------------------------------------------------------------------------------------------------------


def test_the_plan_counts_and_lists_vectors(tmp_path):
    base, adapter = base_of(tmp_path / "base"), adapter_of(*LAYERS, *PARAMETERS)
    plan = plan_merge(base, [(adapter, 1.0)])
    count = len(PARAMETERS)
    assert plan.adapters[0].match_summary == f"2 of 2 modules and {count} of {count} vectors matched"
    document = plan_document(plan)
    assert {x for f in document["files"] for t in f["tensors"] for x in t["layers"]} == {*LAYERS, *PARAMETERS}
    report = report_document(merge(base, [(adapter, 1.0)], tmp_path / "out"))
    assert {x for t in report["tensors"] for x in t["layers"]} == {*LAYERS, *PARAMETERS}
    assert [(a.vectors, a.total_vectors) for a in report["adapters"]] == [(len(PARAMETERS),) * 2]
    plain = plan_merge(base, [(adapter_of(*LAYERS), 1.0)])
    assert plain.adapters[0].match_summary == "2 of 2 modules matched"
    alone = plan_merge(base, [(adapter_of(*PARAMETERS[:2]), 1.0)])
    assert alone.adapters[0].match_summary == "2 of 2 vectors matched"


WRONG = {
    "missing": ({"transformer.blocks.9.norm1.weight": torch.ones(16)}, "no such parameter"),
    "size": ({"transformer.blocks.0.norm1.weight": torch.ones(12)}, "its vector is 12, but the parameter is 16"),
    "dimensions": (
        {"transformer.blocks.0.scale_shift_table": torch.ones(6, 16)}, "is 6x16, but the parameter is 1x6x16",
    ),
    "component": ({"unet.conv_in.bias": torch.ones(4)}, r"no .*U-Net|no .*unet|no such parameter"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "allowed"), list(product(WRONG, (False, True))))
def test_a_vector_without_its_parameter_is_an_unmatched_module(kind, allowed, tmp_path):
    base, adapter = base_of(tmp_path / "base"), adapter_of(*LAYERS, PARAMETERS[0])
    wrong, why = WRONG[kind]
    adapter = replace(adapter, vectors={**adapter.vectors, **wrong})
    if not allowed:
        with pytest.raises(BaseMismatchError, match="2 of 2 modules and 1 of 2 vectors of the adapter") as error:
            plan_merge(base, [(adapter, 1.0)])
        assert next(iter(wrong)) in str(error.value) and re.search(why, str(error.value))
        return
    report = merge(base, [(adapter, 1.0)], tmp_path / "out", allow_missing=True)
    assert set(report.adapters[0].missing) == set(wrong) and len(report.tensors) == len(LAYERS) + 1


def test_an_adapter_of_which_nothing_matches_is_an_error_even_if_missing_vectors_are_allowed(tmp_path):
    base = base_of(tmp_path / "base")
    with pytest.raises(BaseMismatchError, match="0 of 1 vectors"):
        plan_merge(base, [(Adapter({}, vectors={"transformer.x.bias": torch.ones(3)}), 1.0)], allow_missing=True)


def test_a_quantized_parameter_is_not_changed(tmp_path):
    base, name = base_of(tmp_path / "base"), "blocks.0.norm1.weight"
    tensors = load_file(base / FILES["transformer"])
    save_file(tensors | {name: torch.ones(16, dtype=torch.int8)}, base / FILES["transformer"])
    with pytest.raises(UnsupportedError, match="I8"):
        plan_merge(base, [(adapter_of(f"transformer.{name}"), 1.0)])


def test_embeddings_are_noted_as_not_merged(tmp_path):
    adapter = replace(adapter_of(*PARAMETERS), extras={"<toy>": torch.ones(3)})
    notes = plan_merge(base_of(tmp_path / "base"), [(adapter, 1.0)]).notes
    assert any("<toy>" in note and "1 embedding" in note and "norms" not in note for note in notes)


# --- undo ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out_dtype", ["keep", "fp32-touched"])
def test_unmerge_restores_the_base_byte_for_byte(out_dtype, tmp_path):
    base, undo = base_of(tmp_path / "base"), tmp_path / "undo.safetensors"
    parts = [(adapter_of(*LAYERS, *PARAMETERS), 0.8)]
    merge(base, parts, tmp_path / "out", undo=undo, out_dtype=out_dtype)
    unmerge(tmp_path / "out", undo, tmp_path / "back")
    assert contents(tmp_path / "back") == contents(base) != contents(tmp_path / "out")


# --- state dicts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", ["own", "component", "transformers 4"])
def test_a_state_dict_gets_the_vectors(names, tmp_path):
    adapter = adapter_of(*LAYERS, *PARAMETERS)
    component = "text_encoder" if names == "transformers 4" else "transformer"
    tensors = {n: t for n, t in tensors_of(base_of(tmp_path / "base")).items() if n.startswith(f"{component}.")}
    prefix = {"own": "", "component": f"{component}.", "transformers 4": "text_model."}[names]
    state = {prefix + n.removeprefix(f"{component}."): t for n, t in tensors.items()}
    found = apply_to_state_dict(state, [(adapter, 0.8), (adapter_of(PARAMETERS[1], seed=4), 0.0)], component=component)
    merge(tmp_path / "base", [(adapter, 0.8)], tmp_path / "out")
    for name, wanted in tensors_of(tmp_path / "out").items():
        if name.startswith(f"{component}."):
            assert torch.equal(found[prefix + name.removeprefix(f"{component}.")], wanted), name


def test_a_vector_that_a_state_dict_lacks_is_an_error_unless_allowed(tmp_path):
    state = {n: t for n, t in tensors_of(base_of(tmp_path / "base")).items() if "norm1.bias" not in n}
    adapter = adapter_of(*LAYERS, *PARAMETERS)
    with pytest.raises(BaseMismatchError, match=r"5 of 6 vectors.*norm1\.bias"):
        apply_to_state_dict(state, adapter)
    found = apply_to_state_dict(state, adapter, allow_missing=True)
    changed = {n for n in state if not torch.equal(state[n], found[n])}
    assert changed == {*state} and found.keys() == state.keys()
    short = {**state, "transformer.blocks.0.norm1.bias": torch.ones(12)}
    with pytest.raises((BaseMismatchError, ShapeError), match=r"norm1\.bias"):
        apply_to_state_dict(short, adapter)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl")
    tiny.save(tiny.sdxl(), folder)
    return folder


def vectors_of(folder, *names):
    """Random vectors for parameters of a model, by their shapes in it."""
    return {name: 0.3 * torch.randn(load_base(folder).parameter(name)) for name in names}


@pytest.mark.parametrize("format", ["krona", "lycoris-locon"])
def test_the_vectors_of_a_file_are_merged_and_verified(format, sdxl, tmp_path):
    layers = formats_made.lora({"unet.mid_block.attentions.0.proj_in": (64, 64)}).layers
    block = "unet.mid_block.attentions.0"
    names = ("unet.conv_in.bias", *(f"{block}.{name}" for name in ("proj_in.bias", "norm.weight", "norm.bias")))
    adapter = Adapter(layers, vectors=vectors_of(sdxl, *names))
    path = tmp_path / "x.safetensors"
    write(adapter, path, format=format, base=sdxl)
    plan = plan_merge(sdxl, [(path, 0.7)])
    assert plan.adapters[0].match_summary == "1 of 1 modules and 4 of 4 vectors matched"
    merge(sdxl, [(path, 0.7)], tmp_path / "out")
    merge(sdxl, [(adapter, 0.7)], tmp_path / "wanted")
    before, after, wanted = (
        load_file(next((f / "unet").glob("*.safetensors"))) for f in (sdxl, tmp_path / "out", tmp_path / "wanted")
    )
    for name in names:
        path_in = name.removeprefix("unet.")
        torch.testing.assert_close(after[path_in], before[path_in] + 0.7 * adapter.vectors[name])
    for name in before:
        torch.testing.assert_close(after[name], wanted[name], rtol=1e-6, atol=1e-7)
    assert verify(tmp_path / "out", base=sdxl, adapters=[(path, 0.7)]).same
    fit = verify(path, base=sdxl)
    assert fit.same and (fit.matched_vectors, fit.total_vectors) == (4, 4)


def test_a_vector_of_a_file_that_the_base_lacks_is_unmatched(sdxl, tmp_path):
    layers = formats_made.lora({"unet.mid_block.attentions.0.proj_in": (64, 64)}).layers
    adapter = Adapter(layers, vectors={"unet.nowhere.bias": torch.ones(3), "unet.conv_in.bias": torch.ones(5)})
    write(adapter, tmp_path / "x.safetensors")
    with pytest.raises(BaseMismatchError, match="1 of 1 modules and 0 of 2 vectors"):
        plan_merge(sdxl, [(tmp_path / "x.safetensors", 1.0)])
    fit = verify(tmp_path / "x.safetensors", base=sdxl)
    assert not fit.same and (fit.matched_vectors, fit.total_vectors) == (0, 2) and len(fit.problems) == 2


def test_original_names_get_the_vectors_too(sdxl, tmp_path):
    """The U-Net of SDXL under the names of its authors, as a state dict."""
    adapter = Adapter({}, vectors=vectors_of(sdxl, "unet.mid_block.attentions.0.norm.weight", "unet.conv_in.bias"))
    file = as_ldm(sdxl, tmp_path / "ldm.safetensors")
    state = load_file(file)
    found = apply_to_state_dict(state, adapter, base=sdxl, component="unet")
    changed = {name for name in state if not torch.equal(state[name], found[name])}
    assert changed == {
        "model.diffusion_model.middle_block.1.norm.weight", "model.diffusion_model.input_blocks.0.0.bias",
    }  # fmt: skip
