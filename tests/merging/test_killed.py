"""Whatever kills a merge, and whenever: no partial output, no changed base, and the next run succeeds."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from krona_hub.checkpoints.atomic import atomic_file, atomic_folder
from krona_hub.checkpoints.header import read_header
from krona_hub.errors import ConflictError, ResourceError
from krona_hub.merging.output.write_model import MergeDestination, write_merged
from krona_hub.merging.undo import unmerge
from tests.merging.made import contents, merged_file, write_base, write_pipeline
from tests.merging.test_model_folder import changes

DEEDS = ("pwrite", "copy_file_range", "fsync", "rename", "replace", "link", "mkdir", "ftruncate")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def in_a_child(work) -> int:
    """The wait status of a child process that does `work`; 0 when it ended well."""
    child = os.fork()
    if not child:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def killed_before_deed(number, work) -> bool:
    """Do `work` in a child that kills itself before its n-th deed on the file system. False when it got to its end."""
    count = 0

    def counting(deed):
        def call(*arguments, **more):
            nonlocal count
            count += 1
            if count == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return deed(*arguments, **more)

        return call

    def watched():
        for name in DEEDS:
            setattr(os, name, counting(getattr(os, name)))
        work()

    status = in_a_child(watched)
    assert status in (0, signal.SIGKILL), f"deed {number}: status {status}"
    return status != 0


def test_a_merge_of_a_file_killed_at_any_moment_leaves_the_whole_output_or_none(tmp_path):
    base, out, undo = write_base(tmp_path / "base.safetensors"), tmp_path / "out", tmp_path / "undo"
    files = [merged_file(base, "a", "c")]
    write_merged(MergeDestination(base, tmp_path / "whole", tmp_path / "whole undo"), files)
    before, whole, way_back = (p.read_bytes() for p in (base, tmp_path / "whole", tmp_path / "whole undo"))
    number = 1
    while killed_before_deed(number, lambda: write_merged(MergeDestination(base, out, undo, overwrite=True), files)):
        assert base.read_bytes() == before
        assert not out.exists() or (out.read_bytes() == whole and undo.read_bytes() == way_back)
        assert not undo.exists() or undo.read_bytes() == way_back
        if number % 3 == 0:  # a later run succeeds and clears away what the killed one left
            write_merged(MergeDestination(base, out, undo, overwrite=True), files)
            assert {p.name for p in tmp_path.iterdir()} == {base.name, "out", "undo", "whole", "whole undo"}
            out.unlink()
            undo.unlink()
        number += 1
    assert number > 10 and out.read_bytes() == whole


@pytest.mark.slow
def test_a_merge_of_a_folder_killed_at_any_moment_leaves_the_whole_folder_or_none(tmp_path):
    base, out = write_pipeline(tmp_path / "base"), tmp_path / "out"
    files = changes(base)
    write_merged(MergeDestination(base, tmp_path / "whole"), files)
    before, whole, number = contents(base), contents(tmp_path / "whole"), 1
    while killed_before_deed(number, lambda: write_merged(MergeDestination(base, out), files, threads=1)):
        assert contents(base) == before
        if out.exists():  # the rename was the last but one deed
            assert contents(out) == whole
            shutil.rmtree(out)
        number += 1
    assert number > 40 and contents(out) == whole
    assert {p.name for p in tmp_path.iterdir()} == {"base", "out", "whole"}


@pytest.mark.slow
def test_a_merge_in_place_killed_at_any_moment_can_be_undone(tmp_path):
    base, undo = write_pipeline(tmp_path / "base"), tmp_path / "undo"
    files = changes(base, new="F32")
    before, number, half_done = contents(base), 1, 0

    def now():
        return {name: data for name, data in contents(base).items() if not name.endswith(".part")}

    while killed_before_deed(number, lambda: write_merged(MergeDestination(base, None, undo), files, threads=1)):
        if now() != before:
            half_done += 1
            with pytest.raises(ConflictError, match="may be incomplete"):
                write_merged(MergeDestination(base, None, undo), files)
        if undo.exists():
            unmerge(base, undo, in_place=True)
            undo.unlink()
        assert now() == before
        number += 1
    assert half_done > 2  # between the renames of several files
    assert contents(base).keys() == before.keys() != before and contents(base) != before
    unmerge(base, undo, in_place=True)
    assert contents(base) == before


def test_leftovers_of_a_living_process_stay(tmp_path):
    with atomic_file(tmp_path / "x") as mine:
        mine.write(b"mine")
        with atomic_file(tmp_path / "x") as other:
            other.write(b"other")
        with pytest.raises(ConflictError), atomic_file(tmp_path / "x"):
            pass
        (tmp_path / "x").unlink()
    assert (tmp_path / "x").read_bytes() == b"mine"
    with atomic_folder(tmp_path / "y") as folder:
        (folder / "a").write_text("a")
        with pytest.raises(ZeroDivisionError), atomic_folder(tmp_path / "y"):
            raise ZeroDivisionError
    assert (tmp_path / "y" / "a").read_text() == "a"


def test_only_our_own_leftovers_are_removed(tmp_path):
    strangers = (".x.part", ".x.notes.part", ".xy.01234567.part", "x.01234567.part", ".x.0123456789.part")
    for name in (*strangers, ".x.01234567.part"):
        (tmp_path / name).write_text("?")
    (tmp_path / ".x.89abcdef.part").mkdir()
    with atomic_file(tmp_path / "x"):
        pass
    assert {p.name for p in tmp_path.iterdir()} == {"x", *strangers}


def test_a_limit_on_the_size_of_files_is_an_error_that_leaves_nothing(tmp_path):
    base = write_base(tmp_path / "base.safetensors")
    pipeline = write_pipeline(tmp_path / "pipeline")
    before = contents(tmp_path)

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
        for place, files in (
            (MergeDestination(base, tmp_path / "out"), [merged_file(base, "a")]),
            (MergeDestination(pipeline, tmp_path / "out"), changes(pipeline)),
            (MergeDestination(pipeline, None, tmp_path / "undo"), changes(pipeline)),
        ):
            with pytest.raises(ResourceError, match="limit"):
                write_merged(place, files)

    assert in_a_child(work) == 0
    assert contents(tmp_path) == before


LARGE = """
import json, resource, sys
from pathlib import Path
from krona_hub.checkpoints.header import read_header
from krona_hub.merging.output.write_model import MergedFile, MergeDestination, write_merged
from krona_hub.merging.undo import unmerge
from krona_hub.checkpoints.rewrite import TensorChange
assert "torch" not in sys.modules
resource.setrlimit(resource.RLIMIT_DATA, (100 << 20, 100 << 20))

