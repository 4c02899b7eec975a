"""Merge plans from headers: matches, errors and sizes, and merges that follow them."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from krona_hub import merge, plan_merge, write
from krona_hub.adapters.adapter import Adapter
from krona_hub.adapters.provenance import BaseModel
from krona_hub.bases.loading import load_base, read, weight_files
from krona_hub.checkpoints.header import read_header
from krona_hub.checkpoints.relayout import PAGE
from krona_hub.errors import (
    AmbiguousError,
    BaseMismatchError,
    ConflictError,
    IncompleteError,
    NonFiniteError,
    PickleError,
    StructureError,
    UnknownBaseError,
    UnsupportedError,
    UsageError,
)
from tests import tiny
from tests.formats import made

WEIGHT = 0.7


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline folder of Stable Diffusion 1.5's shape."""
    pipe = tiny.sd15()
    folder = tmp_path_factory.mktemp("base")
    tiny.save(pipe, folder)
    return folder


@pytest.fixture(scope="module")
def shapes():
    return tiny.layers(tiny.sd15(), "to_q", "to_k", "proj_in", "conv1", "fc1")


@pytest.fixture
def adapter(base, shapes, tmp_path):
    """A file of the LoRA of some layers in both components."""
    path = tmp_path / "lora.safetensors"
    write(made.lora(shapes), path, format="kohya-lora", base=base)
    return path


def weights(folder) -> dict[str, torch.Tensor]:
    return {layer: read(place) for layer, place in weight_files(folder).items()}


def assert_merged(folder, base, deltas, out=None):
    """Every layer is W + its delta, or the base's own where there is none."""
    before, after = weights(base), weights(folder)
    for layer, weight in before.items():
        if layer not in deltas:
            assert torch.equal(after[layer], weight), layer
            continue
        wanted = weight.double() + deltas[layer].double().reshape(weight.shape)
        assert after[layer].dtype == (out or weight.dtype)
        largest = weight.abs().max() + deltas[layer].abs().max()  # parts of a sum may cancel in single numbers
        allowed = 2 * torch.finfo(after[layer].dtype).eps * largest
        assert ((after[layer].double() - wanted).abs() <= allowed).all(), layer


# --- what is planned is what is done ---------------------------------------------------------------------------------


