"""The permitted contents of `krona.header`, and the findings for invalid ones."""

import json

import pytest

from krona_hub.adapters.provenance import BaseModel, Provenance
from krona_hub.schema.header import NativeHeader, parse, render


def where_and_why(text):
    return [(f.where, f.cause) for f in parse(text)[1]]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "3", '{"a":1,"a":2}', '{"a":NaN}', '{"a":1e999}', '{"a":' * 9999, "\ud800"]
)
def test_what_is_no_json_object_is_one_finding(text):
    known, findings = parse(text)
    assert known == NativeHeader() and [f.code for f in findings] == ["KH130"] and findings[0].fix


def test_each_wrong_field_is_named_with_what_it_must_be_and_the_rest_is_read():
    header = {
        "base": {"family": 3, "hub_id": "a/b", "fingerprint": "abc"},
        "layers": {"unet.x": {"rows": ["zigzag"], "weight_shape": [4, 6, 3]}, "unet.y": 5},
        "licence": None,
        "provenance": {"relative_error": -0.5, "method": "svd"},
    }
    known, _ = parse(json.dumps(header))
    assert known.base == BaseModel(hub_id="a/b") and known.provenance.method == "svd"
    assert known.layers["unet.x"].weight_shape == (4, 6, 3)
    assert where_and_why(json.dumps(header)) == [
        ("krona.header licence", "it must be a string."),
        ("krona.header base.family", "it must be a string."),
        ("krona.header base.fingerprint", "it must be 64 hexadecimal digits."),
        ("krona.header provenance.relative_error", "it must be a nonnegative number."),
        ("krona.header layers 'unet.x'.rows", "it must be a list of kron or shuffled."),
        ("krona.header layers 'unet.y'", "it must be an object."),
    ]


def test_an_op_must_agree_with_the_weight_shape():
    layers = {
        "unet.a": {"op": "linear"}, "unet.b": {"op": "conv2d", "weight_shape": [4, 2, 3, 3]},
        "unet.c": {"op": "conv1d", "weight_shape": [4, 2, 3, 3]}, "unet.d": {"op": "conv2d"},
    }  # fmt: skip
    assert [where for where, _ in where_and_why(json.dumps({"layers": layers}))] == ["'unet.c'", "'unet.d'"]


def test_a_base_of_which_nothing_is_known_is_not_no_base():
    for base in (None, BaseModel()):
        assert parse(render(NativeHeader(base=base)))[0].base == base


def test_what_we_know_wins_over_what_we_kept():
    header = NativeHeader(BaseModel("sdxl"), Provenance(unknown={"base": {"family": "sd15", "new": 1}}))
    assert json.loads(render(header))["base"] == {"family": "sdxl", "new": 1}


def test_errors_are_recorded_to_six_digits_and_never_as_nan():
    provenance = Provenance(relative_error=0.123456789, layer_errors={"unet.x": float("nan")})
    assert json.loads(render(NativeHeader(provenance=provenance))) == {"provenance": {"relative_error": 0.123457}}
    assert render(NativeHeader(provenance=Provenance(relative_error=float("inf")))) == "{}"