def backwards(old, sink):
    for start in range(0, len(old), 1 << 19):
        sink(start, memoryview(bytes(old[start : start + (1 << 19)])[::-1]))

base, merged, undo, back = map(Path, sys.argv[1:])
header = read_header(base)
changes = {name: TensorChange("F16", backwards) for name in list(header.tensors)[::3]}
write_merged(MergeDestination(base, merged, undo), [MergedFile(header, changes, {})], threads=2)
unmerge(merged, undo, back)
"""


def write_large(path: Path, count: int, shape: tuple[int, int], name: str = "t{}") -> None:
    """So many fp16 tensors `t00`, `t01`, … that are zeros but for their first 500 numbers: mostly a hole."""
    size = 2 * shape[0] * shape[1]
    places = [[i * size, (i + 1) * size] for i in range(count)]
    fields = {
        name.format(f"{i:02}"): {"dtype": "F16", "shape": shape, "data_offsets": place}
        for i, place in enumerate(places)
    }
    text = json.dumps(fields).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for i, (start, _) in enumerate(places):
            file.seek(8 + len(text) + start)
            file.write(bytes([i + 1]) * 1000)
        file.truncate(8 + len(text) + count * size)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path):
    paths = [tmp_path / name for name in ("base", "merged", "undo", "back")]
    write_large(paths[0], 20, (3000, 5000))
    subprocess.run([sys.executable, "-c", LARGE, *paths], check=True, cwd=Path(__file__).parents[2])
    header = read_header(paths[1])
    with paths[1].open("rb") as file:
        file.seek(header.data_start + header.tensors["t00"].start + (1 << 19) - 1000)
        assert file.read(1000) == b"\x01" * 1000
    assert read_header(paths[3]).file_size == paths[0].stat().st_size
    for path in paths:
        path.unlink()