def test_files_are_planned_without_torch(base, adapter):
    code = (
        "import sys, krona_hub; plan = krona_hub.plan_merge(sys.argv[1], [(sys.argv[2], 0.5)]);"
        "print(len(plan.tensors), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(base), str(adapter)], capture_output=True, text=True)
    count, imported = done.stdout.split()
    assert int(count) > 10 and imported == "False", done.stderr


@pytest.mark.parametrize("out_dtype", ["keep", "fp32-touched", "fp16", "bf16"])
def test_the_plan_tells_the_bytes_that_the_merge_writes(out_dtype, base, shapes, adapter, tmp_path):
    plan = plan_merge(base, [(adapter, WEIGHT)], out_dtype=out_dtype)
    report = merge(base, [(adapter, WEIGHT)], tmp_path / "out", out_dtype=out_dtype)
    assert {t.tensor for t in report.tensors} == {t.name for t in plan.tensors}
    assert len(plan.tensors) == len(shapes) and report.bytes_touched == plan.bytes_to_touch
    headers = [read_header(p) for p in (tmp_path / "out").rglob("*.safetensors")]
    before = sum(h.file_size - h.data_start for h in plan.tree.headers.values())
    assert sum(h.file_size - h.data_start for h in headers) == before + plan.growth
    written = sum(p.stat().st_size for p in (tmp_path / "out").rglob("*") if p.is_file())
    assert 0 <= written - plan.disk <= PAGE * len(headers), "the record takes a page of each file"
    want = {"keep": torch.float32, "fp32-touched": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    deltas = {n: WEIGHT * d.dense() for n, d in made.lora(shapes).layers.items()}
    stored = {t.dtype for t in weights(tmp_path / "out").values()}
    assert stored == {want[out_dtype]}
    if out_dtype in ("keep", "fp32-touched"):
        assert_merged(tmp_path / "out", base, deltas)


def test_every_shard_of_a_changed_component_gets_the_type_that_is_asked_for(shapes, tmp_path):
    tiny.sd15().unet.save_pretrained(tmp_path / "base/unet", max_shard_size="200KB")
    tiny.sd15().text_encoder.save_pretrained(tmp_path / "base/text_encoder")
    name = next(n for n in shapes if n.startswith("unet."))
    report = merge(
        tmp_path / "base", [(made.lora({name: shapes[name]}), 1.0)], tmp_path / "out", out_dtype="bf16"
    )  # one tensor, in one shard
    assert len(report.tensors) == 1 and len(report.files) == len([*(tmp_path / "base/unet").glob("*.safetensors")]) > 2
    types = {n.partition(".")[0]: set() for n in weights(tmp_path / "out")}
    for layer, tensor in weights(tmp_path / "out").items():
        types[layer.partition(".")[0]].add(tensor.dtype)
    assert types == {"unet": {torch.bfloat16}, "text_encoder": {torch.float32}}
    index = json.loads((tmp_path / "out/unet/diffusion_pytorch_model.safetensors.index.json").read_text())
    headers = [read_header(p) for p in (tmp_path / "out/unet").glob("*.safetensors")]
    assert index["metadata"]["total_size"] == sum(h.file_size - h.data_start for h in headers)


def test_fp32_touched_widens_what_adapters_touch_and_nothing_else(base, shapes, adapter, tmp_path):
    half = tmp_path / "half"
    for name, model in tiny.components(tiny.sd15()).items():
        model.half().save_pretrained(half / name)
    report = merge(half, [(adapter, WEIGHT)], tmp_path / "out", out_dtype="fp32-touched")
    after = weights(tmp_path / "out")
    assert {n for n, t in after.items() if t.dtype == torch.float32} == set(shapes)
    assert report.share_lost < 1e-6
    deltas = {n: WEIGHT * d.dense() for n, d in made.lora(shapes).layers.items()}
    for layer, delta in deltas.items():
        wanted = weights(half)[layer].double() + delta.double().reshape(after[layer].shape)
        assert torch.allclose(after[layer].double(), wanted, rtol=3e-7, atol=1e-7)


def test_the_share_that_rounding_took_is_the_true_one(base, shapes, adapter, tmp_path):
    half = tmp_path / "half"
    for name, model in tiny.components(tiny.sd15()).items():
        model.bfloat16().save_pretrained(half / name)
    report = merge(half, [(adapter, 0.003)], tmp_path / "out")
    before, after = weights(half), weights(tmp_path / "out")
    wanted = {n: 0.003 * d.dense().double() for n, d in made.lora(shapes).layers.items()}
    lost = sum(
        ((after[n].double() - before[n].double()) - d.reshape(before[n].shape)).square().sum()
        for n, d in wanted.items()
    )
    share = (lost / sum(d.square().sum() for d in wanted.values())).sqrt()
    assert report.share_lost == pytest.approx(float(share), rel=1e-4) and 0.1 < share < 2
    for tensor in report.tensors:
        (layer,) = tensor.layers
        assert tensor.wanted == pytest.approx(float(wanted[layer].norm()), rel=1e-5)


# --- several adapters, weights ---------------------------------------------------------------------------------------


def test_adapters_add_up_at_their_weights(base, shapes, tmp_path):
    one, two = made.lora(shapes), made.lokr(dict(list(shapes.items())[::2]), made.by_lycoris(4))
    merge(base, [(one, 0.5), (two, -1.25), (one, 0.25)], tmp_path / "out")
    deltas = {n: 0.75 * d.dense() for n, d in one.layers.items()}
    for n, d in two.layers.items():
        deltas[n] = deltas[n] - 1.25 * d.dense()
    assert_merged(tmp_path / "out", base, deltas)


def test_block_weights_multiply_the_weight(base, shapes, adapter, tmp_path):
    merge(base, [(adapter, 0.5)], tmp_path / "out", block_weights={r"text_encoder\.": 0.0, "to_q$": -2.0})
    factors = {n: 0.0 if n.startswith("text") else -2.0 if n.endswith("to_q") else 1.0 for n in shapes}
    deltas = {n: 0.5 * factors[n] * d.dense() for n, d in made.lora(shapes).layers.items() if factors[n]}
    assert_merged(tmp_path / "out", base, deltas)


def test_a_weight_of_zero_leaves_every_byte(base, adapter, tmp_path):
    report = merge(base, [(adapter, 0.0)], tmp_path / "out")
    for path in base.rglob("*.safetensors"):
        assert (tmp_path / "out" / path.relative_to(base)).read_bytes() == path.read_bytes()
    assert report.tensors == () and "every strength is 0" in report.notes[0]


def test_one_component_may_be_merged_alone(base, shapes, adapter, tmp_path):
    report = merge(base, [(adapter, 1.0)], tmp_path / "out", component="text_encoder")
    mine = {n: d for n, d in made.lora(shapes).layers.items() if n.startswith("text_encoder.")}
    assert report.adapters[0].matched == report.adapters[0].total == len(mine) > 0
    assert_merged(tmp_path / "out", base, {n: d.dense() for n, d in mine.items()})


def test_a_component_folder_takes_its_part_of_an_adapter(base, adapter, shapes, tmp_path):
    with pytest.raises(BaseMismatchError, match=r"\d+ of \d+ modules .* unmatched: lora_te_"):
        plan_merge(base / "unet", [(adapter, 1.0)])
    for options in ({"component": "unet"}, {"allow_missing": True}):
        plan = plan_merge(base / "unet", [(adapter, 1.0)], **options)
        assert len(plan.tensors) == sum(n.startswith("unet.") for n in shapes)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_no_match_is_refused_even_with_consent(base, tmp_path):
    foreign = Adapter({"transformer.x.to_q": made.lora({"transformer.x.to_q": (8, 6)}).layers["transformer.x.to_q"]})
    with pytest.raises(BaseMismatchError, match="0 of 1 modules of the adapter matched"):
        plan_merge(base, [(foreign, 1.0)], allow_missing=True)


def test_shapes_that_do_not_fit_are_never_merged(base, shapes):
    name = next(n for n in shapes if n.endswith("to_q"))
    wrong = made.lora({**shapes, name: (shapes[name][0] * 2, shapes[name][1])})
    with pytest.raises(BaseMismatchError, match=f"unmatched: {name}. Reason for the first: its delta is 64x32"):
        plan_merge(base, [(wrong, 1.0)])
    plan = plan_merge(base, [(wrong, 1.0)], allow_missing=True)
    assert name in plan.adapters[0].missing and len(plan.tensors) == len(shapes) - 1


def test_a_recorded_base_that_differs_is_refused(base, shapes):
    other = replace(made.lora(shapes), base=BaseModel(family=None, fingerprint="0" * 64))
    with pytest.raises(BaseMismatchError, match="was made for a base model with fingerprint 000000000000"):
        plan_merge(base, [(other, 1.0)])
    assert plan_merge(base, [(other, 1.0)], allow_base_mismatch=True).tensors
    right = replace(other, base=load_base(base).model)
    assert plan_merge(base, [(right, 1.0)]).tensors


def test_two_doras_on_one_layer_are_refused_before_any_work(base, shapes, tmp_path):
    held = weights(base)
    dora = made.as_dora(made.lora(shapes), lambda n: held[n].reshape(shapes[n]))
    with pytest.raises(ConflictError, match="both DoRA on"):
        plan_merge(base, [(dora, 1.0), (dora, 0.5)])
    merge(base, [(dora, 0.5), (made.lora(shapes), 1.0), (dora, 0.0)], tmp_path / "out")
    plain = made.lora(shapes).layers
    deltas = {n: 0.5 * d.dense(held[n]) + plain[n].dense() for n, d in dora.layers.items()}
    before, after = weights(base), weights(tmp_path / "out")
    for n, delta in deltas.items():
        wanted = before[n] + delta.reshape(before[n].shape)
        assert torch.allclose(after[n], wanted, rtol=1e-5, atol=1e-6), n


def test_a_sum_that_overflows_stops_and_names_the_tensor(base, shapes, tmp_path):
    half = tmp_path / "half"
    for name, model in tiny.components(tiny.sd15()).items():
        model.half().save_pretrained(half / name)
    with pytest.raises(NonFiniteError, match=r"\.weight overflows"):
        merge(half, [(made.lora(shapes), 1e6)], tmp_path / "out")
    assert not (tmp_path / "out").exists() and [p.name for p in tmp_path.iterdir()] == ["half"]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"out_dtype": "fp8"}, "Unknown output dtype 'fp8'"), ({"block_weights": {"nothing": 1.0}}, "matches no layer")],
)
def test_options_without_a_meaning_are_told(options, message, base, shapes):
    with pytest.raises(UsageError, match=message):
        plan_merge(base, [(made.lora(shapes), 1.0)], **options)
    with pytest.raises(UsageError, match="Missing adapters"):
        plan_merge(base, [])
    with pytest.raises(UsageError, match="Invalid strength nan"):
        plan_merge(base, [(made.lora(shapes), float("nan"))])
    with pytest.raises(UsageError, match="Missing option --output"):
        merge(base, [(made.lora(shapes), 1.0)])


