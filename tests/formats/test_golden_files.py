"""Every reference file means exactly the delta that is stored beside it."""

import json

import pytest
import torch
from safetensors.torch import load_file

from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.reader import read
from tests.shared import SHARED, shared

INDEX = SHARED / "golden" / "index.json"
SAMPLES = json.loads(INDEX.read_text())["samples"] if INDEX.exists() else []
LIMITS = {"measured": 2e-5, "float64 formula": 1e-5}  # largest difference / largest entry; fp32 arithmetic
NAMES = {"lycoris_lokr_kohya": "lycoris-lokr"}


@pytest.fixture(scope="module")
def base_weights():
    return load_file(shared("golden", "_base_weights.safetensors"))


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s["name"])
def test_a_golden_file_reads_to_its_delta(sample, base_weights):
    adapter = read(shared("golden", sample["adapter"]), base=shared("golden", "base"))
    wanted = load_file(shared("golden", sample["delta"]))
    assert set(adapter.layers) == set(wanted)
    for name, delta in wanted.items():
        found = adapter[name].dense(base_weights.get(f"{name}.weight"))
        assert found.shape == delta.shape, name
        assert (found - delta).abs().max() <= LIMITS[sample["reference"]] * delta.abs().max(), name


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s["name"])
def test_a_golden_file_is_described_as_what_it_is(sample):
    about = describe(shared("golden", sample["adapter"]), base=shared("golden", "base"))
    assert about.format == NAMES.get(sample["format"], sample["format"].replace("_", "-"))
    assert not about.unmatched
    delta = load_file(shared("golden", sample["delta"]))
    assert {layer: m.weight_shape for m in about.modules for layer in m.layers} == {
        name: tuple(t.shape) for name, t in delta.items()
    }


def test_the_exhibit_of_a_scale_applied_twice_is_half_of_what_we_read():
    adapter = read(shared("golden", "lyc_f4_dim2_a1.safetensors"), base=shared("golden", "base"))
    wrong = load_file(shared("golden", "lyc_f4_dim2_a1.WRONG_merge_to_delta.safetensors"))
    for name, delta in wrong.items():
        assert torch.allclose(adapter[name].dense(), 2 * delta, rtol=1e-4, atol=1e-6), name
