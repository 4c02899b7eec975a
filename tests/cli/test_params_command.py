"""`krona params`: the published figures as text and as JSON, and every mistake with its fix."""

import json

import pytest

from krona_hub.accounting.counting import account
from krona_hub.cli.main import main
from krona_hub.formats.reading.describe import describe
from krona_hub.rendering.humanize import plain


def output_of(capsys, *arguments) -> str:
    assert main(["params", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_the_table_has_the_figures_of_the_paper(capsys):
    out = output_of(capsys, "--base", "sdxl", "--shape", "64x4,64x8,64x16", "--rank", "4")
    numbers = {
        line.rpartition("  ")[0].split("  ")[0].strip(): line.split() for line in out.splitlines() if "560" in line
    }
    assert numbers["KronA 64x4"][2] == "3,874,560"
    assert numbers["KronA 64x8"][2] == "2,152,320"
    assert numbers["KronA 64x16"][2] == "1,506,240"
    assert numbers["LoRA rank 4"][3] == "5,806,080"
    assert "stored copy of the published config.json" in out


def test_json_is_the_accounting_itself(capsys):
    found = json.loads(output_of(capsys, "--base", "sd15", "--component", "all", "--shape", "64x4", "--json"))
    assert found == json.loads(json.dumps(plain(account("sd15", component="all", shapes=["64x4"]))))
    assert {row["method"]: row["parameters"] for row in found["rows"]}["KronA 64x4"] == 520_928


def test_components_can_be_named_one_by_one(capsys):
    both = output_of(capsys, "--base", "sd15", "--component", "unet", "--component", "text_encoder", "--json")
    assert json.loads(both) == json.loads(output_of(capsys, "--base", "sd15", "--component", "all", "--json"))


def test_layers_that_a_shape_does_not_divide_are_named(capsys):
    out = output_of(capsys, "--base", "sdxl", "--targets", "conv_in|conv_out|mid_block.*to_k", "--shape", "64x8")
    assert "KronA 64x8 does not divide unet.conv_in, unet.conv_out; not counted." in out


def test_the_sets_of_a_base_are_listed(capsys):
    assert "kqvo, attn, attn+ff, blocks, fused, all" in output_of(capsys, "--base", "flux1-dev")


def test_a_file_is_counted_beside_other_forms_of_its_layers(adapters, capsys):
    for name in ("lora.safetensors", "lokr.safetensors", "krona.safetensors"):
        found = json.loads(output_of(capsys, adapters / name, "--json", "--rank", "4"))
        about = describe(adapters / name)
        assert found["rows"][0]["parameters"] == about.parameters
        assert found["rows"][0]["modules"] == sum(part["modules"] for part in found["parts"]) == len(about.modules)
        assert found["base"] == about.base


@pytest.mark.parametrize(
    ("arguments", "status", "cause"),
    [
        ([], 2, "Missing argument FILE or option --base"),
        (["--base", "sdlx"], 2, "Unknown base model 'sdlx'"),
        (["--base", "sdxl", "--rank", "four"], 2, "Invalid value 'four' for --rank"),
        (["--base", "sdxl", "--shape", "64"], 2, "Invalid shape '64'"),
        (["--base", "sdxl", "--targets", "("], 2, "Invalid regular expression"),
        (["--base", "sdxl", "--component", "transformer"], 2, "Unknown component transformer of sdxl"),
        (["x.safetensors", "--targets", "attn"], 2, "a file has its own layers"),
        (["gone.safetensors"], 7, "gone.safetensors"),
    ],
)
def test_mistakes_are_told_with_their_fix(arguments, status, cause, capsys):
    assert main(["params", *arguments]) == status
    error = capsys.readouterr().err
    assert cause in error
    assert "fix:" in error
