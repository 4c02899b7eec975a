"""The reported error of a DoRA is that of its normalized weights where the base weights are known."""

import json
from pathlib import Path

import pytest
import torch

import krona_hub
from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.bases import catalog
from krona_hub.bases.loading import base_weights
from krona_hub.kron.terms import as_lora

SAMPLES = Path(__file__).parent.parent / "samples"
DORAS = [s["name"] for s in json.loads((SAMPLES / "index.json").read_text())["samples"] if "dora" in s["name"]]
BASE = "tiny-scenes"


def file_of(name):
    return SAMPLES / name if (SAMPLES / name).is_dir() else SAMPLES / f"{name}.safetensors"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", DORAS)
def test_the_reported_error_is_that_of_the_deltas_in_the_file(name, dtype, tmp_path):
    weights, source = base_weights(BASE), krona_hub.read(file_of(name), base=BASE)
    report = krona_hub.convert(file_of(name), tmp_path / "x.safetensors", base=BASE, to="lycoris-locon", dtype=dtype)
    found = krona_hub.read(tmp_path / "x.safetensors", base=BASE)
    for layer in report.layers:
        weight = weights(layer.layer).double()
        wanted, written = (a[layer.layer].map(torch.Tensor.double).dense(weight) for a in (source, found))
        true = float((written - wanted).norm() / wanted.norm())
        assert layer.relative_error == pytest.approx(true, rel=0.02, abs=1e-6), layer.layer
    assert not any("DoRA layer" in note and "error" in note for note in report.notes)


def test_without_base_weights_the_report_says_what_was_measured(tmp_path):
    magnitude, sums = torch.rand(320) + 1, (as_lora(torch.randn(320, 2), torch.randn(2, 320)),)
    layer = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    adapter = Adapter({layer: LayerDelta(sums, (320, 320), magnitude)}, catalog.get("sd15").model)
    krona_hub.write(adapter, tmp_path / "a.safetensors")
    report = krona_hub.convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="lycoris-locon", dtype="bf16")
    assert any("the error of 1 DoRA layer is that of the stored numbers" in note for note in report.notes)


@pytest.mark.parametrize("name", DORAS)
def test_a_magnitude_is_never_rounded(name, tmp_path):
    krona_hub.convert(file_of(name), tmp_path / "x.safetensors", base=BASE, to="lycoris-locon", dtype="bf16")
    source, found = krona_hub.read(file_of(name), base=BASE), krona_hub.read(tmp_path / "x.safetensors", base=BASE)
    kept = [(source[n].magnitude, d.magnitude) for n, d in found.items() if d.magnitude is not None]
    assert all(torch.equal(before.float(), after.float()) for before, after in kept)
