"""Headers that violate the safetensors specification: each gives a coded error with a fix, and one run finds all."""

import json
import random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from krona_hub.checkpoints.header import examine, read_header, structural_findings
from krona_hub.errors import DtypeError, KronaError, StructureError, TruncatedError
from tests.attacks.forge import F32, entry, forged, put

A_TENSOR = b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
DEEP = b'{"a":' * 100_000
ATTACKS = {
    "overlapping tensors": {"a": entry(0, 8), "b": entry(4, 12)},
    "two tensors in one place": {"a": entry(0, 8), "b": entry(0, 8)},
    "a hole between tensors": {"a": entry(0, 4, [1]), "b": entry(8, 12, [1])},
    "a hole before the first tensor": {"a": entry(4, 8, [1])},
    "bytes after the last tensor": {"a": entry(0, 4, [1])},
    "offsets beyond the end, with a hole": {"a": entry(800, 808)},
    "offsets that run backwards": {"a": entry(8, 0)},
    "negative offsets": {"a": entry(-8, 0)},
    "offsets above 2**63": {"a": entry(2**63, 2**63 + 8)},
    "offsets above 2**64": {"a": entry(2**64, 2**64 + 8)},
    "one offset": {"a": F32 | {"data_offsets": [8]}},
    "three offsets": {"a": F32 | {"data_offsets": [0, 4, 8]}},
    "offsets as text": {"a": F32 | {"data_offsets": ["0", "8"]}},
    "offsets as fractions": {"a": F32 | {"data_offsets": [0.0, 8.0]}},
    "offsets as truth values": {"a": entry(False, True, [1], "U8")},
    "offsets that are null": {"a": F32 | {"data_offsets": None}},
    "a shape larger than the data": {"a": entry(shape=[3])},
    "a shape smaller than the data": {"a": entry(shape=[1])},
    "a shape whose product overflows 64 bits": {"a": entry(shape=[2**40, 2**40])},
    "a shape whose product wraps round to the right size": {"a": entry(shape=[2**33, 2**32, 2**62 // 2**61 + 2**31])},
    "a negative shape": {"a": entry(shape=[-2])},
    "two negative sizes": {"a": entry(shape=[-2, -1])},
    "a shape of truth values": {"a": entry(0, 4, [True]), "b": entry(4, 8, [1])},
    "a shape of fractions": {"a": entry(shape=[2.0])},
    "a shape that is a number": {"a": F32 | {"shape": 2}},
    "a shape of shapes": {"a": entry(shape=[[2]])},
    "an entry without dtype": {"a": {"shape": [2], "data_offsets": [0, 8]}},
    "an entry with a field too many": {"a": entry(stride=1)},
    "an entry that is null": {"a": None},
    "an entry that is a list": {"a": [0, 8]},
    "an entry that is a number": {"a": 3},
    "half a byte": {"a": entry(0, 8, [17], "F4")},
    "metadata that is a list": {"__metadata__": [], "a": F32},
    "metadata that is null": {"__metadata__": None, "a": F32},
    "metadata with a number": {"__metadata__": {"ss_steps": 10}, "a": F32},
    "metadata with an object": {"__metadata__": {"ss": {}}, "a": F32},
    "the same tensor twice": b"{" + A_TENSOR + b"," + A_TENSOR + b"}",
    "the same field twice": b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "the same metadata twice": b'{"__metadata__":{"k":"1","k":"2"},' + A_TENSOR + b"}",
    "two metadata": b'{"__metadata__":{},"__metadata__":{},' + A_TENSOR + b"}",
    "bottomless nesting": DEEP,
    "bottomless nesting that ends": DEEP + b"1" + b"}" * 100_000,
    "nesting that json bears and we do not": b'{"a":' * 300 + b"1" + b"}" * 300,
    "bottomless lists": b'{"a":' + b"[" * 500_000,
    "a number of a million digits": b'{"a":' + b"9" * 1_000_000 + b"}",
    "a number of five thousand digits in an offset": json.dumps({"a": F32}).encode().replace(b"8]", b"8" * 5000 + b"]"),
    "a number beyond all floats": b'{"a":1e999}',
    "NaN": b'{"a":NaN}',
    "Infinity": b'{"a":-Infinity}',
    "no JSON": b'{"a": F32}',
    "JSON that stops": b'{"a": {"dtype": "F32"',
    "something after the JSON": b'{}{"a":1}',
    "a null byte after the JSON": b"{}\0",
    "no UTF-8": b'{"\xff\xfe":1}',
    "half a surrogate pair in a name": b'{"\\ud800":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    "half a surrogate pair in the metadata": b'{"__metadata__":{"k":"\\udc00"}}',
    "UTF-16": b"{" + '"a":1}'.encode("utf-16-le"),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_each_attack_is_a_coded_error_with_a_fix_and_one_short_line(tmp_path, name):
    path = put(tmp_path, forged(ATTACKS[name]))
    with pytest.raises(StructureError) as caught:
        read_header(path)
    assert type(caught.value) is StructureError and caught.value.fix
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600
    assert structural_findings(path)[0].code == "KH125"


@pytest.mark.parametrize("name", ATTACKS)
def test_the_safetensors_library_opens_hardly_any_of_them_either(tmp_path, name):
    """Cases in which the library is more lenient than its own specification are listed here."""
    lenient = {
        "the same field twice", "the same metadata twice", "the same tensor twice", "two metadata",
        "an entry with a field too many", "metadata that is null",
    }  # fmt: skip
    path = put(tmp_path, forged(ATTACKS[name]))
    try:
        with safe_open(path, framework="pt"):
            assert name in lenient
    except SafetensorError:
        pass


@pytest.mark.parametrize("dtype", ["F31", "float32", "", "f32", "Q4_K", None, 32, ["F32"], "F32" * 1000])
def test_an_unknown_type_is_an_error_of_its_own(tmp_path, dtype):
    with pytest.raises(DtypeError) as caught:
        read_header(put(tmp_path, forged({"a": F32 | {"dtype": dtype}})))
    assert len(str(caught.value)) < 400 and caught.value.fix


def test_data_that_stops_early_is_called_truncated(tmp_path):
    header = {"a": entry(0, 8), "b": entry(8, 16)}
    for kept in (0, 1, 8, 15):
        with pytest.raises(TruncatedError, match="is truncated"):
            read_header(put(tmp_path, forged(header, b"\0" * kept)))


def test_every_problem_is_found_in_one_go_and_the_sound_tensors_are_kept(tmp_path):
    broken = {
        "__metadata__": {"good": "1", "odd": 2}, "fine": entry(0, 8), "type": entry(8, 16, dtype="X"),
        "size": entry(8, 16, [9]), "shape": entry(8, 16, [-1]),
    }  # fmt: skip
    path = put(tmp_path, forged(broken, b"\0" * 16))
    header, found = examine(path)
    assert [f.where for f in found] == ["__metadata__", "'type'", "'size'", "'shape'"]
    assert list(header.tensors) == ["fine"] and header.metadata == {"good": "1"}
    layout = {"a": entry(0, 8), "b": entry(4, 12), "c": entry(16, 24)}
    assert len(structural_findings(put(tmp_path, forged(layout, b"\0" * 32)))) == 3


def test_names_that_would_paint_the_terminal_are_escaped(tmp_path):
    path = put(tmp_path, forged({"\x1b[31mred\x07\n": None, "x" * 100_000: None}))
    for finding in structural_findings(path):
        assert "\x1b" not in finding.where and "\n" not in finding.where and len(finding.where) <= 120


def test_sound_oddities_are_no_errors(tmp_path):
    odd = {
        "": entry(0, 4, []), "empty": entry(4, 4, [0, 2**62]), "ünï": entry(4, 8, [1, 1, 1]),
        "__metadata": entry(8, 16, [16], "F4"),
    }  # fmt: skip
    text = json.dumps(odd, ensure_ascii=False).encode() + b"   \n"
    assert list(read_header(put(tmp_path, forged(text, b"\0" * 16))).tensors) == list(odd)
    assert read_header(put(tmp_path, forged({}, b""))).tensors == {}


json_scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
sizes = st.integers(-2, 20) | st.sampled_from([2**31, 2**63, 2**64, True, None, 1.0, "8"])
entries = json_scalars | st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "F4", "U8", "BOOL", "X", None]),
        "shape": st.lists(sizes, max_size=3) | json_scalars,
        "data_offsets": st.lists(sizes, min_size=1, max_size=3) | json_scalars,
    },
    optional={"extra": json_scalars},
)
headers = st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), entries, max_size=4)


