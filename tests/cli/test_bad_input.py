"""Files that are not adapters, or invalid ones: one line of cause with a code, one line of fix, nothing changed."""

import json
import math
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile

import pytest
import torch
from safetensors.torch import save

from krona_hub import errors
from krona_hub.cli.main import main

STATUSES = {e.code: e.exit_code for e in vars(errors).values() if isinstance(e, type) and hasattr(e, "exit_code")}
TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


def lora(**changed):
    """A valid LoRA of one module, with some tensors changed or (None) omitted."""
    tensors = {
        "lora_up.weight": torch.ones(320, 4),
        "lora_down.weight": torch.ones(4, 320),
        "alpha": torch.tensor(2.0),
    } | {name.replace("__", "."): tensor for name, tensor in changed.items()}
    return save({f"{TO_Q}.{name}": t for name, t in tensors.items() if t is not None})


def with_header(header: str | dict, data: bytes = b"\0" * 16) -> bytes:
    text = header if isinstance(header, str) else json.dumps(header)
    return struct.pack("<Q", len(text)) + text.encode() + data


def entry(start: int, end: int, shape=(2,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def zipped_pickle(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({}))
    return path.read_bytes()


BAD = {  # name -> (bytes, accepted codes)
    "an empty file": (b"", {"KH124"}),
    "a pickle": (pickle.dumps({"x": 1}), {"KH121"}),
    "a web page": (b"<!DOCTYPE html><html><body>404</body></html>", {"KH122"}),
    "a git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", {"KH123"}),
    "a cut header": (lora()[:60], {"KH124"}),
    "cut data": (lora()[:-100], {"KH124"}),
    "trailing bytes": (lora() + b"x", {"KH125"}),
    "a giant header": (struct.pack("<Q", 2**62) + b"{}", {"KH125", "KH124"}),
    "overlapping tensors": (with_header({"a": entry(0, 8), "b": entry(4, 12)}, b"\0" * 12), {"KH125"}),
    "offsets that overflow": (with_header({"a": entry(0, 2**63)}), {"KH125", "KH124"}),
    "a shape that overflows": (with_header({"a": entry(0, 8, (2**40, 2**40))}), {"KH125", "KH124"}),
    "duplicate keys": (with_header('{"a":%s,"a":%s}' % ((json.dumps(entry(0, 8)),) * 2), b"\0" * 8), {"KH125"}),
    "a header that is no JSON": (with_header("{nonsense"), {"KH125"}),
    "an unknown type": (with_header({"a": entry(0, 8, dtype="F12")}, b"\0" * 8), {"KH125", "KH150"}),
    "no adapter at all": (save({"model.weight": torch.ones(2, 2)}), {"KH126"}),
}
BAD_ADAPTERS = {
    "a missing half": (lora(lora_up__weight=None), {"KH129"}),
    "halves of different rank": (lora(lora_up__weight=torch.ones(320, 3)), {"KH110", "KH120", "KH129", "KH152"}),
    "an infinite alpha": (lora(alpha=torch.tensor(math.inf)), {"KH151", "KH152"}),
    "an alpha of 1e10": (lora(alpha=torch.tensor(1e10)), {"KH152"}),
    "a NaN": (lora(lora_up__weight=torch.full((320, 4), math.nan)), {"KH151"}),
    "integers": (lora(lora_up__weight=torch.ones(320, 4, dtype=torch.int32)), {"KH150"}),
    "an unknown key": (lora(lora_sideways=torch.ones(2)), {"KH129"}),
    "a module of no base": (
        save({"lora_unet_x.lora_up.weight": torch.ones(7, 1), "lora_unet_x.lora_down.weight": torch.ones(1, 5)}),
        {"KH126", "KH129", "KH160"},
    ),
    "an OFT": (save({f"{TO_Q}.oft_blocks": torch.ones(4, 80, 80)}), {"KH128"}),
    "a LoHa of two ranks": (
        save({f"{TO_Q}.hada_w{i}_{side}": torch.ones(320, 4) for i in (1, 2) for side in "ab"}),
        {"KH110"},
    ),
}


def expect_refusal(arguments, codes, folder, capsys):
    """The command fails with one of the codes, in two lines, and leaves the folder as it was."""
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    status = main(arguments)
    out, err = capsys.readouterr()
    assert re.match(r"error KH\d{3}: \S.*\nfix: \S.*\n\Z", err), err
    assert err[6:11] in codes and status == STATUSES[err[6:11]], err
    assert out == "" and "Traceback" not in err
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_file_that_is_something_else_is_refused_by_name(kind, command, tmp_path, capsys):
    content, codes = BAD[kind]
    (tmp_path / "bad.safetensors").write_bytes(content)
    expect_refusal([command, str(tmp_path / "bad.safetensors")], codes, tmp_path, capsys)


@pytest.mark.parametrize("command", ["inspect", "convert"])
def test_a_zipped_pickle_is_refused_by_name(command, tmp_path, capsys):
    zipped_pickle(tmp_path / "bad.safetensors")
    expect_refusal([command, str(tmp_path / "bad.safetensors")], {"KH121"}, tmp_path, capsys)


@pytest.mark.parametrize("kind", BAD_ADAPTERS)
def test_a_broken_adapter_is_not_converted(kind, tmp_path, capsys):
    content, codes = BAD_ADAPTERS[kind]
    (tmp_path / "bad.safetensors").write_bytes(content)
    expect_refusal(["convert", str(tmp_path / "bad.safetensors"), "--base", "sd15"], codes, tmp_path, capsys)


@pytest.mark.parametrize("kind", [*BAD, "a NaN", "integers"])
def test_validate_finds_a_bad_file_bad(kind, tmp_path, capsys):
    content, _ = {**BAD, **BAD_ADAPTERS}[kind]
    (tmp_path / "bad.safetensors").write_bytes(content)
    if kind == "no adapter at all":
        pytest.skip("its structure is sound, which is all that validate promises of a file that is not krona's")
    assert main(["validate", str(tmp_path / "bad.safetensors")]) == 2
    out, err = capsys.readouterr()
    assert re.search(r"KH\d{3}", out + err) and "Traceback" not in err


def test_a_missing_file_is_not_found(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "lorra.safetensors")]) == 7
    assert capsys.readouterr().err.startswith("error KH190")


