"""Merging from end to end on tiny pipelines: the merged model computes what the base with the adapter computes.

The reference is the base with a plain hook on every layer that adds F.linear(x, w·ΔW), ΔW taken from the reference
files where there are any: nothing of the merge, and for golden files nothing of the reader either.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from krona_hub import apply_to_state_dict, combine, extract, merge, unmerge, verify, write
from krona_hub.formats.writing.encode import cast
from tests import single_file, tiny
from tests.formats import made
from tests.merging.oracle import rounded
from tests.shared import SHARED, shared

INDEX = SHARED / "golden" / "index.json"
SAMPLES = json.loads(INDEX.read_text())["samples"] if INDEX.exists() else []
PIPELINES = {"sd15": tiny.sd15, "sdxl": tiny.sdxl, "flux": tiny.flux}
WEIGHT = 0.7


def assert_computes(pipe, wanted: dict[str, torch.Tensor], base: dict[str, torch.Tensor], changed=None, least=1e-2):
    """Within float32 rounding of what is wanted, and far from the base where the adapter changes something."""
    got = tiny.outputs(pipe)
    for name, want in wanted.items():
        size = want.abs().max()
        assert (got[name] - want).abs().max() < 2e-5 * size, name
        if changed is None or name in changed:
            assert (want - base[name]).abs().max() > least * size, f"{name} is hardly changed: this shows nothing"


def contents(path: Path) -> dict[str, str]:
    """Relative path -> sha256, of a file or of every file of a folder."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# --- every golden format's kind --------------------------------------------------------------------------------------


class Golden:
    """The tiny base of the golden files, in the shape that `tests.tiny` knows pipelines in."""

    def __init__(self, folder: Path):
        from diffusers import UNet2DConditionModel
        from transformers import CLIPTextModel

        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval()


@pytest.fixture(scope="module")
def golden_base() -> Golden:
    return Golden(shared("golden", "base"))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s["name"])
def test_a_golden_adapter_merged_computes_what_its_reference_delta_computes(sample, golden_base, tmp_path):
    base, adapter = shared("golden", "base"), shared("golden", sample["adapter"])
    deltas = load_file(shared("golden", sample["delta"]))
    report = merge(base, [(adapter, WEIGHT)], tmp_path / "merged", undo=tmp_path / "undo.safetensors")
    with tiny.hooked(golden_base, deltas, WEIGHT) as pipe:
        wanted = tiny.outputs(pipe)
    changed = {layer.partition(".")[0] for layer in deltas}
    assert_computes(Golden(tmp_path / "merged"), wanted, tiny.outputs(golden_base), changed, least=1e-3)
    assert verify(tmp_path / "merged", base=base, adapters=[(adapter, WEIGHT)]).same
    unmerge(tmp_path / "merged", tmp_path / "undo.safetensors", tmp_path / "restored")
    assert contents(tmp_path / "restored") == contents(base)
    assert report


PEFT = [s for s in SAMPLES if s["format"].startswith("peft_")]


@pytest.mark.parametrize("sample", PEFT, ids=lambda s: s["name"])
def test_a_golden_peft_adapter_merged_is_what_peft_merges(sample, golden_base, tmp_path):
    from peft import PeftModel

    base, adapter = shared("golden", "base"), shared("golden", sample["adapter"])
    merge(base, [(adapter, 1.0)], tmp_path / "merged")
    ours, component = Golden(tmp_path / "merged"), sample["component"]
    model = getattr(Golden(base), component)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()
    changed = 0
    for name, tensor in getattr(ours, component).state_dict().items():
        difference = (tensor - theirs[name]).abs().max()
        assert difference <= 2e-6 * theirs[name].abs().max(), name
        changed += not torch.equal(tensor, getattr(golden_base, component).state_dict()[name])
    assert changed == len(load_file(shared("golden", sample["delta"])))


# --- pipelines of three families in every layout ---------------------------------------------------------------------


def save_folder(pipe, path: Path, **options) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe.save_pretrained(path, **options)
    return path


