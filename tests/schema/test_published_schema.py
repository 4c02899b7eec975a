"""The published JSON Schemas are frozen forever and agree with the reader."""

import hashlib
import json
from dataclasses import replace
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from krona_hub.checkpoints.header import read_header
from krona_hub.checkpoints.writer import write_tensors
from krona_hub.schema import tensor_layout
from krona_hub.schema.fields import BASE, LAYER, PROVENANCE, TOP
from krona_hub.schema.header import LayerFacts, parse, render
from krona_hub.schema.native_tensors import to_tensors
from tests.attacks.forge import forged, put
from tests.schema.adapters import adapters, json_values

SCHEMAS = files("krona_hub.schemas")
FROZEN = {  # a change is a new file with a new line here; these lines are never edited
    "krona-adapter-1.0.json": "cb864239f16b1dae46779efe88e6ce254affd923d42541e47a941f77c5699d28",
    "krona-adapter-2.0.json": "53ab6344c0457274c70ff0ab068044fbc3132136ebbe13e1a3ecdb7737271429",
}
SCHEMA, SCHEMA_2_0 = (json.loads((SCHEMAS / f"krona-adapter-{v}.json").read_text()) for v in ("1.0", "2.0"))
HEADER = Draft202012Validator(SCHEMA)
FILES = {
    v[0]: Draft202012Validator(schema | {"$ref": "#/$defs/file", "properties": {}})
    for v, schema in (("1.0", SCHEMA), ("2.0", SCHEMA_2_0))
}


def test_a_published_schema_never_changes():
    published = {f.name for f in SCHEMAS.iterdir() if f.name.endswith(".json")}
    assert {name: hashlib.sha256((SCHEMAS / name).read_bytes()).hexdigest() for name in published} == FROZEN


def test_a_published_schema_is_a_schema():
    Draft202012Validator.check_schema(SCHEMA)
    Draft202012Validator.check_schema(SCHEMA_2_0)


def test_2_0_has_the_fields_of_1_0():
    for name in ("base", "layer", "provenance"):
        assert SCHEMA_2_0["$defs"][name]["properties"].keys() == SCHEMA["$defs"][name]["properties"].keys()
    assert SCHEMA_2_0["properties"].keys() == SCHEMA["properties"].keys()


def test_the_table_of_fields_and_the_schema_list_the_same_fields():
    definitions = SCHEMA["$defs"]
    assert SCHEMA["properties"].keys() == TOP.keys()
    for name, table in {"base": BASE, "layer": LAYER, "provenance": PROVENANCE}.items():
        assert definitions[name]["properties"].keys() == table.keys()


@settings(deadline=None, max_examples=60)
@given(adapter=adapters())
def test_what_we_write_obeys_the_schema(tmp_path_factory, adapter):
    tensors, metadata = to_tensors(adapter)
    HEADER.validate(json.loads(metadata["krona.header"]))
    path = tmp_path_factory.getbasetemp() / "schema.safetensors"
    write_tensors(path, tensors, metadata, overwrite=True)
    raw = path.read_bytes()
    assert metadata["krona.schema"] == ("2.0" if adapter.vectors else "1.0")
    file = FILES[metadata["krona.schema"][0]]
    file.validate(json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")]))


texts = st.text(max_size=3)
nearly = {
    "family": texts, "hub_id": texts, "revision": texts, "licence": texts, "created_by": texts, "method": texts,
    "source_format": texts, "fingerprint": st.sampled_from(["ab" * 32, "AB" * 32, "ab"]), "training": st.just({}),
    "source_sha256": st.sampled_from(["0" * 64, "0" * 65, "g" * 64]), "candidates": st.lists(texts, max_size=2),
    "trigger_words": st.lists(texts | st.integers(), max_size=2), "metadata": st.dictionaries(texts, texts | st.none()),
    "relative_error": st.sampled_from([0, 1, 0.5, -1, -0.5, True, 10**400]),
    "layer_errors": st.lists(st.sampled_from([None, 0.5, -1, "x", False]), max_size=3),
    "op": st.sampled_from(["linear", "conv2d", "conv4d", 1]), "magnitude_axis": st.sampled_from(["in", "out", "", []]),
    "weight_shape": st.lists(st.sampled_from([1, 5, 2**31 - 1, 2**31, 0, -1, True, 2.5]), max_size=6),
    "rows": st.lists(st.sampled_from(["kron", "shuffled", "zigzag", {}]), max_size=2),
}  # fmt: skip


def objects_of(table) -> st.SearchStrategy:
    fields = {name: nearly[name] | json_values for name in table if name in nearly}
    return st.fixed_dictionaries({}, optional=fields | {"unheard_of": json_values})


layers = st.dictionaries(st.just("unet.x"), objects_of(LAYER) | json_values, max_size=1)
inner = {"base": objects_of(BASE), "provenance": objects_of(PROVENANCE), "layers": layers}
headers = st.builds(
    lambda top, parts: top | parts,
    objects_of(TOP),
    st.fixed_dictionaries({}, optional={name: strategy | json_values for name, strategy in inner.items()}),
)


@settings(deadline=None, max_examples=400)
@given(header=headers)
def test_our_reader_refuses_exactly_what_the_schema_refuses(header):
    found = [f for f in parse(json.dumps(header))[1] if "its op" not in f.cause]
    assert (not found) == HEADER.is_valid(header)


@settings(deadline=None, max_examples=100)
@given(header=headers.filter(HEADER.is_valid))
def test_any_valid_header_is_written_back_without_loss(header):
    known, found = parse(json.dumps(header))
    if not found:
        again, _ = parse(render(known))
        kept = {name for name, facts in known.layers.items() if facts != LayerFacts()}
        kept |= known.provenance.unknown.get("layers", {}).keys()  # an empty entry is left out
        assert again == replace(known, layers={name: known.layers[name] for name in kept})


PARTS = ["kron_a.0", "kron_b.12", "kron_a_up.1", "kron_b_down.0", "magnitude"]
NO_PARTS = ["kron_c.0", "kron_a.00", "kron_a", "kron_a_mid.0", "kron_a.-1", "magnitude.0", "alpha", ""]
PREFIXES = ["unet.x.", "unet.ü.", "unet.", "", "unet..", ".x.", "extras.", "extras.x.", "vectors.unet.", "vectors."]
NAMES = [prefix + part for prefix in PREFIXES for part in PARTS + NO_PARTS]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("name", [*NAMES, "unet.a\nb.kron_a.0"])
def test_our_reader_knows_exactly_the_names_that_the_schema_knows(tmp_path, name, version):
    shape = [1] if name.endswith("magnitude") else [1, 1, 1]
    metadata = {"format": "pt", "krona.schema": version, "krona.header": "{}"}
    header = {"__metadata__": metadata, name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}
    path = put(tmp_path, forged(header, b"\0" * 4))
    unknown = f"is not part of schema {version}"
    strangers = [f for f in tensor_layout.examine(read_header(path))[1] if unknown in f.cause]
    assert (not strangers) == FILES[version[0]].is_valid(header)


@pytest.mark.parametrize("name", FROZEN)
def test_the_schema_of_every_version_ships_with_the_package(name):
    assert (SCHEMAS / name).is_file()
