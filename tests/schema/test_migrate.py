"""Migration between versions, with versions invented for the test: 0.9 before 1.0, 1.1 and 2.0 after it."""

import json

import pytest
import torch

from krona_hub.adapters.adapter import Adapter, BaseModel, LayerDelta
from krona_hub.checkpoints.header import read_header
from krona_hub.checkpoints.reader import load
from krona_hub.checkpoints.writer import write_tensors
from krona_hub.errors import ConflictError, LossyError, NewerSchemaError, SchemaError, UnrecognisedError, UsageError
from krona_hub.kron.terms import KronTerms
from krona_hub.schema.migrate import STEPS, Version, migrate, migrate_file, parse_version, readable, route
from krona_hub.schema.native_tensors import from_tensors, to_tensors
from krona_hub.schema.validate import validate


def shuffled_to_rows(header):
    """0.9 had one flag per layer where 1.0 has one word per sum, and spelt licence the American way."""
    for layer in header.get("layers", {}).values():
        if layer.pop("shuffled", False):
            layer["rows"] = ["shuffled"]
    if "license" in header:
        header["licence"] = header.pop("license")
    return header


def rows_to_shuffled(header):
    for layer in header.get("layers", {}).values():
        if layer.pop("rows", None) == ["shuffled"]:
            layer["shuffled"] = True
    if "licence" in header:
        header["license"] = header.pop("licence")
    return header


SYNTHETIC = {
    (Version(0, 9), Version(1, 0)): shuffled_to_rows,
    (Version(1, 0), Version(0, 9)): rows_to_shuffled,
    (Version(1, 0), Version(1, 1)): lambda h: h | {"rating": 5},
    (Version(1, 1), Version(1, 0)): lambda h: {k: v for k, v in h.items() if k != "rating"},
}
OLD = {"license": "MIT", "layers": {"unet.x": {"shuffled": True}, "unet.y": {}}, "novel": [1]}


def metadata(version, header):
    return {"format": "pt", "krona.schema": version, "krona.header": json.dumps(header), "note": "kept"}


def test_it_walks_up_and_down_one_step_at_a_time_and_never_edits_its_input():
    old = metadata("0.9", OLD)
    before = dict(old)
    up = migrate(old, "1.1", SYNTHETIC)
    assert old == before
    assert up["krona.schema"] == "1.1" and up["note"] == "kept" and up["format"] == "pt"
    assert json.loads(up["krona.header"]) == {
        "licence": "MIT", "layers": {"unet.x": {"rows": ["shuffled"]}, "unet.y": {}}, "novel": [1], "rating": 5,
    }  # fmt: skip
    down = migrate(up, "0.9", SYNTHETIC)
    assert json.loads(down["krona.header"]) == OLD and down["krona.schema"] == "0.9"


def test_a_step_cannot_spoil_the_header_of_the_step_before():
    def vandal(header):
        header.clear()
        return {}

    start = metadata("1.0", {"layers": {"unet.x": {}}})
    migrate(start, "1.1", {(Version(1, 0), Version(1, 1)): vandal})
    assert json.loads(start["krona.header"]) == {"layers": {"unet.x": {}}}


def test_the_route_takes_the_nearest_neighbour_and_no_detour():
    a, b, c = Version(1, 0), Version(1, 1), Version(2, 0)
    steps = {(a, c): "leap", (a, b): "one", (b, c): "two", (c, b): "back", (b, a): "home", (a, Version(0, 9)): "away"}
    assert route(a, c, steps) == ["one", "two"] and route(c, a, steps) == ["back", "home"] and route(a, a, steps) == []


def test_every_registered_step_leads_to_a_neighbour_and_back():
    for start, end in STEPS:
        assert start != end and (end, start) in STEPS


def test_a_newer_minor_is_read_as_it_is_and_a_newer_major_is_refused_by_name():
    newer = metadata("1.1", {"rating": 5})
    assert readable(newer) == newer
    with pytest.raises(NewerSchemaError, match=r"schema 3\.0.*reads up to 2\.x") as caught:
        readable(metadata("3.0", {}))
    assert caught.value.code == "KH131" and "pip install -U krona-hub" in caught.value.fix


def test_an_older_major_is_walked_up_when_it_is_read():
    assert readable(metadata("0.9", OLD), SYNTHETIC)["krona.schema"] == "1.0"
    with pytest.raises(SchemaError, match=r"no migration from schema 0\.9 to 1\.0"):
        readable(metadata("0.9", OLD))


def test_where_no_step_leads_the_known_versions_are_named():
    with pytest.raises(
        NewerSchemaError, match=r"from schema 1\.0 to 3\.0; this version of krona_hub supports 0\.9, 1\.0, 1\.1"
    ):
        migrate(metadata("1.0", {}), "3.0", SYNTHETIC)
    with pytest.raises(SchemaError, match=r"from schema 1\.0 to 0\.1") as caught:
        migrate(metadata("1.0", {}), "0.1", SYNTHETIC)
    assert not isinstance(caught.value, NewerSchemaError)


