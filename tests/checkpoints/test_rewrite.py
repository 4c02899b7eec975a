"""Rewritten checkpoints: changed tensors have their new values, and all other bytes are unchanged."""

import errno
import hashlib
import os
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from krona_hub.checkpoints import byte_ranges
from krona_hub.checkpoints import rewrite as rewriting
from krona_hub.checkpoints.byte_ranges import Copier, Range
from krona_hub.checkpoints.header import read_header
from krona_hub.checkpoints.rewrite import TensorChange, check_space, new_size, rewrite
from krona_hub.checkpoints.writer import write_tensors
from krona_hub.errors import ConflictError, IncompleteError, IntegrityError, ResourceError
from tests.merging.made import tensors, times, write_base

names = st.sets(st.sampled_from("abcdef"))


def raw(path):
    """Name -> (dtype, bytes) of every tensor."""
    header, data = read_header(path), path.read_bytes()[read_header(path).data_start :]
    return {name: (info.dtype, data[info.start : info.end]) for name, info in header.tensors.items()}


@settings(deadline=None, max_examples=30)
@given(changed=names, widened=names, threads=st.integers(1, 3), order=st.permutations(sorted(tensors())))
def test_changed_tensors_are_new_and_all_others_keep_their_bytes(tmp_path_factory, changed, widened, threads, order):
    folder = tmp_path_factory.mktemp("r")
    base, out = folder / "base.safetensors", folder / "out.safetensors"
    write_in_order(base, {name: tensors()[name] for name in order})
    changes = {f"{n}.weight": times(-1.5, new="F32" if n in widened else "F16") for n in changed}
    counts = []
    rewrite(read_header(base), out, changes, metadata={"b": "2", "a": "1"}, threads=threads, progress=counts.append)
    expected = {
        name: (tensor.float() * -1.5).to(torch.float32 if name[0] in widened else torch.float16)
        if name in changes
        else tensor
        for name, tensor in tensors().items()
    }
    found = load_file(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[n], t) and found[n].dtype == t.dtype for n, t in expected.items())
    assert {n: r for n, r in raw(out).items() if n not in changes} == {
        n: r for n, r in raw(base).items() if n not in changes
    }
    assert safe_open(out, "pt").metadata() == dict(read_header(out).metadata) == {"a": "1", "b": "2"}
    dtypes = {name: change.info_dtype for name, change in changes.items()}
    size = new_size(read_header(base), dtypes, metadata={"a": "1", "b": "2"})
    assert sum(counts) == out.stat().st_size == size


