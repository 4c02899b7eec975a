"""`krona inspect`: correct numbers, every application once, and only the header read."""

import hashlib
import json
import shutil
import struct

import pytest

from krona_hub.cli.main import main
from krona_hub.formats.compatibility.applications import APPLICATIONS
from krona_hub.formats.reading.describe import describe
from krona_hub.rendering.tables import module_groups
from scripts.make_demo_adapter import ALPHA, ASSETS, RANK, projections

TO_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture
def lora(tmp_path):
    return shutil.copyfile(ASSETS / "demo_lora.safetensors", tmp_path / "lora.safetensors")


def inspected(capsys, *arguments):
    assert main(["inspect", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_numbers_are_those_of_the_file(lora, capsys):
    about = inspected(capsys, lora)
    sizes = [(out, in_) for _, out, in_ in projections()]
    assert about["format"] == "kohya-lora" and about["base"] == "sd15"
    assert about["parameters"] == sum(RANK * (out + in_) for out, in_ in sizes)
    assert {m["rank"] for m in about["modules"]} == {RANK} and {m["scale"] for m in about["modules"]} == {ALPHA / RANK}
    assert sorted(tuple(m["weight_shape"]) for m in about["modules"]) == sorted(sizes)


def test_the_text_names_every_tool_once(lora, capsys):
    assert main(["inspect", str(lora)]) == 0
    shown = capsys.readouterr().out.partition("loads in")[2]
    for tool in APPLICATIONS:
        assert shown.replace(",", " ").replace(":", " ").split().count(tool) == 1, tool


def test_the_groups_hold_every_module_once(lora):
    modules = describe(lora).modules
    for most in (2, 12):
        groups = module_groups(modules, most)
        assert len(groups) <= most and sum(g.modules for g in groups) == len(modules)
        assert sum(g.parameters for g in groups) == sum(m.parameters for m in modules)


def test_layers_names_every_layer_whole(lora, capsys):
    assert main(["inspect", str(lora), "--layers"]) == 0
    shown = capsys.readouterr().out
    assert all(layer in shown for m in describe(lora).modules for layer in m.layers)


def test_sha256_is_that_of_the_bytes_and_only_on_request(lora, capsys):
    assert inspected(capsys, lora)["sha256"] is None
    assert inspected(capsys, lora, "--sha256")["sha256"] == hashlib.sha256(lora.read_bytes()).hexdigest()


def test_only_the_header_of_a_huge_file_is_read(tmp_path, capsys):
    rank = 2_000_000
    sizes = {"lora_down.weight": (rank, 320), "lora_up.weight": (320, rank)}
    fields, end = {}, 0
    for name, shape in sizes.items():
        fields[f"{TO_Q}.{name}"] = {"dtype": "F16", "shape": shape, "data_offsets": [end, end + 640 * rank]}
        end += 640 * rank
    header = json.dumps(fields).encode()
    path = tmp_path / "huge.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + end)  # 2.6 GB of hole
    about = inspected(capsys, path, "--base", "sd15")
    assert about["parameters"] == 2 * 320 * rank and about["bytes"] > 2_500_000_000


def test_a_lora_counts_the_same_in_inspect_and_in_the_report_of_its_conversion(lora, tmp_path, capsys):
    native = tmp_path / "native.safetensors"
    assert main(["convert", str(lora), "--exact", "-o", str(native), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    about = inspected(capsys, native)
    assert about["parameters"] == report["parameters_after"], "the constant [[1]] of a LoRA is no parameter"