def load_folder(pipe, path: Path, **options):
    """A pipeline of the same class from the merged folder."""
    absent = {name: None for name, part in pipe.components.items() if part is None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return type(pipe).from_pretrained(path, local_files_only=True, **absent, **options)


LAYOUTS = {
    "folder": (save_folder, load_folder),
    "sharded folder": (lambda pipe, path: save_folder(pipe, path, max_shard_size="200KB"), load_folder),
    "fp16 variant beside the plain one": (
        lambda pipe, path: save_folder(pipe, save_folder(pipe, path), variant="fp16"), load_folder,
    ),
    "single file": (single_file.save, single_file.load),
}  # fmt: skip


def two_adapters(pipe, layout: str = "") -> list[tuple]:
    """A LoRA of every layer and a LoKr of every second one, at strengths of both signs."""
    shapes = tiny.layers(pipe)
    if layout == "single file" and hasattr(pipe, "transformer"):
        shapes = {k: s for k, s in shapes.items() if k.startswith("transformer")}  # BFL's file has nothing else
    half = dict(list(shapes.items())[::2])
    return [(made.lora(shapes), WEIGHT), (made.lokr(half, made.by_lycoris(4)), -0.4)]


def added_up(pipe, adapters) -> dict[str, torch.Tensor]:
    """Layer -> Σ w·ΔW."""
    total: dict[str, torch.Tensor] = {}
    for adapter, weight in adapters:
        for layer, delta in tiny.deltas(pipe, adapter).items():
            total[layer] = total.get(layer, 0) + weight * delta
    return total


def computed_with(pipe, deltas) -> dict[str, torch.Tensor]:
    with tiny.hooked(pipe, deltas) as hooked:
        return tiny.outputs(hooked)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", PIPELINES)
def test_two_adapters_in_a_pipeline_merged_verified_and_taken_out_again(name, layout, tmp_path):
    pipe, (save, load) = PIPELINES[name](), LAYOUTS[layout]
    adapters = two_adapters(pipe, layout)
    end = ".safetensors" if layout == "single file" else ""
    base, out, undo = tmp_path / f"base{end}", tmp_path / f"out{end}", tmp_path / "undo.safetensors"
    save(pipe, base)
    with single_file.known(f"tiny-{name}", tiny.save(pipe, tmp_path / "plain")):
        merge(base, adapters, out, undo=undo)
        deltas = added_up(pipe, adapters)
        parts = {layer.partition(".")[0] for layer in deltas}
        alone, wanted = tiny.outputs(pipe), computed_with(PIPELINES[name](), deltas)
        assert_computes(load(PIPELINES[name](), out), {k: wanted[k] for k in parts}, alone)
        if "variant" in layout:
            assert_computes(load(PIPELINES[name](), out, variant="fp16"), {k: wanted[k] for k in parts}, alone)
        assert verify(out, base=base, adapters=adapters).same
        assert not verify(out, base=base, adapters=[(adapters[0][0], 0.3), adapters[1]]).same
        unmerge(out, undo, tmp_path / f"restored{end}")
    assert contents(tmp_path / f"restored{end}") == contents(base)
    assert set(contents(out)) == set(contents(base)), "the output has the layout of the base"


FORMATS = {
    "kohya-lora": made.lora, "lycoris-locon": made.lora, "diffusers-lora": made.lora, "peft-lora": made.lora,
    "krona": made.lora, "lycoris-lokr": lambda shapes: made.lokr(shapes, made.by_lycoris(4)),
    "peft-lokr": lambda shapes: made.lokr(shapes, made.by_peft(4)),
}  # fmt: skip


@pytest.mark.parametrize("format_name", FORMATS)
@pytest.mark.parametrize("name", PIPELINES)
def test_an_adapter_file_of_any_format_merges_into_any_pipeline(name, format_name, tmp_path):
    pipe = PIPELINES[name]()
    denoiser = "transformer." if name == "flux" else "unet."
    adapter = FORMATS[format_name]({k: s for k, s in tiny.layers(pipe).items() if k.startswith(denoiser)})
    base, file = save_folder(pipe, tmp_path / "base"), tmp_path / "adapter"
    file = file if format_name.startswith("peft") else file.with_suffix(".safetensors")
    write(adapter, file, format=format_name, base=base)
    merge(base, [(file, WEIGHT)], tmp_path / "out")
    wanted = computed_with(PIPELINES[name](), added_up(pipe, [(adapter, WEIGHT)]))
    merged = load_folder(pipe, tmp_path / "out")
    assert_computes(merged, wanted, tiny.outputs(pipe), {denoiser[:-1]})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", PIPELINES)
def test_a_half_precision_pipeline_is_the_true_sum_rounded_once(name, dtype, tmp_path):
    pipe = PIPELINES[name]()
    for model in tiny.components(pipe).values():
        model.to(dtype)
    adapters = two_adapters(pipe)
    base = save_folder(pipe, tmp_path / "base")
    report = merge(base, adapters, tmp_path / "out", exact_rounding=True)
    merged = load_folder(pipe, tmp_path / "out", torch_dtype=dtype)
    for layer, delta in added_up(pipe, [(to_double(a), w) for a, w in adapters]).items():
        weight = tiny.module_of(pipe, layer).weight
        wanted = rounded(weight.double() + delta.reshape(weight.shape), dtype)
        assert torch.equal(tiny.module_of(merged, layer).weight, wanted), layer
    assert report.share_lost > 0


def to_double(adapter):
    """The adapter with factors in float64, so that its dense ΔW is the true one."""
    return adapter.with_layers({name: cast(delta, torch.float64) for name, delta in adapter.layers.items()})


# --- fused on one side only ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["folder", "single file"])
def test_a_flux_lora_with_fused_modules_goes_into_split_and_fused_bases(layout, tmp_path):
    pipe, (save, load) = tiny.flux(), LAYOUTS[layout]
    adapter = made.only(made.lora(tiny.layers(pipe, "to_q", "to_k", "to_v", "proj_mlp", "norm1.linear")), "transformer")
    file, base = tmp_path / "fused.safetensors", tmp_path / "base.safetensors"
    plain = tiny.save(pipe, tmp_path / "plain")
    assert write(adapter, file, format="kohya-lora", base=plain).modules < len(adapter), "some modules are fused"
    save(pipe, base)
    with single_file.known("tiny-flux", plain):
        merge(base, [(file, WEIGHT)], tmp_path / "out.safetensors")
        wanted = computed_with(tiny.flux(), added_up(pipe, [(adapter, WEIGHT)]))
        merged = load(tiny.flux(), tmp_path / "out.safetensors")
    assert_computes(merged, {"transformer": wanted["transformer"]}, tiny.outputs(pipe))


# --- the other verbs, with a merge as their witness ------------------------------------------------------------------


@pytest.mark.parametrize("name", PIPELINES)
def test_merging_a_combination_is_merging_its_parts(name, tmp_path):
    pipe = PIPELINES[name]()
    adapters, base = two_adapters(pipe), save_folder(pipe, tmp_path / "base")
    combine(adapters, tmp_path / "both.safetensors")
    merge(base, [(tmp_path / "both.safetensors", 1.0)], tmp_path / "out")
    wanted = computed_with(PIPELINES[name](), added_up(pipe, adapters))
    assert_computes(load_folder(pipe, tmp_path / "out"), wanted, tiny.outputs(pipe))


@pytest.mark.slow
@pytest.mark.parametrize("name", PIPELINES)
def test_what_is_extracted_from_a_merge_makes_the_same_model_again(name, tmp_path):
    pipe = PIPELINES[name]()
    base = save_folder(pipe, tmp_path / "base")
    adapter = made.lora(tiny.layers(pipe, "to_q", "to_v", "proj_in", "conv1", "q_proj", "fc1"))
    merge(base, [(adapter, WEIGHT)], tmp_path / "tuned")
    found = extract(base, tmp_path / "tuned", tmp_path / "found.safetensors")
    assert {x.layer for x in found.layers} == set(adapter.layers), "and nothing else has changed"
    merge(base, [(tmp_path / "found.safetensors", 1.0)], tmp_path / "again")
    wanted, alone = tiny.outputs(load_folder(pipe, tmp_path / "tuned")), tiny.outputs(pipe)
    for part, got in tiny.outputs(load_folder(pipe, tmp_path / "again")).items():
        change = (wanted[part] - alone[part]).abs().max()
        assert (got - wanted[part]).abs().max() < 1e-3 * change, part


@pytest.mark.parametrize("name", PIPELINES)
def test_weights_in_memory_get_what_files_get(name, tmp_path):
    pipe = PIPELINES[name]()
    adapters, base = two_adapters(pipe), save_folder(pipe, tmp_path / "base")
    merge(base, adapters, tmp_path / "out")
    merged = load_folder(pipe, tmp_path / "out")
    for component, model in tiny.components(pipe).items():
        part = [(made.only(adapter, component), weight) for adapter, weight in adapters]
        state = apply_to_state_dict(model.state_dict(), part, base=base, component=component)
        for key, tensor in getattr(merged, component).state_dict().items():
            assert torch.equal(state[key], tensor), key
