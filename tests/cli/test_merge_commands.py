"""merge, verify, unmerge, extract and combine as commands: exit statuses, output and files."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from krona_hub.cli.main import main


@pytest.fixture
def here(adapters, tmp_path, monkeypatch):
    """A folder of its own with the files of the examples, as the working directory."""
    shutil.copytree(adapters, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(path: Path) -> dict[str, str]:
    files = [p for p in sorted(path.rglob("*")) if p.is_file()] if path.is_dir() else [path]
    return {str(p.relative_to(path)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def run(line: str, capsys) -> tuple[int, str, str]:
    status = main(line.split())
    return status, *capsys.readouterr()


def test_merged_verified_and_unmerged_is_the_base_again(here, capsys):
    before = contents(here / "base")
    status, out, _ = run("merge base lora.safetensors:0.8 lokr.safetensors:-0.25 -o new --undo back.st", capsys)
    assert status == 0 and "24 of 24 modules matched" in out and "verdict" in out
    adapters = "--adapter lora.safetensors:0.8 --adapter lokr.safetensors:-0.25"
    assert run(f"verify new --base base {adapters}", capsys)[0] == 0
    assert run("verify new --base base --adapter lora.safetensors:0.8", capsys)[0] == 6
    assert run("unmerge new --undo back.st -o restored", capsys)[0] == 0
    assert contents(here / "restored") == before == contents(here / "base")


def test_in_place_and_back_is_the_base_again(here, capsys):
    before = contents(here / "base")
    assert run("merge base lora.safetensors --in-place --undo back.st", capsys)[0] == 0
    assert contents(here / "base") != before
    assert run("verify base --base merged --adapter lora.safetensors:0.2", capsys)[0] == 6, "0.8 + 0.2 rounds twice"
    assert run("unmerge base --undo back.st --in-place", capsys)[0] == 0
    assert contents(here / "base") == before


def test_a_dry_run_tells_and_writes_nothing(here, capsys):
    before = contents(here)
    status, out, err = run("merge base lora.safetensors:0.8 -o new --dry-run", capsys)
    assert status == 0 and "nothing was written" in err and contents(here) == before
    assert "24 of 24 modules matched" in out and re.search(r"\d MB of disk", out)


def test_verify_says_at_which_strength_an_adapter_was_merged(here, capsys):
    status, out, _ = run("verify merged --base base --adapter lora.safetensors:0.5", capsys)
    assert status == 6 and "merged at 0.8, not at 0.5" in out
    status, out, _ = run("verify base --base base --adapter lora.safetensors", capsys)
    assert status == 6 and "nothing was merged" in out


def test_a_weight_of_zero_and_a_base_block_leave_their_tensors_alone(here, capsys):
    assert run("merge base lora.safetensors --block-weights blocks.txt -o new", capsys)[0] == 0
    old, new = (load_file(here / name / "unet/diffusion_pytorch_model.safetensors") for name in ("base", "new"))
    for name, tensor in old.items():
        untouched = "norm" in name or (name.endswith("attn2.to_v.weight") and "down_blocks.0" not in name)
        assert bool((new[name] == tensor).all()) == untouched, name


def test_block_weights_are_read_as_lines_toml_and_json(here, capsys):
    (here / "w.toml").write_text('"down_blocks\\\\.0\\\\." = 0.5\n"attn2\\\\.to_v$" = 0\n')
    (here / "w.json").write_text(json.dumps({r"down_blocks\.0\.": 0.5, r"attn2\.to_v$": 0}))
    written = []
    for name in ("blocks.txt", "w.toml", "w.json"):
        assert run(f"merge base lora.safetensors --block-weights {name} -o {name}.out", capsys)[0] == 0
        tensors = load_file(here / f"{name}.out/unet/diffusion_pytorch_model.safetensors")
        written.append({k: t.float().sum().item() for k, t in tensors.items()})
    assert written[0] == written[1] == written[2]


@pytest.mark.slow
def test_what_is_extracted_from_a_merge_is_what_was_merged(here, capsys):
    status, out, _ = run("extract base merged -o found.safetensors --json", capsys)
    layers = json.loads(out)["layers"]
    assert status == 0 and len(layers) == 24 and {layer["form"] for layer in layers} == {"LoRA r8"}
    assert run("verify found.safetensors lora.safetensors --tolerance 0.3", capsys)[0] == 0, "at strength 0.8"
    assert run("verify found.safetensors lora.safetensors", capsys)[0] == 6


REFUSED = {  # command line -> code
    "merge base lora.safetensors": "KH101",  # no output
    "merge base -o new": "KH101",
    "merge base lora.safetensors:nan -o new": "KH101",
    "merge base lora.safetensors --in-place": "KH101",
    "merge base lora.safetensors -o new --in-place --undo u": "KH101",
    "merge base lora.safetensors -o new --out-dtype int8": "KH101",
    "merge base nothing.safetensors -o new": "KH190",
    "merge nothing lora.safetensors -o new": "KH190",
    "merge base lora.safetensors -o merged": "KH170",
    "merge base lora.safetensors -o base": "KH170",
    "merge base lora.safetensors -o base/new": "KH170",
    "merge base lora.safetensors -o new --undo undo.safetensors": "KH170",
    "merge base lora.safetensors -o no/where/new": "KH190",
    "merge base krona.safetensors -o new": "KH160",  # made for all of sd15
    "merge base lora.safetensors --component text_encoder -o new": "KH160",
    "merge base lora.safetensors --block-weights unused.txt -o new": "KH101",
    "merge base lora.safetensors --block-weights nonsense.txt -o new": "KH101",
    "merge quantised lora.safetensors -o new": "KH128",
    "unmerge quantised --undo undo.safetensors -o new": "KH180",
    "unmerge merged --undo lora.safetensors -o new": "KH120",
    "unmerge merged --undo undo.safetensors": "KH101",
    "unmerge merged --undo undo.safetensors -o base": "KH170",
    "extract base base -o new.safetensors": "KH",
    "extract base merged --terms 4 --max-error 0.1 -o new.safetensors": "KH101",
    "extract base merged --shape 7x7 -o new.safetensors": "KH110",
    "extract base merged -o lora.safetensors": "KH170",
    "extract base nothing -o new.safetensors": "KH190",
    "combine lora.safetensors -o lokr.safetensors": "KH170",
    "combine lora.safetensors lokr.safetensors --terms 2 --max-error 0.1": "KH101",
    "verify merged": "KH101",
    "verify merged --base base --adapter nothing.safetensors": "KH190",
}


@pytest.mark.parametrize("line", REFUSED)
def test_what_cannot_be_is_refused_with_a_code_and_a_fix_and_nothing_is_touched(line, here, capsys):
    (here / "unused.txt").write_text("up_blocks = 0.5\n")
    (here / "nonsense.txt").write_text("what is this\n")
    shutil.copytree(here / "base", here / "quantised")
    weights = here / "quantised/unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    weights.unlink()
    maps = {f"{name}.quant_map": torch.zeros(16) for name in tensors if name.endswith(".weight")}
    save_file(tensors | maps, weights)
    before = contents(here)
    status, out, err = run(line, capsys)
    assert re.match(rf"error {REFUSED[line]}\d*: \S.*\nfix: \S.*\n\Z", err), err
    assert status not in (0, 1) and out == "" and contents(here) == before
