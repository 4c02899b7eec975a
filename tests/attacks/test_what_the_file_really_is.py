"""Files that are not safetensors are identified by their first bytes, and nothing is ever loaded."""

import io
import os
import pickle
import tarfile
import zipfile

import pytest
import torch

from krona_hub.checkpoints.header import read_header, structural_findings
from krona_hub.errors import (
    FormatError,
    LfsPointerError,
    NotFoundError,
    PickleError,
    ResourceError,
    StructureError,
    TruncatedError,
    WebPageError,
)
from tests.attacks.forge import F32, forged, put


def torch_saved(**options) -> bytes:
    buffer = io.BytesIO()
    torch.save({"lora_unet.weight": torch.ones(2)}, buffer, **options)
    return buffer.getvalue()


def tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        file.addfile(tarfile.TarInfo("a"))
    return buffer.getvalue()


def empty_zip() -> bytes:
    buffer = io.BytesIO()
    zipfile.ZipFile(buffer, "w").close()
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 1582501\n"
ATTACKS = {
    "a torch checkpoint": (PickleError, torch_saved()),
    "an old torch checkpoint": (PickleError, torch_saved(_use_new_zipfile_serialization=False)),
    **{f"a pickle of protocol {n}": (PickleError, pickle.dumps({"a": [1, 2.5]}, protocol=n)) for n in range(6)},
    "a zip archive without files": (PickleError, empty_zip()),
    "a web page": (WebPageError, b"<!DOCTYPE html><html><body>Sign in</body></html>"),
    "a web page after blank lines, a mark and a comment": (WebPageError, b"\xef\xbb\xbf\r\n <!-- x --><HTML lang=en>"),
    "an xml error": (WebPageError, b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
    "a server's json error": (WebPageError, b'{"error":"Invalid username or password."}'),
    "a server's plain error": (WebPageError, b"Entry not found"),
    "a git-lfs pointer": (LfsPointerError, LFS),
    "an empty file": (TruncatedError, b""),
    "one byte": (TruncatedError, b"\x10"),
    "nine bytes": (TruncatedError, b"\x08\0\0\0\0\0\0\0{"),
    "a download of zeros": (TruncatedError, b"\0" * 4096),
    "an adapter_config.json": (FormatError, b'{"peft_type": "LOKR", "r": 8}'),
    "a GGUF file": (FormatError, b"GGUF\x03\0\0\0" + b"\0" * 64),
    "a picture": (FormatError, b"\x89PNG\r\n\x1a\n" + b"\0" * 64),
    "a gzip archive": (FormatError, b"\x1f\x8b\x08" + b"\0" * 64),
    "a tar archive": (FormatError, tar()),
    "a numpy array": (FormatError, b"\x93NUMPY\x01\0v\0"),
    "noise": (FormatError, bytes(range(1, 255))),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_each_impostor_is_called_by_its_name(tmp_path, name):
    error, content = ATTACKS[name]
    path = put(tmp_path, content)
    with pytest.raises(FormatError) as caught:
        read_header(path)
    assert type(caught.value) is error, caught.value
    assert caught.value.cause.startswith(str(path)) and caught.value.fix
    assert path.read_bytes() == content
    assert [f.code for f in structural_findings(path)] == [error.code]


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x4B50, 0x2028])
def test_a_header_whose_size_looks_like_a_pickle_is_still_a_header(tmp_path, length):
    """80 02 00 … starts a protocol 2 pickle, and also a header of 640 bytes."""
    header = b'{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    good = put(tmp_path, forged(header.ljust(length), b"\0" * 8))
    assert list(read_header(good).tensors) == ["t"]
    short = put(tmp_path, forged(header.ljust(length), b"")[: length // 2], "short")
    with pytest.raises(TruncatedError, match="ends inside its header"):
        read_header(short)


def test_a_pickle_is_never_unpickled(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "exploded"),))

    for content in (pickle.dumps(Bomb()), torch_saved() + pickle.dumps(Bomb())):
        with pytest.raises(PickleError):
            read_header(put(tmp_path, content))
    assert not (tmp_path / "exploded").exists()


def test_what_is_no_file_is_told_without_waiting_for_it(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_bytes(forged({"t": F32}))
    cases = {
        ".": FormatError, "pipe": FormatError, "none": NotFoundError, "loop": NotFoundError,
        "file/below": NotFoundError, "a\0b": NotFoundError, "x" * 5000: NotFoundError,
    }  # fmt: skip
    for name, error in cases.items():
        with pytest.raises(error) as caught:
            read_header(tmp_path / name)
        assert caught.value.fix, name


@pytest.mark.parametrize("refusal", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")])
def test_a_file_that_may_not_be_read_is_a_coded_error(tmp_path, monkeypatch, refusal):
    path = put(tmp_path, forged({"t": F32}))

    def refuse(*args, **kwargs):
        raise refusal

    monkeypatch.setattr(type(path), "open", refuse)
    with pytest.raises(ResourceError) as caught:
        read_header(path)
    assert caught.value.exit_code == 8 and caught.value.fix


def test_only_the_header_is_read_however_large_the_file(tmp_path):
    path = put(tmp_path, forged({"t": {"dtype": "U8", "shape": [2**40], "data_offsets": [0, 2**40]}}, b""))
    os.truncate(path, path.stat().st_size + 2**40)  # a sparse file of one terabyte
    assert read_header(path).tensors["t"].numel == 2**40


def test_a_header_that_claims_petabytes_is_not_read(tmp_path):
    for length in (100_000_001, 2**62, 2**64 - 1):
        with pytest.raises(StructureError, match="100,000,000 is the limit"):
            read_header(put(tmp_path, forged({"t": F32}, length=length)))
