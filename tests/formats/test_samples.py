"""Every sample in `tests/samples` reads, and merges, to what the library that made it computes."""

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from krona_hub import merge, read
from krona_hub.adapters.adapter import canonical_name
from krona_hub.assets.shipped import folder_of
from krona_hub.errors import UnknownBaseError
from krona_hub.formats.reading.describe import describe

HERE = Path(__file__).parent.parent / "samples"
INDEX = json.loads((HERE / "index.json").read_text())
BASE = folder_of(INDEX["base"])
SAMPLES = pytest.mark.parametrize("sample", INDEX["samples"], ids=lambda s: s["name"])
LIMIT = 1e-5  # largest difference / largest entry; fp32 arithmetic


def reference(sample):
    """Deltas of layers by layer name, and deltas of other parameters by parameter name."""
    deltas = load_file(HERE / sample["delta"])
    layers = {name for name in deltas if not name.endswith((".weight", ".bias"))}
    return {n: t for n, t in deltas.items() if n in layers}, {n: t for n, t in deltas.items() if n not in layers}


@lru_cache
def base_tensors():
    return tensors_of(BASE)


def tensors_of(folder):
    """Canonical parameter name -> tensor as it is stored, of every component with weights."""
    return {
        canonical_name(f"{path.parent.name}.{key}"): tensor
        for path in sorted(folder.rglob("*.safetensors"))
        for key, tensor in load_file(path).items()
    }


def assert_close(found, wanted, name):
    assert found.shape == wanted.shape, name
    assert (found - wanted).abs().max() <= LIMIT * wanted.abs().max(), name


@SAMPLES
def test_a_sample_reads_to_its_deltas(sample):
    adapter = read(HERE / sample["adapter"], base=BASE)
    layers, vectors = reference(sample)
    found = {name: delta.dense(base_tensors()[f"{name}.weight"].float()) for name, delta in adapter.items()}
    for name, wanted in layers.items():
        assert_close(found.pop(name), wanted, name)
    assert not {name for name, delta in found.items() if delta.any()}, "the library leaves these layers unchanged"
    found = dict(adapter.vectors)
    for name, wanted in vectors.items():
        assert_close(found.pop(name), wanted, name)
    assert not {name for name, vector in found.items() if vector.any()}, "the library leaves these unchanged"


@SAMPLES
def test_a_sample_is_described_as_what_it_is(sample):
    about = describe(HERE / sample["adapter"], base=BASE)
    assert about.format == sample["format"].replace("_", "-")
    assert not about.unmatched
    shapes = {layer: module.weight_shape for module in about.modules for layer in module.layers}
    for name, delta in reference(sample)[0].items():
        assert shapes.get(name) == tuple(delta.shape), name


@SAMPLES
def test_a_sample_merges_to_the_weights_of_its_library(sample, tmp_path):
    out = tmp_path / "merged"
    merge(BASE, [(HERE / sample["adapter"], 1.0)], out, out_dtype="fp32-touched")
    layers, vectors = reference(sample)
    changes = {f"{name}.weight": delta for name, delta in layers.items()} | vectors
    merged = tensors_of(out)
    assert set(merged) == set(base_tensors()) and set(changes) <= set(merged)
    for name, before in base_tensors().items():
        if name in changes:
            assert merged[name].dtype == torch.float32, name
            assert_close(merged[name] - before.float(), changes[name], name)
        else:
            assert merged[name].dtype == before.dtype and torch.equal(merged[name], before), name


@pytest.mark.parametrize("sample", [s for s in INDEX["samples"] if s["needs_base"]], ids=lambda s: s["name"])
def test_a_delta_that_depends_on_the_base_is_not_computed_without_its_weights(sample, tmp_path):
    for component in ("unet", "text_encoder"):  # shapes without weights
        (tmp_path / component).mkdir()
        (tmp_path / component / "config.json").write_bytes((BASE / component / "config.json").read_bytes())
    (tmp_path / "model_index.json").write_bytes((BASE / "model_index.json").read_bytes())
    with pytest.raises(UnknownBaseError):
        adapter = read(HERE / sample["adapter"], base=tmp_path)
        for name in reference(sample)[0]:
            adapter[name].dense()
