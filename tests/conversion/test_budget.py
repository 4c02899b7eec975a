"""Conversions to a size: which layers are left out, what the report and the file state of it, and what is refused."""

from dataclasses import replace
from importlib.resources import files

import pytest
import torch

from krona_hub.adapters.adapter import Adapter, BaseModel, LayerDelta
from krona_hub.conversion import convert
from krona_hub.conversion.convert_layers import apply_method, lora_error_within
from krona_hub.conversion.methods import Budget
from krona_hub.conversion.target import ConversionTarget
from krona_hub.errors import LossyError, UsageError
from krona_hub.formats.forms.normal_forms import size_of
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.writer import write
from krona_hub.kron.terms import as_lora
from tests.conversion.true_error import agrees, true_errors
from tests.shared import shared

ZORBI = files("krona_hub.assets") / "zorbi_lora_kohya.safetensors"
LORA = "kohya_lora_dim4_a1_conv2_a1"
TARGETS = [
    *({"to": to} for to in ("krona", "lora", "lokr", "peft-lora", "peft-lokr", "diffusers-lora", "lycoris-locon")),
    *({"tool": tool, "to": "lora"} for tool in ("comfyui", "invokeai", "kohya")),
    *({"tool": tool, "to": "lokr"} for tool in ("comfyui", "a1111")),
    {"tool": "comfyui"},
]


def golden(name=LORA):
    return {"source": shared("golden", f"{name}.safetensors"), "base": shared("golden", "base")}


def lora(seed=0, loudness=1.0, size=(24, 36), rank=3):
    torch.manual_seed(seed)
    return LayerDelta((as_lora(loudness * torch.randn(size[0], rank), torch.randn(rank, size[1])),), size)


def of(seed, loudness):
    return f"unet.mid_block.attentions.0.transformer_blocks.{seed}.attn1.to_q", lora(seed, loudness)


@pytest.fixture
def source(tmp_path):
    """A native file of three layers, of which one is loud, and its layers."""
    layers = dict([of(0, 1.0), of(1, 0.05), of(2, 0.001)])
    write(Adapter(layers), tmp_path / "source.safetensors")
    return tmp_path / "source.safetensors", layers


@pytest.mark.parametrize("to", ["lora", "krona"])
def test_a_sixteenth_of_the_demo_keeps_more_energy_without_most_layers(to):
    """With the smallest form of every layer it was 33 %, and a LoRA of every layer did not fit at all."""
    report = convert(ZORBI, to=to, budget="1/16", dry_run=True)
    assert report.parameters_after <= report.parameters_before / 16
    assert report.energy_kept >= 0.44
    best_cut = lora_error_within(read(ZORBI).layers, report.parameters_after)
    assert report.relative_error <= best_cut + 1e-6
    assert 0 < len(report.layers) - report.layers_left_out < 20 and len(report.layers) == 56


def test_a_budget_of_the_whole_size_leaves_the_lora_untouched():
    report = convert(ZORBI, to="lora", budget="100%", dry_run=True)
    assert report.relative_error == 0.0 and not report.layers_left_out
    assert {x.note for x in report.layers} == {"kept as LoRA"} and {x.after for x in report.layers} == {"LoRA r8"}


def test_more_parameters_keep_more_energy():
    kept = [convert(**golden(), to="krona", budget=f"1/{n}", dry_run=True).energy_kept for n in (16, 8, 4, 2, 1)]
    assert kept == sorted(kept) and kept[-1] > 1 - 1e-9