# --- bases -----------------------------------------------------------------------------------------------------------


def test_a_name_without_weights_is_no_base(shapes, tmp_path):
    with pytest.raises(UnknownBaseError, match="sd15 is a catalog name; a merge requires the weights"):
        plan_merge("sd15", [(made.lora(shapes), 1.0)])
    with pytest.raises(FileNotFoundError):
        plan_merge(tmp_path / "nowhere.safetensors", [(made.lora(shapes), 1.0)])


def packed(tensors, name):
    """One weight as bitsandbytes stores it in four bits: bytes, and tables beside them."""
    tensors[name] = torch.zeros(tensors[name].numel() // 2, 1, dtype=torch.uint8)
    tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(8, dtype=torch.uint8)


def integers(tensors, name):
    tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int8)
    tensors[name.replace(".weight", ".SCB")] = torch.ones(4)


def renamed(tensors, name):
    tensors[name.replace(".weight", ".qweight")] = torch.zeros(4, 4, dtype=torch.int32)
    del tensors[name]


def scaled(tensors, name):
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    tensors[name.replace(".weight", ".scale_weight")] = torch.ones(())


def bare(tensors, name):
    tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.int8)


QUANTISED = {
    "bitsandbytes nf4": packed, "stored as I8": integers, "GPTQ or AWQ": renamed, "scaled fp8": scaled,
    "as I8": bare,
}  # fmt: skip


