"""What was merged can be restored byte for byte, and nothing else is taken for it."""

import json

import pytest

from krona_hub.checkpoints.header import read_header
from krona_hub.checkpoints.writer import copied, write_stored
from krona_hub.errors import (
    ConflictError,
    FormatError,
    IntegrityError,
    NewerSchemaError,
    NotFoundError,
    ResourceError,
    UsageError,
)  # fmt: skip
from krona_hub.merging.output.write_model import MergeDestination, write_merged
from krona_hub.merging.undo import unmerge
from tests.merging.made import contents, merged_file, write_base, write_pipeline
from tests.merging.test_model_folder import TEXT, UNET, changes

INDEX = "unet/model.safetensors.index.json"


@pytest.fixture
def file(tmp_path):
    """A base, its merge and the undo file."""
    base = write_base(tmp_path / "base.safetensors")
    merged, undo = tmp_path / "merged.safetensors", tmp_path / "undo.safetensors"
    write_merged(MergeDestination(base, merged, undo), [merged_file(base, "b", "e")])
    return base, merged, undo


@pytest.fixture
def folder(tmp_path):
    """A base whose types became wider, its merge and the undo file."""
    base = write_pipeline(tmp_path / "base")
    merged, undo = tmp_path / "merged", tmp_path / "undo.safetensors"
    write_merged(MergeDestination(base, merged, undo), changes(base, new="F32"))
    return base, merged, undo