def raises_krona_error_or_nothing(path) -> bool:
    """Return whether the header is valid; any exception other than KronaError fails the test."""
    try:
        read_header(path)
    except KronaError as error:
        assert error.fix and str(error)
        assert structural_findings(path)[0].code == error.code
        return False
    assert structural_findings(path) == ()
    return True


def accepted_by_the_library(path) -> bool:
    try:
        with safe_open(path, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False


@settings(deadline=None, max_examples=200)
@given(content=st.binary(max_size=200) | st.binary(max_size=100).map(lambda b: forged(b"{" + b)))
@example(content=b"\xff" * 16)
def test_any_bytes_are_an_error_of_ours_or_a_header(tmp_path_factory, content):
    path = put(tmp_path_factory.getbasetemp(), content, "fuzz")
    assert not raises_krona_error_or_nothing(path) or accepted_by_the_library(path)


@settings(deadline=None, max_examples=300)
@given(header=headers, data=st.binary(max_size=24))
def test_any_json_header_is_an_error_of_ours_or_one_the_library_accepts(tmp_path_factory, header, data):
    path = put(tmp_path_factory.getbasetemp(), forged(header, data), "fuzz")
    assert not raises_krona_error_or_nothing(path) or accepted_by_the_library(path)


GOOD = forged(
    {"__metadata__": {"k": "v"}, "a": entry(0, 8), "b": entry(8, 12, [2], "BF16"), "c": entry(12, 12, [0])}, b"\1" * 12
)


@settings(deadline=None, max_examples=300)
@given(seed=st.integers(0, 10**6), flips=st.integers(1, 4), cut=st.integers(0, 12))
def test_any_damage_to_a_good_file_is_an_error_of_ours_or_harmless(tmp_path_factory, seed, flips, cut):
    chance = random.Random(seed)
    damaged = bytearray(GOOD[: len(GOOD) - cut])
    for _ in range(flips):
        damaged[chance.randrange(len(damaged))] = chance.choice(
            b'\0\xff"{}[]:,-.019eEnut ' + bytes([chance.randrange(256)])
        )
    path = put(tmp_path_factory.getbasetemp(), bytes(damaged), "fuzz")
    assert not raises_krona_error_or_nothing(path) or accepted_by_the_library(path)
