"""Checkpoints that store rows of a layer apart, or one weight for two layers: merged, verified, undone, extracted."""

from collections.abc import Mapping

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import krona_hub
from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.bases import loading
from krona_hub.conversion.bake_dora import plain_deltas
from krona_hub.errors import InexpressibleError, UnsupportedError
from krona_hub.extraction import tensor_pairs
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.writer import write
from krona_hub.kron.terms import KronTerms, as_lora
from krona_hub.merging.api import merge
from krona_hub.merging.plan import plan_merge
from krona_hub.merging.state_dict import apply_to_state_dict
from krona_hub.merging.undo import unmerge
from krona_hub.verification.check_merge import contains
from tests.joined import HALF, IN, PROJ, QUERIES, checkpoint, joined_base, known_to_comfyui, numbers
from tests.merging.oracle import in_double, rounded

PREFIX = "model.diffusion_model."
OTHER = "transformer.stages.1.0.ff.proj"
GLU = "transformer.stages.0.1.glu.proj"
FACTORS = {
    "lora": lambda i, out, in_: as_lora(numbers(i, out, 3) * 2 / 3, numbers(30 + i, 3, in_)),
    "lokr": lambda i, out, in_: KronTerms(numbers(i, 1, 4, 2), numbers(9, 1, out // 4, in_ // 2)),
    "lokr across the edge": lambda i, out, in_: KronTerms(numbers(i, 1, 1, 2), numbers(9, 1, out, in_ // 2)),
    "two terms": lambda i, out, in_: KronTerms(numbers(i, 2, out // 8, 2), numbers(9, 2, 8, in_ // 2)),
}
SHAPES = {PROJ: (2 * HALF, IN), OTHER: (2 * HALF, IN), GLU: (16, 6), **dict.fromkeys(QUERIES, (8, IN))}


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def case(request, monkeypatch, tmp_path):
    """The path of the checkpoint, and the values of its parameters."""
    joined_base(monkeypatch)
    stored, values = checkpoint(request.param)
    save_file({f"{PREFIX}{name}": t for name, t in stored.items()}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors", values


def adapter_of(kind: str, vectors: Mapping[str, Tensor] | None = None, dora: str | None = None) -> Adapter:
    layers = {}
    for i, (name, (out, in_)) in enumerate(SHAPES.items()):
        seed = 3 if name in QUERIES else i
        axis = {"out": out, "in": in_}.get(dora or "")
        size = None if axis is None else 2 + numbers(seed, axis).abs()
        layers[name] = LayerDelta((FACTORS[kind](seed, out, in_),), (out, in_), size, dora or "out")
    return Adapter(layers, vectors=vectors or {})


def assert_is_rounded_sum(found, values, adapter: Adapter, weight: float) -> None:
    """Parameter by parameter W + w·ΔW in float64, rounded once."""
    for name, old in values.items():
        wanted = old.double()
        if name in adapter.layers:
            wanted = wanted + weight * in_double(adapter.layers[name]).dense(wanted)
        if name in adapter.vectors:
            wanted = wanted + weight * adapter.vectors[name].double()
        assert torch.equal(found(name), rounded(wanted, old.dtype)), name


@pytest.mark.parametrize("dora", [None, "out"])
@pytest.mark.parametrize("kind", FACTORS)
def test_each_tensor_gets_its_own_rows(kind, dora, case, tmp_path):
    base, values = case
    vectors = {f"{PROJ}.bias": numbers(1, 2 * HALF), **{f"{q}.bias": numbers(2, 8) for q in QUERIES}}
    adapter, out = adapter_of(kind, vectors, dora), tmp_path / "out.safetensors"
    report = merge(base, [(adapter, -0.6)], out, exact_rounding=True)
    assert_is_rounded_sum(loading.base_weights(out), values, adapter, -0.6)
    assert report.adapters[0].match_summary == "5 of 5 modules and 3 of 3 vectors matched"
    changed = {n for n, t in load_file(base).items() if not torch.equal(t, load_file(out)[n])}
    assert changed == {t.tensor for t in report.tensors} and len(changed) == 6 + 3
    wanted = sum(in_double(d).dense(values[n].double()).norm() ** 2 for n, d in adapter.items() if n != QUERIES[1])
    wanted += sum(v.double().norm() ** 2 for n, v in vectors.items() if QUERIES[1] not in n)
    measured = sum(t.wanted**2 for t in report.tensors) ** 0.5
    torch.testing.assert_close(measured, float(0.6 * wanted**0.5), rtol=1e-4, atol=0)


def test_a_merge_is_verified_and_undone(case, tmp_path):
    base, _ = case
    adapter, out, undo = adapter_of("lokr"), tmp_path / "out.safetensors", tmp_path / "undo"
    merge(base, [(adapter, 0.5), (adapter_of("lora"), 0.25)], out, undo=undo)
    adapters = [(adapter, 0.5), (adapter_of("lora"), 0.25)]
    assert contains(out, base, adapters).same
    assert not contains(out, base, [(adapter, 0.5), (adapter_of("two terms"), 0.25)]).same
    unmerge(out, undo, tmp_path / "back.safetensors")
    assert (tmp_path / "back.safetensors").read_bytes() == base.read_bytes()


def test_a_state_dict_is_changed_as_a_file_is(case):
    base, values = case
    adapter = adapter_of("lokr", {f"{PROJ}.bias": numbers(1, 2 * HALF)}, "out")
    tensors = load_file(base)
    found = apply_to_state_dict(tensors, [(adapter, 0.7)], base=base)
    rows = values[PROJ].double() + 0.7 * in_double(adapter[PROJ]).dense(values[PROJ].double())
    for name, part in (("up", rows[:HALF]), ("gate", rows[HALF:])):
        wanted = part.to(values[PROJ].dtype)
        torch.testing.assert_close(found[f"{PREFIX}stages.0.1.mlp.{name}.weight"], wanted, rtol=1e-2, atol=1e-2)
    bias = values[f"{PROJ}.bias"].double() + 0.7 * numbers(1, 2 * HALF).double()
    wanted = bias[HALF:].to(values[PROJ].dtype)
    torch.testing.assert_close(found[f"{PREFIX}stages.0.1.mlp.gate.bias"], wanted)


def test_a_file_in_the_names_of_the_authors_is_merged_as_its_adapter(case, tmp_path, monkeypatch):
    base, values = case
    known_to_comfyui(monkeypatch)
    model = loading.load_base(base)
    write(adapter_of("lora"), tmp_path / "adapter.safetensors", tool="comfyui", base=model)
    adapter = read(tmp_path / "adapter.safetensors", base=model)
    report = merge(base, [(tmp_path / "adapter.safetensors", 0.5)], tmp_path / "out.safetensors", exact_rounding=True)
    assert report.adapters[0].match_summary == "6 of 6 modules matched"  # two of them are rows of one layer, twice
    assert_is_rounded_sum(loading.base_weights(tmp_path / "out.safetensors"), values, adapter, 0.5)


def test_a_dora_per_input_of_a_joined_layer_is_refused_before_anything_is_written(case, tmp_path):
    base, _ = case
    with pytest.raises(UnsupportedError, match="cannot be split by rows"):
        merge(base, [(adapter_of("lora", dora="in"), 1.0)], tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_dora_is_baked_with_the_joined_weight(case):
    base, values = case
    adapter = adapter_of("lora", dora="in")
    baked = plain_deltas(adapter.layers, base)
    for name in (PROJ, GLU):
        wanted = adapter[name].dense(values[name])
        torch.testing.assert_close(baked[name].dense(), wanted)


# --- shared weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["one layer", "another delta", "another bias", "another strength"])
def test_layers_that_share_a_weight_are_merged_only_if_they_agree(change, case, tmp_path):
    base, _ = case
    adapter, options = adapter_of("lora", {f"{q}.bias": numbers(2, 8) for q in QUERIES}), {}
    layers, vectors = dict(adapter.layers), dict(adapter.vectors)
    if change == "one layer":
        del layers[QUERIES[1]]
    elif change == "another delta":
        layers[QUERIES[1]] = layers[QUERIES[1]].map(lambda t: t * 1.01)
    elif change == "another bias":
        vectors[f"{QUERIES[1]}.bias"] = numbers(5, 8)
    else:
        options = {"block_weights": {r"attn1\.to_q": 0.5}}
    adapter = Adapter(layers, vectors=vectors)
    with pytest.raises(InexpressibleError) as caught:
        merge(base, [(adapter, 1.0)], tmp_path / "out.safetensors", **options)
    assert all(layer in str(caught.value) for layer in QUERIES) and not (tmp_path / "out.safetensors").exists()
    if not options:
        with pytest.raises(InexpressibleError):
            apply_to_state_dict(load_file(base), [(adapter, 1.0)], base=base)
    if change in ("one layer", "another strength"):
        with pytest.raises(InexpressibleError):
            plan_merge(base, [(adapter, 1.0)], **options)


# --- extraction ------------------------------------------------------------------------------------------------------


def test_the_difference_of_two_checkpoints_is_that_of_the_joined_layers(monkeypatch, tmp_path):
    model = joined_base(monkeypatch)
    monkeypatch.setattr(tensor_pairs, "load_base", loading.load_base)
    stored, values = checkpoint()
    save_file({f"{PREFIX}{name}": t for name, t in stored.items()}, tmp_path / "base.safetensors")
    adapter = adapter_of("lora", {f"{PROJ}.bias": numbers(1, 2 * HALF)})
    merge(tmp_path / "base.safetensors", [(adapter, 1.0)], tmp_path / "tuned.safetensors")
    pairs = tensor_pairs.pair_up(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors")
    assert {pair.name for pair in pairs.layers} == {layer for layer, _ in model.layers()}
    assert {pair.name for pair in pairs.others} == values.keys() - {pair.name for pair in pairs.layers}
    krona_hub.extract(
        tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "x.safetensors", to="lora", terms=3
    )
    found = read(tmp_path / "x.safetensors", base=model)
    assert found.layers.keys() == adapter.layers.keys()
    for name, delta in adapter.layers.items():
        torch.testing.assert_close(found[name].dense(), delta.dense(), rtol=1e-4, atol=1e-4)
