"""`krona validate` and `krona migrate` from the outside: what is printed, and the exit status."""

import json
import subprocess
import sys

import pytest
import torch

from krona_hub.adapters.adapter import Adapter, BaseModel, LayerDelta
from krona_hub.checkpoints.header import read_header
from krona_hub.checkpoints.writer import write_tensors
from krona_hub.cli.main import main
from krona_hub.kron.terms import KronTerms
from krona_hub.schema.native_tensors import to_tensors
from tests.attacks.forge import put

LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def native(path, layer=LAYER, size=(1280, 1280), value=1.0, version="1.0"):
    delta = LayerDelta((KronTerms(torch.full((1, 4, 2), value), torch.ones(1, size[0] // 4, size[1] // 2)),), size)
    tensors, metadata = to_tensors(Adapter({layer: delta}, BaseModel("sd15")))
    write_tensors(path, tensors, metadata | {"krona.schema": version})
    return path


def test_a_sound_file_that_fits_its_base_is_sound(tmp_path, capsys):
    path = native(tmp_path / "x.safetensors")
    assert main(["validate", str(path), "--base", "sd15"]) == 0
    assert capsys.readouterr().out == f"{path}: valid\n"


def test_each_problem_is_a_line_with_its_fix_and_the_status_is_2(tmp_path, capsys):
    path = native(tmp_path / "x.safetensors")
    broken = path.read_bytes().replace(b"kron_a.0", b"kron_x.0")
    assert main(["validate", str(put(tmp_path, broken, "broken.safetensors"))]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"error KH129: '{LAYER}.kron_x.0': this tensor is not part of schema 1.0")
    assert lines[1].startswith("  fix: ") and lines[2].startswith(f"error KH129: '{LAYER}': sum 0 needs kron_a.0")
    assert lines[-1].endswith("broken.safetensors: 2 errors")


IMPOSTORS = {"KH121": b"\x80\x02}q\x00.", "KH122": b"<html>", "KH123": b"version https://git-lfs", "KH124": b""}


@pytest.mark.parametrize("code", IMPOSTORS)
def test_what_is_no_safetensors_file_is_said(tmp_path, capsys, code):
    assert main(["validate", str(put(tmp_path, IMPOSTORS[code])), "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["valid"] is False and [f["code"] for f in document["findings"]] == [code]
    assert document["findings"][0].keys() == {"code", "where", "cause", "fix", "severity"}


def test_a_file_that_does_not_fit_its_base_is_status_5(tmp_path, capsys):
    strangers = {
        "layer": native(tmp_path / "a.safetensors", layer="unet.mid_block.nothing"),
        "shape": native(tmp_path / "b.safetensors", size=(640, 640)),
        "component": native(tmp_path / "c.safetensors", layer="transformer.x"),
    }
    for what, path in strangers.items():
        assert main(["validate", str(path), "--base", "sd15"]) == 5, what
        assert "error KH160" in capsys.readouterr().out
        assert main(["validate", str(path)]) == 0, what
        capsys.readouterr()


def test_a_missing_file_is_status_7_and_an_unknown_base_names_the_nearest(tmp_path, capsys):
    assert main(["validate", str(tmp_path / "none.safetensors")]) == 7
    assert "error KH190" in capsys.readouterr().err
    assert main(["validate", str(native(tmp_path / "x.safetensors")), "--base", "sdlx"]) == 2
    assert "KH161" in capsys.readouterr().err


def test_infinite_numbers_are_counted_by_tensor(tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a.lora_up.weight": torch.tensor([1.0, float("inf"), float("nan")]), "b": torch.ones(3)})
    assert main(["validate", str(path)]) == 2
    assert "2 of its 3 values are NaN or infinite" in capsys.readouterr().out


def test_a_file_of_100_mb_is_validated_without_torch(tmp_path):
    delta = LayerDelta((KronTerms(torch.ones(1, 1, 1), torch.ones(1, 1000, 1250)),), (1000, 1250))
    write_tensors(tmp_path / "big.safetensors", *to_tensors(Adapter({f"unet.x.{i}": delta for i in range(20)})))
    code = (
        "import sys; from krona_hub.cli.main import main; status = main(sys.argv[1:]);"
        "print(status, *({'torch', 'diffusers', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "validate", str(tmp_path / "big.safetensors")], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "0"


def test_migrate_writes_beside_and_refuses_what_it_must(tmp_path, capsys):
    path = native(tmp_path / "x.safetensors")
    assert main(["migrate", str(path), "--to", "1.0"]) == 0
    target = tmp_path / "x.schema-1.0.safetensors"
    assert capsys.readouterr().out == f"{target}: schema 1.0 -> 1.0\n" and target.read_bytes() == path.read_bytes()
    cases = {
        ("--to", "1.0"): (5, "KH170"),
        ("--to", "3.0"): (2, "KH131"),
        ("--to", "0.5"): (2, "KH130"),
        ("--to", "../../x"): (2, "KH101"),
        (): (2, "KH101"),
        ("--to", "1.0", "-o", str(tmp_path / "no/x")): (7, "KH190"),
    }
    for options, (status, code) in cases.items():
        assert main(["migrate", str(path), *options]) == status, options
        assert f"error {code}: " in capsys.readouterr().err
    assert main(["migrate", str(path), "--to", "1.0", "--overwrite", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "path": str(target),
        "from": "1.0",
        "to": "1.0",
        "written": True,
    }


def test_a_dry_run_of_migrate_checks_everything_and_writes_nothing(tmp_path, capsys):
    path = native(tmp_path / "x.safetensors")
    assert main(["migrate", str(path), "--to", "1.0", "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "schema 1.0 -> 1.0" in shown.out and "nothing was written" in shown.err
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    (tmp_path / "x.schema-1.0.safetensors").touch()
    assert main(["migrate", str(path), "--to", "1.0", "--dry-run"]) == 5
    assert main(["migrate", str(path), "--to", "3.0", "--dry-run"]) == 2


def test_migrate_says_what_a_file_of_another_format_is(tmp_path, capsys):
    write_tensors(tmp_path / "lora.safetensors", {"a.lora_up.weight": torch.ones(3, 2)})
    assert main(["migrate", str(tmp_path / "lora.safetensors"), "--to", "1.0"]) == 2
    assert "KH126" in capsys.readouterr().err and read_header(tmp_path / "lora.safetensors")
