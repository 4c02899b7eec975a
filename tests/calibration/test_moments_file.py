"""The file of moments: round trip, equal bytes, and damage."""

import json

import pytest
import torch

from krona_hub.adapters.moments import LayerMoments, Moments
from krona_hub.calibration.moments_file import HEADER_KEY, VERSION_KEY, read_moments, write_moments
from krona_hub.checkpoints.writer import write_tensors
from krona_hub.errors import ConflictError, KronaError, NonFiniteError, SchemaError, StructureError

LAYERS = {name: LayerMoments(torch.rand(3, 3).double(), torch.rand(3, 3).double()) for name in ("unet.a", "unet.b")}
MOMENTS = Moments(LAYERS, "0" * 64, {"seed": 0, "prompts": ["a toy ü"]})
HEADER = json.dumps({"adapter": "0", "record": {}})


def test_a_round_trip_keeps_every_bit_and_gives_equal_bytes(tmp_path):
    a, b = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_moments(MOMENTS, a)
    found = read_moments(a)
    assert found.adapter == MOMENTS.adapter and found.record == MOMENTS.record and found.layers.keys() == LAYERS.keys()
    for name, layer in LAYERS.items():
        assert torch.equal(found.layers[name].inputs, layer.inputs)
        assert torch.equal(found.layers[name].outputs, layer.outputs)
    write_moments(found, b)
    assert a.read_bytes() == b.read_bytes()
    with pytest.raises(ConflictError):
        write_moments(MOMENTS, a)


SQUARE = torch.eye(2, dtype=torch.float64)
DAMAGED = {
    "an adapter": ({"x": SQUARE}, {}, SchemaError, "contains no moments"),
    "a newer version": ({}, {VERSION_KEY: "2.0", HEADER_KEY: HEADER}, SchemaError, "version 2.0"),
    "no header": ({}, {VERSION_KEY: "1.0"}, StructureError, "not valid JSON"),
    "no digest": ({}, {VERSION_KEY: "1.0", HEADER_KEY: "{}"}, StructureError, "lacks the digest"),
    "half of a layer": (
        {"a.inputs": SQUARE},
        {VERSION_KEY: "1.0", HEADER_KEY: HEADER},
        StructureError,
        "lacks moments",
    ),
    "two halves": (
        {"a.inputs": SQUARE, "b.outputs": SQUARE},
        {VERSION_KEY: "1.0", HEADER_KEY: HEADER},
        StructureError,
        "unknown tensor",
    ),
    "not square": (
        {"a.inputs": torch.ones(2, 3), "a.outputs": torch.ones(2, 3)},
        {VERSION_KEY: "1.0", HEADER_KEY: HEADER},
        StructureError,
        "square",
    ),
    "two sizes": (
        {"a.inputs": SQUARE, "a.outputs": torch.eye(3)},
        {VERSION_KEY: "1.0", HEADER_KEY: HEADER},
        StructureError,
        "square",
    ),
    "NaN": (
        {"a.inputs": SQUARE, "a.outputs": SQUARE * float("nan")},
        {VERSION_KEY: "1.0", HEADER_KEY: HEADER},
        NonFiniteError,
        "NaN",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_a_coded_error(tmp_path, name):
    tensors, metadata, error, words = DAMAGED[name]
    path = tmp_path / "m.safetensors"
    write_tensors(path, tensors, metadata)
    with pytest.raises(error, match=words) as refusal:
        read_moments(path)
    assert refusal.value.fix and isinstance(refusal.value, KronaError)


def test_a_file_that_is_cut_off_is_a_coded_error(tmp_path):
    path = tmp_path / "m.safetensors"
    write_moments(MOMENTS, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(KronaError):
            read_moments(path)