@pytest.mark.parametrize("target", TARGETS, ids=lambda t: " ".join(t.values()))
def test_every_target_holds_what_is_kept_and_counts_the_rest_as_error(target, tmp_path):
    report = convert(**golden(), out=tmp_path / "out", budget="1/6", **target)
    before, after = (read(path, base=golden()["base"]) for path in (golden()["source"], report.out))
    kept = {x.layer for x in report.layers if not x.is_left_out}
    assert after.layers.keys() == kept and 0 < report.layers_left_out == len(before) - len(kept)
    assert report.checked.startswith(f"checked: {len(kept)}/{len(kept)} modules rebuilt")
    assert sum(size_of(delta)[0] for delta in before.layers.values()) / 6 >= report.parameters_after
    nothing = {layer: replace(delta, sums=()) for layer, delta in before.layers.items()}
    errors, total = true_errors(before, after.with_layers(nothing | dict(after.layers)))
    assert all(agrees(x.relative_error, errors[x.layer]) for x in report.layers)
    assert agrees(report.relative_error, total)


def test_a_layer_left_out_is_an_error_and_not_a_part_that_is_missing(source):
    path, layers = source
    report = convert(path, to="lora", budget=60, dry_run=True)
    assert [x.is_left_out for x in report.layers] == [False, True, True]
    for row in report.layers[1:]:
        assert (row.after, row.parameters_after, row.bytes_after, row.relative_error) == ("left out", 0, 0, 1.0)
        assert row.norm == pytest.approx(float(layers[row.layer].dense().norm()), rel=1e-6)
        assert row.parameters_before == 180 and row.bytes_before == 720
    assert not report.left_out and "left out" not in report.verdict
    assert report.kept_and_left_out == " (1 kept, 2 left out)"


def test_the_file_records_the_total_error_and_those_of_its_own_layers(source, tmp_path):
    path, layers = source
    report = convert(path, tmp_path / "x.safetensors", budget=60, to="krona")
    made = read(report.out)
    known = made.provenance
    assert list(made.layers) == [next(iter(layers))] == list(known.layer_errors)
    assert known.method == "convert --budget 60"
    assert known.relative_error == pytest.approx(report.relative_error, rel=1e-6)
    whole = convert(path, tmp_path / "y.safetensors", budget=190, to="krona")
    assert not read(whole.out).provenance.layer_errors, "the one layer is exact"
    assert whole.relative_error > 0
    assert read(whole.out).provenance.relative_error == pytest.approx(whole.relative_error, rel=1e-5)


@pytest.mark.parametrize("to", ["krona", "lora", "lokr", "peft-lokr"])
def test_too_small_a_budget_names_the_smallest_and_that_one_works(to, tmp_path):
    with pytest.raises(UsageError, match=r"too small for any layer\. Choose at least \d+, the size of the") as refusal:
        convert(**golden(), to=to, budget=3, out=tmp_path / "x.safetensors")
    least = int(refusal.value.fix.split()[3].rstrip(","))
    report = convert(**golden(), to=to, budget=least, dry_run=True)
    assert report.parameters_after == least and report.layers_left_out == len(report.layers) - 1
    for budget in (least - 1, "0.001%"):  # the share rounds to no parameter at all
        with pytest.raises(UsageError, match=f"at least {least},"):
            convert(**golden(), to=to, budget=budget, dry_run=True)


