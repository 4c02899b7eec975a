"""Files are written atomically and deterministically, and the safetensors library reads them."""

import errno
import os
import stat
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import _TYPES, load, load_file

from krona_hub.checkpoints import atomic
from krona_hub.checkpoints.atomic import atomic_file, atomic_folder, atomic_text
from krona_hub.checkpoints.header import read_header
from krona_hub.checkpoints.reader import load as load_tensors
from krona_hub.checkpoints.writer import DTYPE_NAMES, copied, header_bytes, write_stored, write_tensors
from krona_hub.errors import ConflictError, DtypeError, NotFoundError, ResourceError, UsageError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(lambda s: s != "__metadata__")
shapes = st.lists(st.integers(0, 4), max_size=4)
tensors = st.builds(lambda shape, dtype: torch.randint(0, 2, shape).to(dtype), shapes, st.sampled_from(DTYPES))
texts = st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), st.text(max_size=8), max_size=4)
texts = texts.filter(lambda d: all(v.isprintable() for v in d.values()))


@settings(deadline=None, max_examples=60)
@given(content=st.dictionaries(names, tensors, max_size=6), metadata=texts)
def test_the_safetensors_library_reads_what_we_write(tmp_path_factory, content, metadata):
    path = tmp_path_factory.mktemp("w") / "x.safetensors"
    write_tensors(path, content, metadata)
    for found in (load_file(path), load_tensors(read_header(path))):
        assert found.keys() == content.keys()
        for name, tensor in content.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert (file.metadata() or {}) == metadata == dict(read_header(path).metadata)


def test_every_type_of_the_library_that_torch_has_can_be_written():
    assert {f"torch.{name}": dtype for name, dtype in DTYPE_NAMES.items()} == {str(t): n for n, t in _TYPES.items()}


def test_equal_content_gives_equal_bytes_in_any_order_and_in_any_process(tmp_path):
    code = (
        "import sys, torch; from krona_hub.checkpoints.writer import write_tensors;"
        "write_tensors(sys.argv[1], {'b': torch.ones(3, dtype=torch.float16), 'a': torch.ones(2)},"
        "{'z': '1', 'a': '2', 'm': '3'})"
    )
    for name, seed in (("one", "1"), ("two", "2")):
        subprocess.run(
            [sys.executable, "-c", code, tmp_path / name], check=True, env={**os.environ, "PYTHONHASHSEED": seed}
        )
    write_tensors(tmp_path / "three", {"a": torch.ones(2), "b": torch.ones(3).half()}, {"m": "3", "a": "2", "z": "1"})
    assert len({(tmp_path / name).read_bytes() for name in ("one", "two", "three")}) == 1


def test_every_tensor_is_aligned_to_its_own_width(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(
        path, {"a": torch.ones(3).half(), "b": torch.ones(5).double(), "c": torch.ones(1), "d": torch.ones(1)}
    )
    header = read_header(path)
    assert header.data_start % 8 == 0
    for info in header.tensors.values():
        assert info.start % (info.nbytes // info.numel) == 0


def test_views_transposes_and_gradients_are_written_as_their_values(tmp_path):
    weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
    write_tensors(tmp_path / "x.safetensors", {"t": weight.T, "v": weight[1:, ::2]})
    found = load_file(tmp_path / "x.safetensors")
    assert torch.equal(found["t"], weight.detach().T) and torch.equal(found["v"], weight.detach()[1:, ::2])


def test_a_copy_without_torch_has_the_same_bytes(tmp_path):
    write_tensors(tmp_path / "a", {"x": torch.randn(5), "y": torch.randn(3, 2).bfloat16()}, {"k": "v"})
    header = read_header(tmp_path / "a")
    write_stored(tmp_path / "b", copied(header), header.metadata)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_what_safetensors_cannot_hold_is_refused_before_a_file_exists(tmp_path):
    for bad in (torch.ones(2, dtype=torch.complex128), torch.ones(2).to_sparse(), torch.ones(2, device="meta")):
        with pytest.raises(DtypeError):
            write_tensors(tmp_path / "x", {"t": bad})
    with pytest.raises(UsageError):
        write_tensors(tmp_path / "x", {"__metadata__": torch.ones(1)})
    with pytest.raises(UsageError):
        write_tensors(tmp_path / "x", {}, {"k": 3})
    with pytest.raises(UsageError):
        write_tensors(tmp_path / "x", {"\ud800": torch.ones(1)})
    assert not list(tmp_path.iterdir())


def test_a_header_above_the_limit_of_the_format_is_refused():
    with pytest.raises(ResourceError, match="limit of the format"):
        header_bytes([], {"k": "x" * 100_000_001})


@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError, SystemExit, MemoryError])
def test_an_interrupted_write_leaves_nothing_and_the_old_file_as_it_was(tmp_path, stop):
    (tmp_path / "x").write_text("old")
    with pytest.raises(stop), atomic_file(tmp_path / "x", overwrite=True) as file:
        file.write(b"half")
        raise stop
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and (tmp_path / "x").read_text() == "old"


@pytest.fixture
def full_disk(monkeypatch):
    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)


