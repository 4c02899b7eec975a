"""Schema 1.0: a round trip preserves every bit and every unknown field."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krona_hub.adapters.adapter import Adapter, BaseModel, LayerDelta, Provenance
from krona_hub.checkpoints.header import read_header
from krona_hub.checkpoints.reader import load
from krona_hub.checkpoints.writer import write_tensors
from krona_hub.errors import DtypeError, NonFiniteError, ShapeError, UsageError
from krona_hub.kron.terms import KronTerms, LowRank
from krona_hub.schema.native_tensors import from_tensors, to_tensors
from krona_hub.schema.validate import validate
from tests.schema.adapters import adapters, assert_same_adapter


def written(path, adapter):
    tensors, metadata = to_tensors(adapter)
    write_tensors(path, tensors, metadata, overwrite=True)
    return path


def reread(path):
    header = read_header(path)
    return from_tensors(header, load(header))


@settings(deadline=None, max_examples=80)
@given(adapter=adapters())
def test_an_adapter_is_read_as_it_was_written_and_its_file_is_valid(tmp_path_factory, adapter):
    path = written(tmp_path_factory.getbasetemp() / "round.safetensors", adapter)
    assert [f for f in validate(path) if f.severity == "error"] == []
    found = reread(path)
    assert_same_adapter(found, adapter)
    first = path.read_bytes()
    assert written(path, found).read_bytes() == first


@settings(deadline=None, max_examples=30)
@given(adapter=adapters())
def test_the_delta_of_every_layer_is_the_same_matrix(tmp_path_factory, adapter):
    found = reread(written(tmp_path_factory.getbasetemp() / "dense.safetensors", adapter))
    for name, delta in adapter.layers.items():
        assert torch.equal(found[name].low_rank_delta(), delta.low_rank_delta()), name


def test_there_is_no_alpha_in_a_native_file():
    tensors, metadata = to_tensors(Adapter({"unet.x": linear(4, 6, 2, 3)}))
    assert not any("alpha" in name for name in [*tensors, *metadata])


def linear(out, in_, a1, a2, dtype=torch.float32):
    left = torch.randn(1, a1, a2, dtype=dtype)
    return LayerDelta((KronTerms(left, torch.randn(1, out // a1, in_ // a2, dtype=dtype)),), (out, in_))


def header_of(adapter):
    return json.loads(to_tensors(adapter)[1]["krona.header"])


def test_what_the_tensors_say_or_a_default_is_left_out_of_the_header():
    conv = LayerDelta((KronTerms(torch.randn(1, 2, 4), torch.randn(1, 3, 9)),), (6, 4, 3, 3))
    shuffled = LayerDelta((KronTerms(torch.randn(1, 2, 3), torch.randn(1, 3, 2), "shuffled"),), (6, 6))
    dora = LayerDelta(linear(6, 4, 2, 2).sums, (6, 4), torch.randn(4), "in")
    usual = LayerDelta(linear(6, 4, 2, 2).sums, (6, 4), torch.randn(6), "out")
    layers = {"unet.a": linear(4, 6, 2, 3), "unet.b": conv, "unet.c": shuffled, "unet.d": dora, "unet.e": usual}
    assert header_of(Adapter(layers))["layers"] == {
        "unet.b": {"weight_shape": [6, 4, 3, 3]},
        "unet.c": {"rows": ["shuffled"]},
        "unet.d": {"magnitude_axis": "in"},
    }


def test_the_header_of_an_sdxl_adapter_stays_far_below_100_kb():
    """794 layers, 50 of them convolutions, without and with a relative error for each."""
    block = "unet.down_blocks.2.attentions.1.transformer_blocks"
    names = [
        f"{block}.{i}.attn{n}.{m}" for i in range(93) for n in (1, 2) for m in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    kernels = {f"unet.up_blocks.1.resnets.{i}.conv1": (4, 1, 3, 3) for i in range(50)}
    layers = {name: linear(4, 6, 2, 3) for name in names}
    layers |= {name: LayerDelta(linear(4, 9, 2, 3).sums, shape) for name, shape in kernels.items()}
    errors = {name: float(torch.rand(())) for name in layers}
    assert len(layers) == 794
    plain = Adapter(layers, BaseModel("sdxl"))
    measured = Adapter(layers, BaseModel("sdxl"), Provenance(relative_error=0.1, layer_errors=errors))
    assert len(to_tensors(plain)[1]["krona.header"]) < 5_000
    assert len(to_tensors(measured)[1]["krona.header"]) < 15_000


def test_sums_of_nothing_are_left_out_and_the_layer_stays():
    nothing = KronTerms(LowRank(torch.randn(1, 4, 0), torch.randn(1, 0, 3)), torch.randn(1, 2, 2))
    empty = KronTerms(torch.randn(0, 2, 3), torch.randn(0, 4, 2))
    tensors, metadata = to_tensors(Adapter({"unet.x": LayerDelta((nothing, empty), (8, 6))}))
    assert tensors == {} and json.loads(metadata["krona.header"])["layers"] == {"unet.x": {"weight_shape": [8, 6]}}


def test_fields_of_a_newer_minor_are_kept_in_their_places_and_written_back(tmp_path):
    layers = {"unet.x": linear(4, 6, 2, 3), "unet.y": linear(4, 6, 2, 3)}
    tensors, metadata = to_tensors(Adapter(layers, BaseModel("sdxl")))
    newer = {
        "base": {"family": "sdxl", "vae": "fp16-fix"}, "rating": None, "empty": {},
        "layers": {"unet.x": {"block": [0, {}]}}, "provenance": {"signed": "yes"},
    }  # fmt: skip
    newer_metadata = metadata | {"krona.schema": "1.1", "krona.header": json.dumps(newer)}
    write_tensors(tmp_path / "new.safetensors", tensors, newer_metadata)
    adapter = reread(tmp_path / "new.safetensors")
    assert adapter.base == BaseModel("sdxl")
    again = to_tensors(adapter)[1]
    assert json.loads(again["krona.header"]) == newer and again["krona.schema"] == "1.1"
    without = to_tensors(adapter.with_layers({"unet.y": adapter["unet.y"]}))[1]
    assert json.loads(without["krona.header"])["layers"] == {}


def test_metadata_that_others_add_or_edit_is_kept(tmp_path):
    tensors, metadata = to_tensors(Adapter({"unet.x": linear(4, 6, 2, 3)}, BaseModel("sdxl")))
    edited = metadata | {"modelspec.title": "Mine", "modelspec.author": "me", "note": "n"}
    write_tensors(tmp_path / "x.safetensors", tensors, edited)
    adapter = reread(tmp_path / "x.safetensors")
    assert adapter.provenance.metadata == {"modelspec.title": "Mine", "modelspec.author": "me", "note": "n"}
    again = to_tensors(adapter)[1]
    assert again["modelspec.title"] == "Mine" and again["modelspec.author"] == "me"


def test_other_tools_are_shown_a_title_an_architecture_and_trigger_words():
    source = {
        "modelspec.title": "Cats",
        "modelspec.hash_sha256": "0xabc",
        "modelspec.date": "2024",
        "ss_dim": "4",
    }
    provenance = Provenance(licence="MIT", trigger_words=("sks cat", "fur"), metadata=source)
    metadata = to_tensors(Adapter({"unet.x": linear(4, 6, 2, 3)}, BaseModel("sdxl"), provenance))[1]
    assert {k: v for k, v in metadata.items() if k.startswith("modelspec.")} == {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-xl-v1-base/krona",
        "modelspec.implementation": "krona-hub",
        "modelspec.title": "Cats",
        "modelspec.license": "MIT",
        "modelspec.trigger_phrase": "sks cat, fur",
    }


def with_left(value):
    return {"unet.x": LayerDelta((KronTerms(torch.full((1, 1, 1), value), torch.ones(1, 2, 2)),), (2, 2))}


SMALL = {"unet.x": linear(2, 2, 1, 1)}
REFUSED = {
    "infinity in a factor": (NonFiniteError, lambda: Adapter(with_left(float("inf")))),
    "NaN in an extra": (NonFiniteError, lambda: Adapter({}, extras={"e": torch.tensor([float("nan")])})),
    "integers": (DtypeError, lambda: Adapter({}, extras={"e": torch.arange(3)})),
    "eight bits": (DtypeError, lambda: Adapter({}, extras={"e": torch.ones(2).to(torch.float8_e4m3fn)})),
    "a vector for a weight": (ShapeError, lambda: Adapter({"unet.x": LayerDelta((), (3,))})),
    "a layer without a component": (UsageError, lambda: Adapter({"unet": linear(2, 2, 1, 1)})),
    "a component called extras": (UsageError, lambda: Adapter({"extras.x": linear(2, 2, 1, 1)})),
    "a loss of NaN": (UsageError, lambda: Adapter(SMALL, provenance=Provenance(training={"loss": float("nan")}))),
    "a set": (UsageError, lambda: Adapter(SMALL, provenance=Provenance(training={"seen": {1, 2}}))),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_the_schema_cannot_hold_is_refused_with_a_fix(what):
    error, adapter = REFUSED[what]
    with pytest.raises(error) as caught:
        to_tensors(adapter())
    assert caught.value.fix


def test_a_text_model_in_a_layer_name_is_folded_away_before_it_is_written():
    tensors, _ = to_tensors(Adapter({"text_encoder.text_model.encoder.layers.0.mlp.fc1": linear(4, 6, 2, 3)}))
    assert set(tensors) == {f"text_encoder.encoder.layers.0.mlp.fc1.kron_{x}.0" for x in "ab"}


@settings(deadline=None, max_examples=30)
@given(adapter=adapters(), data=st.data())
def test_nan_anywhere_in_a_file_is_an_error_when_it_is_read(tmp_path_factory, adapter, data):
    tensors, metadata = to_tensors(adapter)
    if not tensors:
        return
    name = data.draw(st.sampled_from(sorted(tensors)))
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] = float("nan")
    path = tmp_path_factory.getbasetemp() / "nan.safetensors"
    write_tensors(path, tensors, metadata, overwrite=True)
    with pytest.raises(NonFiniteError):
        reread(path)
    assert [f.code for f in validate(path) if f.severity == "error"] == ["KH151"]