def test_one_layer_of_a_fused_module_is_left_out_alone(tmp_path):
    """The module has zeros for it, which a reader does not take for a change of the layer."""
    names = [f"transformer.transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    layers = {name: lora(i, 0.01**i, (4096, 4096), 2) for i, name in enumerate(names)}
    write(Adapter(layers, BaseModel("flux2-klein-9b")), tmp_path / "source.safetensors")
    options = {"tool": "comfyui", "to": "lora", "budget": 4 * 8192}
    report = convert(tmp_path / "source.safetensors", tmp_path / "x.safetensors", **options)
    assert [x.layer for x in report.layers if x.is_left_out] == [names[2]]
    back = read(report.out, base="flux2-klein-9b")
    assert names[2] not in back or not back[names[2]].dense().any()


def test_an_application_that_needs_whole_text_encoders_gets_them():
    """OneTrainer refuses a file that lacks a layer of one, so that only others may be left out."""
    layers = {"text_encoder.a": lora(0, 0.01), "text_encoder_2.b": lora(1, 0.01), "unet.c": lora(2), "unet.d": lora(3)}
    for tool in ("onetrainer", "kohya"):
        found = apply_method(layers, Budget(parameters=180), ConversionTarget("kohya-lora", tool))
        assert all(found[name].is_left_out == (tool == "kohya") for name in layers if name.startswith("text"))
    with pytest.raises(UsageError, match=r"2 layers that cannot be left out\. Choose at least 120, the size of their"):
        apply_method(
            dict(list(layers.items())[:2]), Budget(parameters=119), ConversionTarget("kohya-lora", "onetrainer")
        )


def test_a_share_is_of_the_source_for_dora_layers_too():
    """They are merged with the base weights first, and what is dense then is many times larger."""
    report = convert(**golden("lyc_dora_out_dim2_a1"), to="krona", budget="1/2", dry_run=True)
    assert 0.3 * report.parameters_before < report.parameters_after <= report.parameters_before / 2


def test_a_dora_that_keeps_its_magnitude_is_not_left_out():
    plain, dora = lora(0, 1.0), replace(lora(1, 0.001), magnitude=torch.ones(24))
    found = apply_method({"unet.a": plain, "unet.b": dora}, Budget(parameters=120), ConversionTarget("krona"))
    assert not any(outcome.is_left_out for outcome in found.values())
    assert found["unet.b"].delta.magnitude is not None
    with pytest.raises(UsageError, match="1 layer that cannot be left out"):
        apply_method({"unet.b": dora}, Budget(parameters=3), ConversionTarget("krona"))


def test_zero_layers_are_left_out_without_an_error():
    layers = {"unet.a": lora(0), "unet.b": lora(1, 0.0)}
    found = apply_method(layers, Budget(share=1.0), ConversionTarget("kohya-lora"))
    assert found["unet.a"].delta is layers["unet.a"] and found["unet.b"].is_left_out


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{"budget": "1/16"}, {"rank": 1}])
def test_a_size_that_was_asked_for_is_written_and_the_verdict_rates_it(options, tmp_path):
    report = convert(**golden(), out=tmp_path / "x.safetensors", to="lora", **options)
    assert report.written and report.relative_error > 0.5
    assert report.verdict.startswith("Destroyed")


def test_any_other_method_is_refused_as_before(tmp_path):
    for options in ({"shape": "2x2"}, {"max_error": 0.9}):
        with pytest.raises(LossyError, match="nothing was written"):
            convert(**golden(), out=tmp_path / "x.safetensors", **options)
    assert not (tmp_path / "x.safetensors").exists()


def test_one_small_term_is_refused_for_its_error_and_not_for_a_budget(tmp_path):
    """A LoRA of rank 1 is larger, and comparing with one ended in the refusal of a budget that nobody had given."""
    write(Adapter({"unet.x": lora(size=(8, 288))}), tmp_path / "source.safetensors")
    with pytest.raises(LossyError, match=r"a LoRA with 96 parameters: error 100\.0 %"):
        convert(tmp_path / "source.safetensors", tmp_path / "x.safetensors", shape="4x12")
    assert not (tmp_path / "x.safetensors").exists()


def test_rounding_that_loses_half_by_itself_is_refused_with_a_budget_too(tmp_path):
    tiny = lora(0, 1.0).map(lambda t: t * 1e-8)  # below float16
    write(Adapter({"unet.a": tiny, "unet.b": tiny}), tmp_path / "source.safetensors")
    small = {"source": tmp_path / "source.safetensors", "to": "lora", "out": tmp_path / "x.safetensors"}
    for options in ({"budget": "50%"}, {"rank": 1}):
        with pytest.raises(LossyError, match="Rounding to float16"):
            convert(**small, dtype="float16", overwrite=True, **options)
        assert convert(**small, dtype="bfloat16", overwrite=True, **options).written