@pytest.mark.parametrize(
    "text", ["", "1", "1.", ".1", "1.0.0", "v1.0", "01.0", "1.00", "-1.0", "1.0 ", "１.0", "1.99999999"]
)
def test_what_is_no_version_is_an_error_wherever_it_stands(text):
    assert parse_version(text) is None
    with pytest.raises(UsageError):
        migrate(metadata("1.0", {}), text)
    with pytest.raises(SchemaError):
        readable(metadata(text, {}))


def test_a_file_without_a_version_is_not_native():
    with pytest.raises(UnrecognisedError, match="not a native krona file"):
        readable({"format": "pt"})


def native(path, version="1.0", header=None):
    delta = LayerDelta((KronTerms(torch.randn(1, 2, 3), torch.randn(1, 4, 2), "shuffled"),), (8, 6))
    tensors, known = to_tensors(Adapter({"unet.x": delta}, BaseModel("sdxl")))
    known["krona.schema"] = version
    if header is not None:
        known["krona.header"] = json.dumps(header)
    write_tensors(path, tensors, known)
    return path


def test_a_file_is_migrated_with_its_tensors_byte_for_byte(tmp_path):
    old = native(tmp_path / "old.safetensors", "0.9", {"layers": {"unet.x": {"shuffled": True}}})
    before = old.read_bytes()
    done = migrate_file(old, "1.0", tmp_path / "new.safetensors", steps=SYNTHETIC)
    assert (done.start, done.to) == (Version(0, 9), Version(1, 0)) and old.read_bytes() == before
    headers = read_header(old), read_header(done.path)
    data = [h.path.read_bytes()[h.data_start :] for h in headers]
    assert data[0] == data[1] and headers[0].tensors == headers[1].tensors
    adapter = from_tensors(headers[1], load(headers[1]))
    assert adapter["unet.x"].sums[0].rows == "shuffled" and validate(done.path) == ()


def test_a_file_that_is_there_already_is_its_own_migration(tmp_path):
    path = native(tmp_path / "x.safetensors")
    migrate_file(path, "1.0", tmp_path / "y.safetensors")
    assert path.read_bytes() == (tmp_path / "y.safetensors").read_bytes()


def test_a_refused_migration_names_the_file_and_writes_nothing(tmp_path):
    path = native(tmp_path / "x.safetensors")
    with pytest.raises(NewerSchemaError, match=r"x\.safetensors"):
        migrate_file(path, "3.0", tmp_path / "y.safetensors")
    with pytest.raises(ConflictError):
        migrate_file(path, "1.0", path)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_a_file_of_3_0_is_refused_by_name_by_the_reader_and_by_validate(tmp_path):
    path = native(tmp_path / "x.safetensors", "3.0")
    header = read_header(path)
    with pytest.raises(NewerSchemaError, match=r"x\.safetensors: this file has schema 3\.0"):
        from_tensors(header, load(header))
    assert [f.code for f in validate(path)] == ["KH131"]


def test_a_step_down_drops_vectors_only_by_consent(tmp_path):
    vectors = {"unet.conv_in.bias": torch.ones(4)}
    delta = LayerDelta((KronTerms(torch.randn(1, 2, 3), torch.randn(1, 4, 2)),), (8, 6))
    path = tmp_path / "x.safetensors"
    write_tensors(path, *to_tensors(Adapter({"unet.x": delta}, vectors=vectors)))
    with pytest.raises(LossyError, match="contains 1 vector ") as caught:
        migrate_file(path, "1.0", tmp_path / "y.safetensors")
    assert "--allow-loss" in caught.value.fix and not (tmp_path / "y.safetensors").exists()
    assert migrate_file(path, "1.0", tmp_path / "y.safetensors", allow_loss=True).left_out == 1
    header = read_header(tmp_path / "y.safetensors")
    assert validate(header.path) == () and not from_tensors(header, load(header)).vectors


def test_a_file_without_vectors_goes_up_to_2_0_and_back_without_a_change(tmp_path):
    path = native(tmp_path / "x.safetensors")
    up = migrate_file(path, "2.0", tmp_path / "up.safetensors").path
    assert read_header(up).metadata["krona.schema"] == "2.0" and validate(up) == ()
    down = migrate_file(up, "1.0", tmp_path / "down.safetensors").path
    assert down.read_bytes() == path.read_bytes()


def test_a_vector_is_not_a_tensor_of_1_0(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors, metadata = to_tensors(Adapter({}, vectors={"unet.conv_in.bias": torch.ones(4)}))
    write_tensors(path, tensors, metadata | {"krona.schema": "1.0"})
    assert [f.code for f in validate(path) if f.severity == "error"] == ["KH129"]