def quantised_unet(base, folder, how, name):
    """A pipeline folder whose U-Net has one weight stored by `how`."""
    for component in ("unet", "text_encoder"):
        (folder / component).mkdir(parents=True)
        for file in (base / component).iterdir():
            (folder / component / file.name).write_bytes(file.read_bytes())
    path = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    how(tensors, f"{name.removeprefix('unet.')}.weight")
    save_file(tensors, path)


@pytest.mark.parametrize("kind", QUANTISED)
def test_a_quantised_weight_is_refused_with_advice_where_an_adapter_changes_it(kind, base, shapes, tmp_path):
    name = next(n for n in shapes if n.endswith("to_q"))
    quantised_unet(base, tmp_path / "base", QUANTISED[kind], name)
    with pytest.raises(UnsupportedError, match=kind) as refusal:
        plan_merge(tmp_path / "base", [(made.lora(shapes), 1.0)])
    assert "bf16 or fp16" in refusal.value.fix
    others = made.lora({n: s for n, s in shapes.items() if n != name})
    assert len(plan_merge(tmp_path / "base", [(others, 1.0)]).tensors) == len(shapes) - 1
    text = made.lora({n: s for n, s in shapes.items() if n.startswith("text_encoder.")})
    assert plan_merge(tmp_path / "base", [(text, 1.0)]).tensors, "another part of the model is stored plainly"


