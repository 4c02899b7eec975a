"""Native files that violate their schema: the reader raises coded errors, and validate reports the same findings."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krona_hub.bases.base import Base
from krona_hub.bases.module_spec import ModuleSpec
from krona_hub.checkpoints.header import read_header
from krona_hub.checkpoints.reader import load
from krona_hub.errors import (
    DtypeError,
    IncompleteError,
    KronaError,
    NewerSchemaError,
    SchemaError,
    ShapeError,
    UnrecognisedError,
)
from krona_hub.schema.native_tensors import from_tensors
from krona_hub.schema.validate import validate
from tests.attacks.forge import F32, forged, put

A, B = "unet.x.kron_a.0", "unet.x.kron_b.0"
SOUND = {A: [1, 2, 3], B: [1, 4, 2]}  # a delta of 8x6
LONG = {"text_encoder.text_model.y.kron_a.0": [1, 2, 3], "text_encoder.text_model.y.kron_b.0": [1, 4, 2]}


def native(tensors, header="{}", version="1.0", dtype="F32") -> bytes:
    """Build a native file of ones with tensors of the given shapes."""
    entries, data = {}, b""
    for name, shape in tensors.items():
        values = torch.ones(shape).numpy().tobytes()
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data += values
    text = header if isinstance(header, str) else json.dumps(header)
    return forged({"__metadata__": {"krona.schema": version, "krona.header": text}, **entries}, data)


def low_rank(up, down, side="a"):
    return {f"unet.x.kron_{side}_up.0": up, f"unet.x.kron_{side}_down.0": down}


def second_sum(a, b, index):
    return {f"unet.x.kron_a.{index}": a, f"unet.x.kron_b.{index}": b}


def about_x(**facts):
    return {"layers": {"unet.x": facts}}


ATTACKS = {
    "no header": (SchemaError, forged({"__metadata__": {"krona.schema": "1.0"}}, b"")),
    "a header that is no JSON": (SchemaError, native(SOUND, "{")),
    "a header with a key twice": (SchemaError, native(SOUND, '{"licence":"MIT","licence":"GPL"}')),
    "a header without bottom": (SchemaError, native(SOUND, '{"a":' * 5000)),
    "a header with a wrong field": (SchemaError, native(SOUND, {"trigger_words": "sks"})),
    "no version": (SchemaError, native(SOUND, version="one")),
    "a version to come": (NewerSchemaError, native(SOUND, version="3.0")),
    "a version of old": (SchemaError, native(SOUND, version="0.1")),
    "no A": (IncompleteError, native({B: [1, 4, 2]})),
    "no B": (IncompleteError, native({A: [1, 2, 3]})),
    "half an A": (IncompleteError, native({B: [1, 4, 2], "unet.x.kron_a_up.0": [1, 2, 1]})),
    "an A twice over": (IncompleteError, native(SOUND | low_rank([1, 2, 1], [1, 1, 3]))),
    "a gap in the numbering": (IncompleteError, native(SOUND | second_sum([1, 2, 3], [1, 4, 2], 2))),
    "a tensor of another format": (IncompleteError, native(SOUND | {"unet.x.alpha": []})),
    "a number with a leading zero": (IncompleteError, native({"unet.x.kron_a.00": [1, 2, 3], B: [1, 4, 2]})),
    "a magnitude without a layer": (IncompleteError, native({"unet.x.magnitude": [8]})),
    "a layer in the header only": (IncompleteError, native(SOUND, {"layers": {"unet.y": {}}})),
    "terms that differ": (ShapeError, native({A: [1, 2, 3], B: [2, 4, 2]})),
    "no terms": (ShapeError, native({A: [0, 2, 3], B: [0, 4, 2]})),
    "a rank of nothing": (ShapeError, native({B: [1, 4, 2], **low_rank([1, 2, 0], [1, 0, 3])})),
    "ranks that differ": (ShapeError, native({B: [1, 4, 2], **low_rank([1, 2, 2], [1, 1, 3])})),
    "a factor without terms": (ShapeError, native({A: [2, 3], B: [1, 4, 2]})),
    "a factor with a kernel": (ShapeError, native({A: [1, 2, 3], B: [1, 4, 2, 3]})),
    "sums of different sizes": (ShapeError, native(SOUND | second_sum([1, 2, 3], [1, 4, 3], 1))),
    "a weight of another size": (ShapeError, native(SOUND, about_x(weight_shape=[8, 7]))),
    "a convolution of another size": (ShapeError, native(SOUND, about_x(weight_shape=[8, 2, 3, 3]))),
    "a weight beyond all integers": (ShapeError, native(SOUND, about_x(weight_shape=[8] + [2**31 - 1] * 4))),
    "a magnitude of the wrong axis": (ShapeError, native(SOUND | {"unet.x.magnitude": [6]})),
    "a magnitude with dimensions": (ShapeError, native(SOUND | {"unet.x.magnitude": [8, 1]})),
    "rows for more sums than there are": (SchemaError, native(SOUND, about_x(rows=["kron", "kron"]))),
    "an op that does not fit": (SchemaError, native(SOUND, about_x(op="conv2d"))),
    "more errors than layers": (SchemaError, native(SOUND, {"provenance": {"layer_errors": [0.1, 0.2]}})),
    "a name with text_model": (SchemaError, native(LONG)),
    "integers": (DtypeError, native(SOUND, dtype="I32")),
    "another format": (UnrecognisedError, forged({"t": F32})),
}  # fmt: skip


def read(path):
    header = read_header(path)
    return from_tensors(header, load(header))


@pytest.mark.parametrize("name", ATTACKS)
def test_each_attack_is_a_coded_error_with_the_file_and_a_fix(tmp_path, name):
    error, content = ATTACKS[name]
    path = put(tmp_path, content)
    with pytest.raises(KronaError) as caught:
        read(path)
    assert type(caught.value) is error, caught.value
    assert str(caught.value).startswith(str(path)) and caught.value.fix and "\n" not in str(caught.value)
    if error is not UnrecognisedError:  # any sound adapter is valid, whatever its format
        assert error.code in [f.code for f in validate(path)]


def test_validate_finds_all_problems_in_one_go_and_names_the_layers(tmp_path):
    broken = {
        "unet.y.kron_a.0": [1, 1, 1],
        "unet.z.kron_a.0": [1, 2],
        "unet.z.kron_b.0": [1, 2, 2],
        "odd": [1],
    }
    path = put(tmp_path, native(SOUND | broken, {"licence": 3}))
    assert [(f.code, f.where) for f in validate(path)] == [
        ("KH130", "krona.header licence"), ("KH129", "'odd'"), ("KH129", "'unet.y'"), ("KH110", "'unet.z'"),
    ]  # fmt: skip


def test_a_sound_file_fits_the_base_that_has_its_layers_with_their_shapes(tmp_path):
    path = put(tmp_path, native(SOUND))
    bases = {
        "equal": (Base("b", None, {"unet": {"x": ModuleSpec((8, 6))}}), []),
        "once a 1x1 convolution": (Base("b", None, {"unet": {"x": ModuleSpec((8, 6, 1, 1))}}), []),
        "turned": (Base("b", None, {"unet": {"x": ModuleSpec((6, 8))}}), [("KH160", "error")]),
        "a wider kernel": (Base("b", None, {"unet": {"x": ModuleSpec((8, 6, 3, 3))}}), [("KH160", "error")]),
        "no such layer": (Base("b", None, {"unet": {"y": ModuleSpec((8, 6))}}), [("KH160", "error")]),
        "no such component": (Base("b", None, {"transformer": {"x": ModuleSpec((8, 6))}}), [("KH160", "error")]),
        "a component it does not list": (
            Base("b", None, {"transformer": {}}, uncovered=("the text encoder",)), [("KH160", "warning")],
        ),
    }  # fmt: skip
    for name, (base, wanted) in bases.items():
        assert [(f.code, f.severity) for f in validate(path, base)] == wanted, name


def test_a_base_with_other_layers_than_the_recorded_one_is_worth_a_warning(tmp_path):
    base = Base("b", None, {"unet": {"x": ModuleSpec((8, 6))}})
    same = put(tmp_path, native(SOUND, {"base": {"fingerprint": base.fingerprint}}), "same")
    other = put(tmp_path, native(SOUND, {"base": {"fingerprint": "0" * 64}}), "other")
    assert validate(same, base) == ()
    assert [(f.code, f.severity) for f in validate(other, base)] == [("KH160", "warning")]


PARTS = "kron_a.0 kron_b.0 kron_a.1 kron_b.1 kron_a_up.0 kron_a_down.0 kron_b_up.0 kron_b_down.0 magnitude alpha ?"
parts = st.sampled_from(PARTS.split())
names = st.builds("{}.{}".format, st.sampled_from(["unet.x", "text_encoder.text_model.y", "unet", "", "extras"]), parts)
shapes = st.lists(st.integers(0, 3), max_size=4)
facts = st.fixed_dictionaries(
    {},
    optional={
        "rows": st.lists(st.sampled_from(["kron", "shuffled"]), max_size=2),
        "weight_shape": st.lists(st.integers(1, 9), min_size=1, max_size=6),
        "magnitude_axis": st.sampled_from(["in", "out"]),
        "op": st.sampled_from(["linear", "conv2d"]),
    },
)
headers = st.fixed_dictionaries({}, optional={"layers": st.dictionaries(st.sampled_from(["unet.x", "y"]), facts)})


@settings(deadline=None, max_examples=300)
@given(tensors=st.dictionaries(names, shapes, max_size=5), header=headers)
def test_any_native_file_is_an_adapter_or_an_error_of_ours_and_validate_agrees(tmp_path_factory, tensors, header):
    path = put(tmp_path_factory.getbasetemp(), native(tensors, header), "native")
    found = [f for f in validate(path) if f.severity == "error"]
    try:
        read(path)
    except KronaError as error:
        assert error.code == found[0].code and error.fix
    else:
        assert found == []


sound_sums = st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2))


@settings(deadline=None, max_examples=50)
@given(sizes=sound_sums, rows=st.sampled_from(["kron", "shuffled"]))
def test_what_is_sound_is_read(tmp_path_factory, sizes, rows):
    a1, a2, b1, b2, terms = sizes
    content = native({A: [terms, a1, a2], B: [terms, b1, b2]}, about_x(rows=[rows]))
    adapter = read(put(tmp_path_factory.getbasetemp(), content, "native"))
    assert torch.equal(adapter["unet.x"].dense(), torch.full((a1 * b1, a2 * b2), float(terms)))