def flip(path, place):
    """Change one byte."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_a_file_is_restored_byte_for_byte(tmp_path, file):
    base, merged, undo = file
    report = unmerge(merged, undo, tmp_path / "back", progress=lambda count: None)
    assert (tmp_path / "back").read_bytes() == base.read_bytes() != merged.read_bytes()
    assert report.restored == (tmp_path / "back",) and report.unchanged == report.copied == ()
    assert report.nbytes == base.stat().st_size
    unmerge(merged, undo, in_place=True)
    assert merged.read_bytes() == base.read_bytes()


def test_a_folder_is_restored_with_its_index_and_all_but_the_pickles(tmp_path, folder):
    base, merged, undo = folder
    report = unmerge(merged, undo, tmp_path / "back")
    before = contents(base)
    del before["text_encoder/pytorch_model.bin"]  # the merged folder does not have it
    assert contents(tmp_path / "back") == before
    assert {p.relative_to(tmp_path / "back").as_posix() for p in report.restored} == {*UNET, TEXT, INDEX}


def test_a_merge_in_place_is_undone_in_place(tmp_path):
    base = write_pipeline(tmp_path / "base")
    before = contents(base)
    write_merged(MergeDestination(base, None, tmp_path / "undo"), changes(base, new="F32"))
    assert {n for n, data in contents(base).items() if data != before[n]} == {*UNET, TEXT, INDEX}
    unmerge(base, tmp_path / "undo", in_place=True)
    assert contents(base) == before


@pytest.mark.parametrize("done", [(), (UNET[0],), (TEXT, INDEX), (*UNET, TEXT)])
def test_a_half_done_merge_in_place_is_undone_too(tmp_path, folder, done):
    base, merged, undo = folder
    before = contents(base)
    for name in done:
        (base / name).write_bytes((merged / name).read_bytes())
    report = unmerge(base, undo, in_place=True)
    assert contents(base) == before
    assert {p.relative_to(base).as_posix() for p in report.restored} == set(done)
    assert len(report.restored) + len(report.unchanged) == 4


def test_the_undo_file_is_a_sound_safetensors_file_of_the_touched_tensors(file):
    _, merged, undo = file
    header = read_header(undo)
    assert set(header.tensors) == {"0.header", "0.tensor.b.weight", "0.tensor.e.weight"}
    assert undo.stat().st_size < merged.stat().st_size


def test_another_file_than_the_merged_one_is_refused(tmp_path, file):
    base, _, undo = file
    other = tmp_path / "other.safetensors"
    write_merged(MergeDestination(base, other), [merged_file(base, "b", "e", factor=2.0)])
    before = contents(tmp_path)
    with pytest.raises(IntegrityError, match=r"'[be]\.weight' of .*other.* is not what the merge wrote"):
        unmerge(other, undo, tmp_path / "back")
    with pytest.raises(IntegrityError, match="has no tensor"):
        unmerge(undo, undo, tmp_path / "back")
    assert contents(tmp_path) == before


def test_a_merged_file_that_was_changed_elsewhere_since_is_refused(tmp_path, file):
    _, merged, undo = file
    header = read_header(merged)
    flip(merged, header.data_start + header.tensors["c.weight"].start + 9)
    changed = merged.read_bytes()
    for where in ({"out": tmp_path / "back"}, {"in_place": True}):
        with pytest.raises(IntegrityError, match="did not touch"):
            unmerge(merged, undo, **where)
    assert not (tmp_path / "back").exists() and merged.read_bytes() == changed


def test_a_damaged_undo_file_restores_nothing(tmp_path, file):
    _, merged, undo = file
    header = read_header(undo)
    flip(undo, header.data_start + header.tensors["0.tensor.b.weight"].start)
    with pytest.raises(IntegrityError):
        unmerge(merged, undo, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_changed_index_or_a_missing_file_is_refused(tmp_path, folder):
    _, merged, undo = folder
    (merged / INDEX).write_text("{}")
    with pytest.raises(IntegrityError, match="index"):
        unmerge(merged, undo, tmp_path / "back")
    (merged / INDEX).unlink()
    with pytest.raises(IntegrityError, match="missing"):
        unmerge(merged, undo, tmp_path / "back")


def test_what_is_no_undo_file_is_told(tmp_path, file):
    base, merged, _ = file
    with pytest.raises(FormatError, match="not an undo file"):
        unmerge(merged, base, tmp_path / "back")
    with pytest.raises(NotFoundError):
        unmerge(merged, tmp_path / "nowhere", tmp_path / "back")
    with pytest.raises(NotFoundError):
        unmerge(tmp_path / "nowhere", file[2], tmp_path / "back")


def forged(undo, path, **changed):
    """The undo file with another record."""
    header = read_header(undo)
    record = json.loads(header.metadata["krona.undo"]) | changed
    write_stored(path, copied(header), {"krona.undo": json.dumps(record)})
    return path


def entry(undo, **changed):
    return [json.loads(read_header(undo).metadata["krona.undo"])["files"][0] | changed]


def test_an_undo_file_of_another_version_or_without_sense_is_told(tmp_path, file):
    _, merged, undo = file
    with pytest.raises(NewerSchemaError, match=r"2\.0"):
        unmerge(merged, forged(undo, tmp_path / "newer", version="2.0"), tmp_path / "back")
    for i, files in enumerate(([], 3, [{}], ["x"], entry(undo, merged={"z": "0"}), entry(undo, size="x"))):
        with pytest.raises(FormatError, match="corrupt undo file"):
            unmerge(merged, forged(undo, tmp_path / str(i), files=files), tmp_path / "back")


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a/../../evil", "", "."])
def test_an_undo_file_cannot_name_places_outside_the_folder(tmp_path, folder, path):
    _, merged, undo = folder
    evil = forged(undo, tmp_path / "evil.safetensors", files=entry(undo, path=path))
    with pytest.raises(FormatError, match="corrupt undo file"):
        unmerge(merged, evil, tmp_path / "back")


def test_outputs_of_unmerge_are_checked_like_those_of_merge(tmp_path, file, monkeypatch):
    _, merged, undo = file
    with pytest.raises(UsageError):
        unmerge(merged, undo)
    with pytest.raises(UsageError):
        unmerge(merged, undo, tmp_path / "back", in_place=True)
    for out in (merged, undo):
        with pytest.raises(ConflictError, match="input itself"):
            unmerge(merged, undo, out, overwrite=True)
    (tmp_path / "back").write_text("mine")
    with pytest.raises(ConflictError, match="exists"):
        unmerge(merged, undo, tmp_path / "back")
    with pytest.raises(ConflictError, match="merged file"):
        unmerge(tmp_path, undo, tmp_path / "new")
    from krona_hub.checkpoints import rewrite

    monkeypatch.setattr(rewrite.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    with pytest.raises(ResourceError):
        unmerge(merged, undo, tmp_path / "new")