def test_a_configuration_that_says_quantised_and_gguf_are_refused(base, shapes, tmp_path):
    folder = tmp_path / "unet"
    folder.mkdir()
    config = json.loads((base / "unet/config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "torchao"}}))
    with pytest.raises(UnsupportedError, match="torchao"):
        plan_merge(folder, [(made.lora(shapes), 1.0)])
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(UnsupportedError, match="GGUF"):
        plan_merge(tmp_path / "x.gguf", [(made.lora(shapes), 1.0)])


def test_a_base_in_eight_bits_is_merged_with_the_loss_told(base, shapes, tmp_path):
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "unet/config.json").read_bytes())
    tensors = load_file(base / "unet/diffusion_pytorch_model.safetensors")
    file = folder / "diffusion_pytorch_model.safetensors"
    save_file({k: v.to(torch.float8_e4m3fn) if v.ndim > 1 else v for k, v in tensors.items()}, file)
    lora = made.lora({n: s for n, s in shapes.items() if n.startswith("unet.")})
    report = merge(folder, [(lora, 0.05)], tmp_path / "out")
    assert report.share_lost > 0.1 and any("8 bits" in note for note in report.notes)
    wide = merge(folder, [(lora, 0.05)], tmp_path / "wide", out_dtype="fp32-touched")
    assert wide.share_lost < 1e-6


def test_pickles_missing_shards_and_lying_indices_are_told_apart(base, shapes, tmp_path):
    lora = [(made.lora(shapes), 1.0)]
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "config.json").write_bytes((base / "unet/config.json").read_bytes())
    with pytest.raises(IncompleteError, match="no weights"):
        plan_merge(folder, lora)
    (folder / "diffusion_pytorch_model.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(PickleError, match="only as pickles"):
        plan_merge(folder, lora)
    tiny.sd15().unet.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    index = tmp_path / "sharded/diffusion_pytorch_model.safetensors.index.json"
    data = json.loads(index.read_text())
    shards = sorted(set(data["weight_map"].values()))
    name = next(iter(data["weight_map"]))
    lie = {**data["weight_map"], name: next(s for s in shards if s != data["weight_map"][name])}
    index.write_text(json.dumps(data | {"weight_map": lie}))
    with pytest.raises(StructureError, match=f"lists {name}"):
        plan_merge(tmp_path / "sharded", lora, component="unet")
    index.write_text(json.dumps({**data, "weight_map": {k: v for k, v in data["weight_map"].items() if k != name}}))
    with pytest.raises(StructureError, match=f"does not list {name}"):
        plan_merge(tmp_path / "sharded", lora, component="unet")
    index.write_text(json.dumps(data))
    (tmp_path / "sharded" / shards[0]).unlink()
    with pytest.raises(IncompleteError, match="1 of"):
        plan_merge(tmp_path / "sharded", lora, component="unet")


def test_every_variant_of_a_component_is_merged(base, shapes, tmp_path):
    both = tmp_path / "both"
    pipe = tiny.sd15()
    pipe.unet.save_pretrained(both / "unet")
    pipe.unet.half().save_pretrained(both / "unet", variant="fp16")
    lora = made.lora({n: s for n, s in shapes.items() if n.startswith("unet.")})
    report = merge(both, [(lora, 1.0)], tmp_path / "out")
    assert {p.name for p in report.files} == {p.name for p in (both / "unet").glob("*.safetensors")}
    assert len(report.tensors) == 2 * len(lora) and any("several variants" in note for note in report.notes)
    plain, half = (load_file(tmp_path / "out/unet" / p.name) for p in sorted(report.files, key=lambda p: len(p.name)))
    name = next(iter(lora.layers)).removeprefix("unet.") + ".weight"
    assert torch.allclose(plain[name], half[name].float(), atol=2e-3) and half[name].dtype == torch.float16


def test_an_adapter_that_may_be_two_things_asks(base, tmp_path):
    save_file(
        {
            "unet.x.processor.to_q_lora.down.weight": torch.zeros(4, 4),
            "unet.x.processor.to_q_lora.up.weight": torch.zeros(4, 4),
        },
        tmp_path / "a.safetensors",
    )
    with pytest.raises((AmbiguousError, BaseMismatchError)):
        plan_merge(base, [(tmp_path / "a.safetensors", 1.0)])