def test_a_full_disk_is_a_coded_error_and_leaves_nothing(tmp_path, full_disk):
    with pytest.raises(ResourceError, match="disk is full") as caught:
        write_tensors(tmp_path / "x", {"t": torch.ones(3)})
    assert caught.value.fix and not list(tmp_path.iterdir())


def test_a_full_disk_in_the_middle_of_a_folder_names_the_folder_that_was_asked_for(tmp_path, full_disk):
    with pytest.raises(ResourceError) as caught, atomic_folder(tmp_path / "run") as folder:
        write_tensors(folder / "x", {"t": torch.ones(3)})
    assert repr(str(tmp_path / "run" / "x")) in caught.value.cause and not list(tmp_path.iterdir())


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")  # noqa: PTH110
def test_a_truly_full_device_is_told(tmp_path):
    with open("/dev/full", "wb") as real, pytest.raises(OSError) as caught:  # noqa: PTH123
        real.write(b"x" * 100_000)
        real.flush()
    from krona_hub.checkpoints.os_errors import fault

    assert isinstance(fault(caught.value, "x"), ResourceError)


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_place_that_is_not_writable_is_a_coded_error_with_a_fix(tmp_path, monkeypatch, number):
    def refuse(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(atomic.os, "open", refuse)
    for attempt in (lambda: atomic_text(tmp_path / "x", "text"), lambda: write_tensors(tmp_path / "x", {})):
        with pytest.raises(ResourceError) as caught:
            attempt()
        assert caught.value.fix and caught.value.exit_code == 8 and not list(tmp_path.iterdir())


def test_what_is_in_the_way_is_told_before_any_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nowhere")
    cases = {
        "file": ConflictError, "folder": ConflictError, "pipe": ConflictError, "dangling": ConflictError,
        "file/x": ConflictError, "none/x": NotFoundError, "a\0b": NotFoundError, "x" * 300: NotFoundError,
    }  # fmt: skip
    before = sorted(tmp_path.rglob("*"))
    for name, error in cases.items():
        with pytest.raises(error) as caught:
            write_tensors(tmp_path / name, {"t": torch.ones(1)})
        assert caught.value.fix, name
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "mine"


def test_overwrite_replaces_a_link_and_not_what_it_points_to(tmp_path):
    (tmp_path / "blob").write_text("shared cache")
    (tmp_path / "x").symlink_to(tmp_path / "blob")
    atomic_text(tmp_path / "x", "new", overwrite=True)
    assert (tmp_path / "blob").read_text() == "shared cache" and (tmp_path / "x").read_text() == "new"


def test_a_new_file_has_the_rights_of_any_new_file(tmp_path):
    atomic_text(tmp_path / "ours", "x")
    (tmp_path / "plain").write_text("x")
    assert stat.S_IMODE((tmp_path / "ours").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_a_file_that_appears_while_we_write_is_not_overwritten(tmp_path):
    with pytest.raises(ConflictError), atomic_file(tmp_path / "x") as file:
        file.write(b"ours")
        (tmp_path / "x").write_text("theirs")
    assert (tmp_path / "x").read_text() == "theirs" and len(list(tmp_path.iterdir())) == 1


def test_the_file_being_read_may_be_the_file_being_written(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"t": torch.arange(1000.0)})
    write_tensors(path, load_tensors(read_header(path)), overwrite=True)
    assert torch.equal(load(path.read_bytes())["t"], torch.arange(1000.0))


def test_a_folder_appears_with_all_its_files_or_not_at_all(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "peft") as folder:
        atomic_text(folder / "adapter_config.json", "{}")
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    with atomic_folder(tmp_path / "peft") as folder:
        (folder / "unet").mkdir()
        atomic_text(folder / "unet" / "adapter_config.json", "{}")
        assert not (tmp_path / "peft").exists()
    assert (tmp_path / "peft/unet/adapter_config.json").read_text() == "{}"


def test_a_folder_that_exists_is_refused_unless_empty_and_never_swept_away(tmp_path):
    (tmp_path / "home").mkdir()
    with atomic_folder(tmp_path / "home") as folder:
        atomic_text(folder / "a", "1")
    (tmp_path / "home/letter").write_text("mine")
    with pytest.raises(ConflictError), atomic_folder(tmp_path / "home"):
        pass
    with atomic_folder(tmp_path / "home", overwrite=True) as folder:
        atomic_text(folder / "a", "2")
    assert {p.name: p.read_text() for p in (tmp_path / "home").iterdir()} == {"a": "2", "letter": "mine"}
    with pytest.raises(ConflictError), atomic_folder(tmp_path / "home/letter", overwrite=True):
        pass


def test_a_limit_of_the_system_on_the_size_of_files_is_told_and_leaves_nothing(tmp_path):
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "from krona_hub.checkpoints.writer import EncodedTensor, write_stored;"
        "from krona_hub.errors import KronaError\n"
        "try: write_stored(sys.argv[1], {'t': EncodedTensor('U8', (99999,), lambda: [bytes(99999)])})\n"
        "except KronaError as error: print(error.code, error.exit_code)"
    )
    run = [sys.executable, "-c", code, tmp_path / "x"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout == "KH200 8\n"
    assert not list(tmp_path.iterdir())