def write_in_order(path, content):
    """Store the tensors in the given order, which no writer would use but the format allows."""
    import json

    from krona_hub.checkpoints.writer import DTYPE_NAMES

    fields, data = {}, b""
    for name, tensor in content.items():
        piece = tensor.numpy().tobytes()
        dtype = DTYPE_NAMES[str(tensor.dtype).removeprefix("torch.")]
        fields[name] = {"dtype": dtype, "shape": tensor.shape, "data_offsets": [len(data), len(data) + len(piece)]}
        data += piece
    text = json.dumps(fields).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def test_the_order_of_the_file_stays_and_the_data_keeps_its_place_in_the_pages(tmp_path):
    base, out = write_base(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    rewrite(read_header(base), out, {"c.weight": times(2)}, metadata={"long": "x" * 5000})
    old, new = read_header(base), read_header(out)
    assert list(new.tensors.items()) == sorted(old.tensors.items(), key=lambda item: item[1].start)
    assert new.data_start % 4096 == old.data_start % 4096 and new.data_start % 8 == 0


def test_a_wider_type_leaves_no_tensor_misaligned(tmp_path):
    base, out = tmp_path / "base.safetensors", tmp_path / "out.safetensors"
    write_tensors(base, {"a.weight": torch.ones(3).half(), "b.weight": torch.ones(5).half()})
    rewrite(read_header(base), out, {"b.weight": times(2, new="F32")}, metadata={})
    assert all(info.start % (info.nbytes // info.numel) == 0 for info in read_header(out).tensors.values())
    assert load_file(out)["b.weight"].tolist() == [2.0] * 5


def test_equal_input_gives_equal_bytes_for_any_number_of_threads(tmp_path):
    base = write_base(tmp_path / "base.safetensors")
    for threads in (1, 2, 4):
        changes = {f"{n}.weight": times(0.3) for n in "ace"}
        rewrite(read_header(base), tmp_path / str(threads), changes, metadata={"k": "v"}, threads=threads)
    assert len({(tmp_path / str(threads)).read_bytes() for threads in (1, 2, 4)}) == 1


def test_the_hash_of_the_data_is_put_into_the_header(tmp_path):
    base, out = write_base(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    rewrite(read_header(base), out, {"a.weight": times(2)}, metadata={"title": "t"}, data_hash="modelspec.hash_sha256")
    header = read_header(out)
    digest = hashlib.sha256(out.read_bytes()[header.data_start :]).hexdigest()
    assert header.metadata == {"title": "t", "modelspec.hash_sha256": f"0x{digest}"}


def sends(*pieces):
    def produce(old, sink):
        for offset, length in pieces:
            sink(offset, memoryview(bytes(length)))

    return TensorChange("F16", produce)


@pytest.mark.parametrize(
    "pieces",
    [[], [(0, 308)], [(0, 312)], [(0, 200), (100, 110)], [(100, 210), (0, 100)], [(-2, 310)]],
    ids=["nothing", "too little", "too much", "twice", "out of order", "before the start"],
)
def test_a_tensor_that_is_not_made_whole_and_in_order_is_no_output(tmp_path, pieces):
    base, out = write_base(tmp_path / "base.safetensors"), tmp_path / "out.safetensors"
    with pytest.raises(IntegrityError, match=r"'a\.weight' has 310 bytes"):
        rewrite(read_header(base), out, {"a.weight": sends(*pieces)}, metadata={})
    assert [p.name for p in tmp_path.iterdir()] == ["base.safetensors"]


def test_a_change_of_a_tensor_that_is_not_there_is_an_error(tmp_path):
    base = write_base(tmp_path / "base.safetensors")
    with pytest.raises(IncompleteError, match=r"tensor 'z\.weight' not found"):
        rewrite(read_header(base), tmp_path / "out", {"z.weight": times(2)}, metadata={})


def test_an_output_that_exists_is_kept_unless_it_may_be_replaced(tmp_path):
    base, out = write_base(tmp_path / "base.safetensors"), tmp_path / "out"
    out.write_text("mine")
    with pytest.raises(ConflictError):
        rewrite(read_header(base), out, {}, metadata={})
    assert out.read_text() == "mine"
    rewrite(read_header(base), out, {}, metadata={}, overwrite=True)
    assert raw(out) == raw(base)


def test_a_base_that_changed_since_its_header_was_read_is_an_error(tmp_path):
    base = write_base(tmp_path / "base.safetensors")
    header = read_header(base)
    with base.open("ab") as file:
        file.write(b"more")
    with pytest.raises(IntegrityError, match="changed"):
        rewrite(header, tmp_path / "out", {}, metadata={})


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_error_of_one_worker_stops_the_others_and_comes_out(tmp_path, threads):
    base, out = write_base(tmp_path / "base.safetensors"), tmp_path / "out"
    begun, failed = [], threading.Event()

    def fails(old, sink):
        failed.set()
        raise ZeroDivisionError("mine")

    def waits(old, sink):
        begun.append(old)
        failed.wait(5)
        times(1).produce(old, sink)

    changes = {"a.weight": TensorChange("F16", fails)} | {f"{n}.weight": TensorChange("F16", waits) for n in "bcdef"}
    with pytest.raises(ZeroDivisionError, match="mine"):
        rewrite(read_header(base), out, changes, metadata={}, threads=threads)
    assert len(begun) < 5
    assert [p.name for p in tmp_path.iterdir()] == ["base.safetensors"]


def test_an_error_in_the_progress_stops_the_work_too(tmp_path):
    def stop(count):
        raise KeyboardInterrupt

    base = write_base(tmp_path / "base.safetensors")
    with pytest.raises(KeyboardInterrupt):
        rewrite(read_header(base), tmp_path / "out", {"a.weight": times(2)}, metadata={}, progress=stop)
    assert [p.name for p in tmp_path.iterdir()] == ["base.safetensors"]


def test_progress_is_never_told_by_two_threads_at_a_time(tmp_path):
    base = write_base(tmp_path / "base.safetensors")
    inside, most = [], []

    def report(count):
        inside.append(count)
        most.append(len(inside))
        inside.pop()

    changes = {f"{n}.weight": times(2) for n in "abcdef"}
    rewrite(read_header(base), tmp_path / "out", changes, metadata={}, threads=4, progress=report)
    assert set(most) == {1}


def test_too_little_space_is_told_before_anything_is_written(tmp_path, monkeypatch):
    usage = os.statvfs(tmp_path)
    with pytest.raises(ResourceError, match="GB more than are free"):
        check_space(tmp_path, usage.f_bavail * usage.f_frsize + (1 << 40))
    monkeypatch.setattr(rewriting.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10}))
    base = write_base(tmp_path / "base.safetensors")
    with pytest.raises(ResourceError, match="needs"):
        rewrite(read_header(base), tmp_path / "out", {}, metadata={})
    assert [p.name for p in tmp_path.iterdir()] == ["base.safetensors"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, monkeypatch, code):
    base = write_base(tmp_path / "base.safetensors")
    original, calls = byte_ranges.write_at, []

    def full(file, data, offset):
        calls.append(offset)
        if len(calls) > 3:
            raise OSError(code, os.strerror(code))
        original(file, data, offset)

    monkeypatch.setattr(rewriting, "write_at", full)
    changes = {f"{n}.weight": times(2) for n in "abcdef"}
    with pytest.raises(ResourceError):
        rewrite(read_header(base), tmp_path / "out", changes, metadata={})
    assert [p.name for p in tmp_path.iterdir()] == ["base.safetensors"]


# copying


@pytest.mark.parametrize("refused", [(), ("copy_file_range",), ("copy_file_range", "sendfile")])
@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_every_way_of_copying_gives_the_same_bytes_and_a_refused_one_is_tried_once(
    tmp_path, monkeypatch, refused, code
):
    tried = dict.fromkeys(refused, 0)

    def refusing(name):
        def call(*arguments):
            tried[name] += 1
            raise OSError(code, os.strerror(code))

        return call

    for name in refused:
        monkeypatch.setattr(os, name, refusing(name))
    data = os.urandom(300_000)
    (tmp_path / "a").write_bytes(data)
    with (tmp_path / "a").open("rb") as source, (tmp_path / "b").open("w+b") as target:
        copier = Copier(source, target)
        for piece in (Range(0, 5, 100_000), Range(200_001, 100_005, 99_999)):
            copier.copy(piece)
    assert (tmp_path / "b").read_bytes() == bytes(5) + data[:100_000] + data[200_001:]
    assert all(count == 1 for count in tried.values())


def test_a_system_without_these_calls_copies_through_memory(tmp_path, monkeypatch):
    for name in ("copy_file_range", "sendfile", "pread", "pwrite", "posix_fadvise", "fdatasync"):
        monkeypatch.delattr(os, name)
    base = write_base(tmp_path / "base.safetensors")
    rewrite(read_header(base), tmp_path / "out", {}, metadata={}, threads=2)
    assert raw(tmp_path / "out") == raw(base)


def test_a_source_that_ends_too_early_is_an_error_and_no_endless_loop(tmp_path):
    (tmp_path / "a").write_bytes(b"short")
    source, target = (tmp_path / "a").open("rb"), (tmp_path / "b").open("w+b")
    with source, target, pytest.raises(ResourceError, match="was truncated while it was being read"):
        Copier(source, target).copy(Range(0, 0, 6))


def test_a_full_disk_is_not_taken_for_a_way_that_is_refused(tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "full")

    for name in ("copy_file_range", "sendfile", "pwrite"):
        monkeypatch.setattr(os, name, full)
    (tmp_path / "a").write_bytes(b"x" * 100)
    source, target = (tmp_path / "a").open("rb"), (tmp_path / "b").open("w+b")
    with source, target, pytest.raises(OSError, match="full"):
        Copier(source, target).copy(Range(0, 0, 100))
