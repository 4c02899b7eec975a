"""Whole conversions of reference files: what is chosen, what is refused, what is written."""

import hashlib

import pytest

from krona_hub.conversion import convert
from krona_hub.conversion.output_options import default_out
from krona_hub.errors import InexpressibleError, KronaError, LossyError, UnknownBaseError, UsageError
from krona_hub.formats.compatibility.verdicts import loads_in
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.reader import read
from tests.shared import shared


def golden(name):
    return {"source": shared("golden", f"{name}.safetensors"), "base": shared("golden", "base")}


def test_a_kronecker_file_in_its_own_format_is_only_rewritten(tmp_path):
    report = convert(**golden("diffusekrona_a1_8_a2_4"), out=tmp_path / "x.safetensors", to="diffusekrona")
    assert report.relative_error == 0.0
    assert {row.after for row in report.layers} == {row.before for row in report.layers}


def test_a_tool_gets_a_lora_where_every_layer_stayed_one(tmp_path):
    out = tmp_path / "x.safetensors"
    report = convert(**golden("kohya_lora_dim4_a1_conv2_a1"), out=out, tool="comfyui", max_error=0.0)
    assert report.target_format == "kohya-lora"
    assert describe(out, base=golden("kohya_lora_dim4_a1_conv2_a1")["base"]).format == "kohya-lora"


def test_a_tool_gets_a_lokr_of_one_term_where_a_way_is_given(tmp_path):
    source = golden("lyc_decompose_both_f8_dim3_a2")
    report = convert(**source, out=tmp_path / "x.safetensors", tool="comfyui", max_error=0.1)
    assert report.target_format == "lycoris-lokr"
    assert all(row.relative_error <= 0.1 + 1e-6 for row in report.layers)


def test_a_tool_that_loads_lora_only_says_how_to_get_one(tmp_path):
    source, out = golden("lyc_f4_dim2_a1"), tmp_path / "x.safetensors"
    for options in ({}, {"to": "lokr"}):
        with pytest.raises(
            InexpressibleError, match=r"loads only LoRA.*--for kohya --to lora.*5%.*--exact or --rank R"
        ):
            convert(**source, out=out, tool="kohya", **options)
    assert not out.exists()
    report = convert(**source, out=out, tool="kohya", to="lora")
    assert report.target_format == "kohya-lora"
    assert 0 < max(row.relative_error for row in report.layers) <= 0.05
    report = convert(**source, out=out, tool="kohya", exact=True, overwrite=True)
    assert report.target_format == "kohya-lora"
    assert report.relative_error < 1e-6


@pytest.mark.parametrize(
    ("name", "to", "format"),
    [
        ("lyc_f4_dim2_a1", "lokr", "lycoris-lokr"),
        ("lyc_f4_dim2_a1", "lycoris-lokr", "lycoris-lokr"),
        ("lyc_f4_dim2_a1", "lora", "kohya-lora"),
        ("lyc_f4_dim2_a1", "kohya-lora", "kohya-lora"),
        ("kohya_lora_dim4_a1_conv2_a1", "lora", "kohya-lora"),
        ("kohya_lora_dim4_a1_conv2_a1", "lokr", "lycoris-lokr"),
    ],
)
def test_the_kind_for_a_tool_can_be_chosen(name, to, format, tmp_path):
    report = convert(**golden(name), out=tmp_path / "x.safetensors", tool="comfyui", to=to, exact=True)
    assert report.target_format == format and report.relative_error < 1e-6
    about = describe(report.out, base=golden(name)["base"])
    assert about.format == format and loads_in(about)["comfyui"].ok


@pytest.mark.parametrize("to", ["krona", "diffusers-lora", "peft-lokr"])
def test_a_format_that_the_tool_is_not_written_in_is_a_contradiction(to, tmp_path):
    with pytest.raises(UsageError, match=rf"ComfyUI loads kohya-lora.*lycoris-locon.*lycoris-lokr, not {to}\."):
        convert(**golden("lyc_f4_dim2_a1"), out=tmp_path / "x.safetensors", tool="comfyui", to=to)
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize(("tool", "name"), [("comfyui", "comfyui"), ("SwarmUI", "comfyui"), ("a1111", "a1111")])
def test_a_file_for_a_tool_carries_its_name(tool, name, tmp_path):
    source = tmp_path / "x.safetensors"
    source.write_bytes(golden("lyc_f4_dim2_a1")["source"].read_bytes())
    report = convert(source, base=golden("lyc_f4_dim2_a1")["base"], tool=tool)
    assert report.out == tmp_path / f"x.{name}.safetensors" and report.out.exists()


