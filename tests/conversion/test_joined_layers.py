"""Conversions of layers whose rows a file stores in several modules: exact wherever each module can be written."""

import pytest
import torch

import krona_hub
from krona_hub.errors import InexpressibleError
from krona_hub.formats.reading.reader import read
from krona_hub.kron.terms import KronTerms
from tests.formats.files_on_disk import save
from tests.joined import GATE, HALF, IN, PROJ, UP, joined_base, known_to_comfyui, numbers


@pytest.fixture(params=[3, 2], ids=["two shapes", "one shape"])
def source(request, monkeypatch, tmp_path):
    """A file of two LoKr modules of one layer, which together are no single term, and the layer."""
    base = joined_base(monkeypatch)
    tensors = {f"{UP}.lokr_w1": numbers(1, 2, 2), f"{UP}.lokr_w2": numbers(2, HALF // 2, IN // 2)}
    blocks = request.param
    tensors |= {f"{GATE}.lokr_w1": numbers(3, blocks, 2), f"{GATE}.lokr_w2": numbers(4, HALF // blocks, IN // 2)}
    path = save(tmp_path, tensors)
    return path, read(path, base=base)[PROJ], base


def test_an_application_of_the_authors_names_gets_the_modules_as_they_came(source, monkeypatch, tmp_path):
    path, layer, base = source
    known_to_comfyui(monkeypatch)
    report = krona_hub.convert(path, tmp_path / "out.safetensors", tool="comfyui", base="joined")
    assert report.relative_error == 0 and report.target_format == "lycoris-lokr"
    again = read(tmp_path / "out.safetensors", base=base)[PROJ]
    assert [s.shape for s in again.sums] == [s.shape for s in layer.sums]
    assert all(torch.equal(a, b) for a, b in zip(again.tensors, layer.tensors, strict=True))


def test_no_file_is_written_for_an_application_that_is_not_known_to_run_the_base(source, tmp_path):
    with pytest.raises(InexpressibleError, match="Whether ComfyUI runs joined is not known; nothing was written"):
        krona_hub.convert(source[0], tmp_path / "out.safetensors", tool="comfyui", base="joined")
    assert not (tmp_path / "out.safetensors").exists()


def test_a_target_with_diffusers_names_has_no_place_for_the_sum(source, tmp_path):
    path, layer, _ = source
    with pytest.raises(InexpressibleError, match="2 Kronecker terms"):
        krona_hub.convert(path, tmp_path / "out.safetensors", to="lycoris-lokr", base="joined")
    report = krona_hub.convert(path, tmp_path / "out", to="lora", exact=True, base="joined")
    assert report.relative_error < 1e-6 and all(isinstance(s, KronTerms) for s in layer.sums)


def test_a_native_file_stores_the_sums_and_gives_the_modules_back(source, monkeypatch, tmp_path):
    path, layer, base = source
    known_to_comfyui(monkeypatch)
    krona_hub.convert(path, tmp_path / "native.safetensors", to="krona", base="joined")
    krona_hub.convert(tmp_path / "native.safetensors", tmp_path / "back.safetensors", tool="comfyui", base="joined")
    again = read(tmp_path / "back.safetensors", base=base)[PROJ]
    assert torch.equal(again.dense(), layer.dense())