def test_an_output_that_exists_is_a_conflict(adapters, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"mine")
    assert main(["convert", str(adapters / "lora.safetensors"), "--exact", "-o", str(out)]) == 5
    assert "--overwrite" in capsys.readouterr().err and out.read_bytes() == b"mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_unwritable_folder_is_told(adapters, tmp_path, capsys):
    tmp_path.chmod(0o500)
    assert (
        main(["convert", str(adapters / "lora.safetensors"), "--exact", "-o", str(tmp_path / "out.safetensors")]) == 8
    )
    tmp_path.chmod(0o700)
    assert capsys.readouterr().err.startswith("error KH200")


@pytest.mark.parametrize(
    "options",
    ["--shape 4x4 --exact", "--max-error 0.1 --budget 50%", "--shape 4by4", "--to nonsense", "--for nonsense",
     "--to krona --for comfyui", "--to nonsense --for comfyui", "--to peft-lora --for a1111", "--max-error -1",
     "--budget 0", "--rank 0 --to lora", "--terms 0 --shape 4x4"],
)  # fmt: skip
def test_options_that_mean_nothing_are_wrong_usage(options, adapters, tmp_path, capsys):
    arguments = ["convert", str(adapters / "lora.safetensors"), "-o", str(tmp_path / "out"), *options.split()]
    assert main(arguments) == 2
    assert re.match(r"error KH1\d\d: .+\nfix: .+\n\Z", capsys.readouterr().err)
    assert not list(tmp_path.iterdir())


def test_a_result_that_lost_too_much_is_refused(adapters, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert main(["convert", str(adapters / "lora.safetensors"), "--shape", "64x4", "-o", str(out)]) == 3
    error = capsys.readouterr().err
    assert error.startswith("error KH140") and "--allow-loss" in error and not out.exists()


AT_THE_SYNC = """
import os, signal
from pathlib import Path
from krona_hub.checkpoints import atomic
def interrupted(*_):
    assert list(Path.cwd().iterdir()), "the temporary file is there"
    os.kill(os.getpid(), signal.SIGINT)
os.fsync = interrupted
"""
AT_THE_IMPORTS = """
import os, signal, sys
class Interrupting:
    def find_spec(self, name, *_):
        if name == "rich_click":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
"""


@pytest.mark.parametrize("moment", [AT_THE_SYNC, AT_THE_IMPORTS], ids=["while writing", "while importing"])
def test_control_c_stops_without_a_half_written_file(moment, adapters, tmp_path):
    script = (
        "import signal, sys\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it\n"
        f"{moment}\n"
        f"sys.argv[1:] = ['convert', {str(adapters / 'lora.safetensors')!r}, '-o', 'out.safetensors']\n"
        "from krona_hub.cli import start\n"
        "start()"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 130 and "Stopped." in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