def test_a_dora_needs_its_base_weights_only_where_the_target_has_no_magnitude(tmp_path):
    source = shared("golden", "lyc_dora_in_dim3_a1.safetensors")
    base = shared("golden", "base")
    kept = convert(source, tmp_path / "a.safetensors", base=base)
    assert all(row.after.endswith("DoRA") for row in kept.layers)
    merged = convert(source, tmp_path / "b.safetensors", base=base, to="lora", max_error=0.01)
    assert merged.relative_error <= 0.01
    assert "10 DoRA layers were merged with the base weights" in merged.notes[0]
    with pytest.raises((UnknownBaseError, KronaError)) as refusal:
        convert(source, tmp_path / "c.safetensors", to="lora")
    assert "--base" in str(refusal.value)


def test_the_result_of_a_dora_merge_is_the_delta_of_the_reference(tmp_path):
    import torch
    from safetensors.torch import load_file

    name = "lyc_dora_out_dim2_a1"
    out = tmp_path / "x.safetensors"
    convert(**golden(name), out=out, to="lora", exact=True)
    made = read(out, base=shared("golden", "base"))
    for layer, delta in load_file(shared("golden", f"{name}.delta.safetensors")).items():
        torch.testing.assert_close(made[layer].dense(), delta, rtol=0, atol=3e-5 * float(delta.abs().max()))


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_the_error_of_half_precision_is_measured_not_guessed(dtype, tmp_path):
    source, out = golden("kohya_lora_dim4_a1_conv2_a1"), tmp_path / "x.safetensors"
    report = convert(**source, out=out, exact=True, dtype=dtype)
    old, new = read(source["source"], base=source["base"]), read(out, base=source["base"])
    for row in report.layers:
        was, now = old[row.layer].dense().double(), new[row.layer].dense().double()
        assert row.relative_error == pytest.approx(float((now - was).norm() / was.norm()), rel=1e-4)
        assert row.bytes_after == row.bytes_before // 2


def test_too_lossy_a_result_is_refused_and_nothing_is_written(tmp_path):
    out = tmp_path / "x.safetensors"
    with pytest.raises(LossyError, match=r"nothing was written.*--allow-loss") as refusal:
        convert(**golden("kohya_lora_dim4_a1_conv2_a1"), out=out, shape="2x2")
    assert refusal.value.exit_code == 3
    assert not out.exists()
    assert convert(**golden("kohya_lora_dim4_a1_conv2_a1"), out=out, shape="2x2", allow_loss=True).written


def test_a_dry_run_measures_and_writes_nothing(tmp_path):
    report = convert(**golden("kohya_lora_dim4_a1_conv2_a1"), out=tmp_path / "x.safetensors", dry_run=True)
    assert report.layers
    assert not report.written
    assert not list(tmp_path.iterdir())


def test_the_same_conversion_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        convert(**golden("kohya_lora_dim4_a1_conv2_a1"), out=tmp_path / name, max_error=0.3)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_the_report_says_what_a_native_file_is_and_not_what_it_once_was(tmp_path):
    native = convert(**golden("lyc_f4_dim2_a1"), out=tmp_path / "native.safetensors")
    assert (native.source_format, native.target_format) == ("lycoris-lokr", "krona")
    back = convert(native.out, tmp_path / "back.safetensors", to="lokr", base=shared("golden", "base"))
    assert (back.source_format, back.target_format) == ("krona", "lycoris-lokr")


def test_what_is_written_names_what_it_was_made_of(tmp_path):
    source = golden("lyc_decompose_both_f8_dim3_a2")
    convert(**source, out=tmp_path / "a.safetensors", shape="2x2", shape_fallback="nearest", allow_loss=True)
    made = read(tmp_path / "a.safetensors").provenance
    assert made.source_sha256 == hashlib.sha256(source["source"].read_bytes()).hexdigest()
    assert made.method == "convert --shape 2x2 --shape-fallback nearest" and made.created_by.startswith("krona_hub ")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", exact=True)
    assert read(tmp_path / "b.safetensors").provenance.source_sha256 == made.source_sha256, "it began with that file"


def test_the_folder_that_one_is_in_has_its_name(tmp_path, monkeypatch):
    (tmp_path / "peft" / "unet").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "peft" / "unet")
    assert default_out(".", "krona") == tmp_path / "peft" / "unet.krona.safetensors"
    assert default_out("..", "peft-lora") == tmp_path / "peft.peft-lora"
