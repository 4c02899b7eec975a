"""The output of a merge has the layout of its input, appears whole, and never at the base's expense."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from krona_hub.checkpoints.header import read_header
from krona_hub.errors import ConflictError, FormatError, NotFoundError, ResourceError, UsageError
from krona_hub.merging.output.write_model import (
    MergeDestination,
    MergedFile,
    bytes_to_write,
    check_destination,
    write_merged,
)
from tests.merging.made import contents, merged_file, tensors, write_base, write_pipeline

UNET = ("unet/model-1-of-2.safetensors", "unet/model-2-of-2.safetensors")
TEXT = "text_encoder/model.safetensors"


def changes(folder, new="F16"):
    return [
        merged_file(folder / UNET[0], "b", new=new),
        merged_file(folder / UNET[1], "d", "e", new=new),
        merged_file(folder / TEXT, "a", "f"),
    ]


@pytest.fixture
def base(tmp_path):
    return write_pipeline(tmp_path / "base")


def test_a_file_becomes_a_file(tmp_path):
    base, out = write_base(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    written = write_merged(MergeDestination(base, out), [merged_file(base, "a")])
    assert written.files == (out,) and written.copied == written.left_out == ()
    found = load_file(out)
    assert torch.equal(found["a.weight"], 3 * tensors()["a.weight"])
    assert torch.equal(found["b.weight"], tensors()["b.weight"])
    assert written.nbytes == out.stat().st_size == bytes_to_write(MergeDestination(base, out), [merged_file(base, "a")])


def test_a_folder_becomes_a_folder_without_the_pickles_of_what_was_merged(tmp_path, base):
    before, out, steps = contents(base), tmp_path / "out", []
    written = write_merged(MergeDestination(base, out), changes(base), progress=steps.append)
    after = contents(out)
    assert before.keys() - after.keys() == {"text_encoder/pytorch_model.bin"} and after.keys() <= before.keys()
    assert [p.as_posix() for p in written.left_out] == ["text_encoder/pytorch_model.bin"]
    assert {n for n in after if after[n] != before[n]} == {*UNET, TEXT}
    assert {p.relative_to(out).as_posix() for p in written.copied} | {*UNET, TEXT} | {
        "unet/model.safetensors.index.json"
    } >= set(after) - {"unet/model.safetensors.index.json"}
    assert contents(base) == before
    assert sum(steps) == bytes_to_write(MergeDestination(base, out), changes(base)) == sum(map(len, after.values()))


def test_the_index_of_shards_tells_the_new_size(tmp_path, base):
    write_merged(MergeDestination(base, tmp_path / "out"), changes(base, new="F32"))
    path = "unet/model.safetensors.index.json"
    old, new = json.loads((base / path).read_text()), json.loads((tmp_path / "out" / path).read_text())
    sizes = [i.nbytes for shard in UNET for i in read_header(tmp_path / "out" / shard).tensors.values()]
    assert new["metadata"]["total_size"] == sum(sizes) > old["metadata"]["total_size"]
    assert new["weight_map"] == old["weight_map"]


def test_an_index_that_is_none_is_told(tmp_path, base):
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        (base / "unet/model.safetensors.index.json").write_text(text)
        with pytest.raises(FormatError, match="not a valid index"):
            write_merged(MergeDestination(base, tmp_path / "out"), changes(base, new="F32"))
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_linked_files_are_the_base_s_own_and_changed_ones_are_not(tmp_path, base):
    out = tmp_path / "out"
    write_merged(MergeDestination(base, out, link=True), changes(base, new="F32"))
    linked = {n for n in contents(out) if (out / n).samefile(base / n)}
    assert linked == contents(out).keys() - {*UNET, TEXT, "unet/model.safetensors.index.json"}


def test_where_links_are_refused_files_are_copied(tmp_path, base, monkeypatch):
    def refuse(*arguments):
        raise OSError(18, "another disk")

    monkeypatch.setattr(os, "link", refuse)
    out = tmp_path / "out"
    write_merged(MergeDestination(base, out, link=True), changes(base))
    assert (out / "vae/vae.safetensors").read_bytes() == (base / "vae/vae.safetensors").read_bytes()
    assert not (out / "vae/vae.safetensors").samefile(base / "vae/vae.safetensors")


def test_links_of_a_download_cache_are_followed_and_the_cache_stays_as_it_is(tmp_path):
    blobs = write_pipeline(tmp_path / "blobs")
    snapshot = tmp_path / "snapshots" / "1"
    for name in contents(blobs):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / name)
    before, out = contents(blobs), tmp_path / "out"
    write_merged(MergeDestination(snapshot, out), changes(snapshot))
    assert not [p for p in out.rglob("*") if p.is_symlink()]
    assert contents(blobs) == before == contents(snapshot)


def test_a_linked_folder_is_followed_and_a_circle_of_links_is_an_error(tmp_path, base):
    (tmp_path / "vae").mkdir()
    (base / "vae").rename(tmp_path / "vae" / "real")
    (base / "vae").symlink_to(tmp_path / "vae" / "real")
    write_merged(MergeDestination(base, tmp_path / "out"), changes(base))
    assert (tmp_path / "out/vae/vae.safetensors").is_file() and not (tmp_path / "out/vae").is_symlink()
    (base / "tokenizer" / "again").symlink_to(base)
    with pytest.raises(ConflictError, match="is a link to a folder that contains it"):
        write_merged(MergeDestination(base, tmp_path / "again"), changes(base))
    assert not (tmp_path / "again").exists()


def test_a_pipe_and_a_link_that_leads_nowhere_are_errors(tmp_path, base):
    (base / "broken.json").symlink_to("nowhere")
    with pytest.raises(NotFoundError, match="is broken"):
        write_merged(MergeDestination(base, tmp_path / "out"), changes(base))
    (base / "broken.json").unlink()
    os.mkfifo(base / "pipe")
    with pytest.raises(ConflictError, match="neither a file nor a folder"):
        write_merged(MergeDestination(base, tmp_path / "out"), changes(base))
    assert not (tmp_path / "out").exists()


def test_the_history_of_a_clone_is_not_copied(tmp_path, base):
    for name in (".git/lfs", ".cache/huggingface"):
        (base / name).mkdir(parents=True)
        (base / name / "object").write_bytes(b"large")
    write_merged(MergeDestination(base, tmp_path / "out"), changes(base))
    assert not [n for n in contents(tmp_path / "out") if n.startswith(".")]


# what forbids an output


def test_the_output_may_not_be_the_base_nor_lie_in_it_nor_hold_it(tmp_path, base):
    (tmp_path / "other name").symlink_to(base)
    for out in (base, tmp_path / "other name", base / "out", base / "unet", tmp_path):
        with pytest.raises(ConflictError, match=r"input"):
            check_destination(MergeDestination(base, out, overwrite=True))


def test_a_file_is_not_written_over_itself_under_any_name(tmp_path):
    base = write_base(tmp_path / "base.safetensors")
    (tmp_path / "link").symlink_to(base)
    (tmp_path / "hard").hardlink_to(base)
    for out in (base, tmp_path / "link", tmp_path / "hard"):
        with pytest.raises(ConflictError, match="input itself"):
            check_destination(MergeDestination(base, out, overwrite=True))


def test_an_output_is_never_written_through_a_linked_folder(tmp_path, base):
    out, before = tmp_path / "out", contents(base)
    out.mkdir()
    (out / "unet").symlink_to(base / "unet")
    with pytest.raises(ConflictError, match="link to a folder"):
        write_merged(MergeDestination(base, out, overwrite=True), changes(base))
    assert contents(base) == before


def test_an_output_that_exists_or_is_of_the_other_kind_is_an_error(tmp_path, base):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for out in ("file", "full"):
        with pytest.raises(ConflictError):
            check_destination(MergeDestination(base, tmp_path / out))
    with pytest.raises(ConflictError, match="folder"):
        check_destination(
            MergeDestination(write_base(tmp_path / "base.safetensors"), tmp_path / "full", overwrite=True)
        )
    with pytest.raises(NotFoundError):
        check_destination(MergeDestination(base, tmp_path / "no" / "out"))
    with pytest.raises(NotFoundError):
        check_destination(MergeDestination(tmp_path / "no base", tmp_path / "out"))


def test_files_of_an_output_that_is_overwritten_are_replaced_and_others_stay(tmp_path, base):
    out = tmp_path / "out"
    (out / "unet").mkdir(parents=True)
    (out / "unet/model-1-of-2.safetensors").write_text("old")
    (out / "notes.txt").write_text("mine")
    write_merged(MergeDestination(base, out, overwrite=True), changes(base))
    assert (out / "notes.txt").read_text() == "mine"
    assert read_header(out / UNET[0]).metadata == {"krona.merge": "x"}


def test_a_place_that_is_not_writable_is_told_before_work(tmp_path, base, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # a superuser may write everywhere
    for place in (MergeDestination(base, tmp_path / "out"), MergeDestination(base, None, tmp_path / "undo")):
        with pytest.raises(ResourceError, match="not writable"):
            check_destination(place, [base / TEXT])


def test_in_place_needs_a_way_back(base, tmp_path):
    with pytest.raises(UsageError, match="requires an undo file"):
        check_destination(MergeDestination(base, None))
    with pytest.raises(UsageError, match="link"):
        check_destination(MergeDestination(base, None, tmp_path / "undo", link=True))


def test_a_link_is_not_changed_in_place_for_others_may_use_what_it_leads_to(tmp_path):
    blob = write_base(tmp_path / "blob")
    (tmp_path / "base.safetensors").symlink_to(blob)
    with pytest.raises(ConflictError, match="may be shared"):
        check_destination(
            MergeDestination(tmp_path / "base.safetensors", None, tmp_path / "undo"), [tmp_path / "base.safetensors"]
        )


def test_an_undo_file_in_the_way_is_an_error(tmp_path, base):
    for place in (MergeDestination(base, tmp_path / "out", base / "undo"), MergeDestination(base, None, base / "undo")):
        with pytest.raises(ConflictError, match="conflicts with the merge"):
            check_destination(place)
    (tmp_path / "undo").write_text("mine")
    with pytest.raises(ConflictError, match="exists"):
        check_destination(MergeDestination(base, tmp_path / "out", tmp_path / "undo"))
    check_destination(MergeDestination(base, tmp_path / "out", tmp_path / "undo", overwrite=True))
    with pytest.raises(ConflictError, match="may be incomplete"):  # it may be the only way back
        check_destination(MergeDestination(base, None, tmp_path / "undo", overwrite=True))
    file = write_base(tmp_path / "base.safetensors")
    with pytest.raises(ConflictError):
        check_destination(MergeDestination(file, tmp_path / "o", tmp_path / "o"))


def test_a_disk_that_is_too_small_is_told_before_work(tmp_path, base, monkeypatch):
    from krona_hub.checkpoints import rewrite

    monkeypatch.setattr(rewrite.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    for place in (MergeDestination(base, tmp_path / "out"), MergeDestination(base, None, tmp_path / "undo")):
        with pytest.raises(ResourceError, match="more than are free"):
            write_merged(place, changes(base))
    assert [p.name for p in tmp_path.iterdir()] == ["base"]


def test_an_error_in_one_file_leaves_neither_output_nor_undo_file(tmp_path, base):
    def fails(old, sink):
        raise ZeroDivisionError

    before = contents(base)
    good = changes(base)
    bad = MergedFile(good[-1].header, {"a.weight": type(good[-1].changes["a.weight"])("F16", fails)}, {})
    for place in (
        MergeDestination(base, tmp_path / "out", tmp_path / "undo"),
        MergeDestination(base, None, tmp_path / "undo"),
    ):
        with pytest.raises(ZeroDivisionError):
            write_merged(place, [*good[:-1], bad])
    assert [p.name for p in tmp_path.iterdir()] == ["base"] and contents(base) == before


def test_in_place_the_files_keep_their_rights_and_the_pickles_stay(tmp_path, base):
    (base / TEXT).chmod(0o640)
    write_merged(MergeDestination(base, None, tmp_path / "undo"), changes(base))
    assert (base / TEXT).stat().st_mode & 0o777 == 0o640
    assert (base / "text_encoder/pytorch_model.bin").exists()
    assert read_header(base / TEXT).metadata == {"krona.merge": "x"}
