"""Vectors of files: biases, norms and whole parameters are read, written where they have a place, or refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import krona_hub
from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.bases import catalog
from krona_hub.errors import (
    BaseMismatchError,
    ConflictError,
    IncompleteError,
    InexpressibleError,
    NonFiniteError,
    UnknownBaseError,
    UsageError,
)
from krona_hub.formats.compatibility.verdicts import loads_in
from krona_hub.formats.known.registry import FORMATS
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.writer import write
from krona_hub.kron.terms import as_lora
from tests.formats.files_on_disk import module, peft_folder, rand, save

BASE = "tiny-scenes"
UNET = catalog.get(BASE).components["unet"]
LAYER = next(path for path in UNET if path.endswith("attn1.to_out.0"))  # with a bias
OUT, IN = UNET[LAYER].shape
NORM = "conv_norm_out"
WIDTH = UNET.norms[NORM].shape[0]
KOHYA = f"lora_unet_{LAYER.replace('.', '_')}"
LORA = module(KOHYA, lora_up=rand(OUT, 2), lora_down=rand(2, IN), alpha=torch.tensor(1.0))
BIAS, WEIGHT = rand(OUT), rand(WIDTH)


def vectors_of(path, **options):
    return read(path, base=BASE, **options).vectors


def test_lycoris_norms_and_biases_are_read_as_they_are_stored(tmp_path):
    tensors = LORA | {f"{KOHYA}.diff_b": BIAS.bfloat16(), f"lora_unet_{NORM}.w_norm": WEIGHT}
    tensors |= {f"lora_unet_{NORM}.b_norm": -WEIGHT}
    path = save(tmp_path, tensors)
    found = vectors_of(path)
    assert found.keys() == {f"unet.{LAYER}.bias", f"unet.{NORM}.weight", f"unet.{NORM}.bias"}
    assert torch.equal(found[f"unet.{LAYER}.bias"], BIAS.bfloat16())  # alpha / rank = 1/2 is for the LoRA only
    assert torch.equal(found[f"unet.{NORM}.weight"], WEIGHT) and torch.equal(found[f"unet.{NORM}.bias"], -WEIGHT)
    about = describe(path, base=BASE)
    assert about.matched == "1 of 1 modules and 3 of 3 vectors matched tiny-scenes"
    assert about.parameters == 2 * (OUT + IN) + OUT + 2 * WIDTH and not about.warnings


@pytest.mark.parametrize("tail", ["lora_B.bias", "lora_up.bias"])
def test_the_bias_of_a_lora_is_scaled_as_the_lora(tmp_path, tail):
    found = vectors_of(save(tmp_path, LORA | {f"{KOHYA}.{tail}": BIAS}))
    torch.testing.assert_close(found[f"unet.{LAYER}.bias"], BIAS / 2)


def test_the_bias_of_a_fused_layer_is_split_by_rows_and_chunks_are_swapped(tmp_path):
    rows = rand(9216)
    tensors = {"lora_unet_double_blocks_0_img_attn_qkv.diff_b": rows}
    tensors |= {"lora_unet_final_layer_adaLN_modulation_1.diff_b": rand(6144)}
    found = read(save(tmp_path, tensors), base="flux1-dev").vectors
    for i, layer in enumerate(("to_q", "to_k", "to_v")):
        vector = found[f"transformer.transformer_blocks.0.attn.{layer}.bias"]
        assert torch.equal(vector, rows[3072 * i : 3072 * (i + 1)])
    assert torch.equal(found["transformer.norm_out.linear.bias"], rand(6144).roll(3072))


def test_fused_biases_are_written_at_their_rows(tmp_path):
    q, k = (f"transformer.transformer_blocks.0.attn.{x}" for x in ("to_q", "to_k"))
    delta = LayerDelta((as_lora(rand(3072, 1), rand(1, 3072)),), (3072, 3072))
    adapter = Adapter({q: delta}, catalog.get("flux1-dev").model, vectors={f"{k}.bias": rand(3072)})
    report = write(adapter, tmp_path / "x.safetensors", format="lycoris-locon", tool=None, base="flux1-dev")
    assert report.vectors == 1 and not report.left_out
    again = read(tmp_path / "x.safetensors", base="flux1-dev")
    assert torch.equal(again.vectors[f"{k}.bias"], rand(3072))


def test_modulation_of_wan_is_a_bare_parameter(tmp_path):
    table = rand(1, 6, 1536)
    path = save(tmp_path, {"diffusion_model.blocks.3.diff_m": table})
    found = read(path, base="wan21-t2v-1.3b").vectors
    assert torch.equal(found["transformer.blocks.3.scale_shift_table"], table)
    krona_hub.convert(path, tmp_path / "y.safetensors", base="wan21-t2v-1.3b")
    assert torch.equal(read(tmp_path / "y.safetensors").vectors["transformer.blocks.3.scale_shift_table"], table)


def test_a_file_of_norms_alone_finds_its_base(tmp_path):
    path = save(tmp_path, {f"lora_unet_{NORM}.w_norm": rand(320), f"lora_unet_{NORM}.b_norm": rand(320)})
    adapter = read(path)
    assert not adapter.layers and adapter.base.family == "sd15" and len(adapter.vectors) == 2
    report = krona_hub.convert(path, tmp_path / "y.safetensors")
    assert (
        report.verdict.startswith("Exact") and read(tmp_path / "y.safetensors").vectors.keys() == adapter.vectors.keys()
    )


def test_whole_parameters_need_the_base_weights(tmp_path):
    config = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 1,
        "auto_mapping": {"base_model_class": "UNet2DConditionModel"},
    }
    tensors = {f"{LAYER}.lora_A.weight": rand(2, IN), f"{LAYER}.lora_B.weight": rand(OUT, 2)}
    tensors |= {
        f"{LAYER}.base_layer.bias": BIAS,
        f"{NORM}.weight": WEIGHT,
        "conv_out.weight": rand(*UNET["conv_out"].shape),
    }
    folder = peft_folder(tmp_path / "a", config, tensors)
    with pytest.raises(UnknownBaseError, match="depends on the base weights"):
        read(folder, base=catalog.get(BASE))
    without_weights = describe(folder, base=catalog.get(BASE)).warnings
    assert any("3 parameters are stored whole" in w for w in without_weights)
    from krona_hub.bases.loading import base_weights

    weights, adapter = base_weights(BASE), read(folder, base=BASE)
    for name, value in ((f"unet.{LAYER}.bias", BIAS), (f"unet.{NORM}.weight", WEIGHT)):
        torch.testing.assert_close(adapter.vectors[name], value - weights(name).float())
    change = rand(*UNET["conv_out"].shape) - weights("unet.conv_out").float()
    torch.testing.assert_close(adapter["unet.conv_out"].dense(), change)


BROKEN = {
    "of another size": ({f"lora_unet_{NORM}.w_norm": rand(WIDTH + 1)}, BaseMismatchError, "values, but the parameter"),
    "of no module": ({"lora_unet_nothing.w_norm": rand(4)}, BaseMismatchError, "has no such module"),
    "not finite": ({f"lora_unet_{NORM}.w_norm": WEIGHT / 0}, NonFiniteError, "NaN or infinity"),
    "twice": (
        {f"lora_unet_{NORM}.w_norm": WEIGHT, f"unet.{NORM}.diff": WEIGHT + 1}, ConflictError, "same parameter as",
    ),
    "without its LoRA": ({f"lora_unet_{NORM}.lora_B.bias": WEIGHT}, IncompleteError, "without its LoRA"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_vector_that_cannot_be_read_is_refused_by_name(tmp_path, case):
    tensors, error, words = BROKEN[case]
    with pytest.raises(error, match=words) as caught:
        vectors_of(save(tmp_path, LORA | tensors))
    assert next(iter(tensors)) in str(caught.value) or case == "twice"


def test_a_skipped_vector_is_counted_in_the_verdict(tmp_path):
    path = save(tmp_path, LORA | {"lora_unet_nothing.w_norm": rand(4)})
    report = krona_hub.convert(path, tmp_path / "y.safetensors", base=BASE, allow_missing=True, to="lycoris-locon")
    assert report.verdict.startswith("Exact for 1 layer; 1 vector (biases, norms) left out.")


# --- places of vectors -----------------------------------------------------------------------------------------------


def adapter_with_vectors() -> Adapter:
    delta = LayerDelta((as_lora(rand(OUT, 2), rand(2, IN)),), (OUT, IN))
    vectors = {
        f"unet.{LAYER}.bias": BIAS,
        f"unet.{NORM}.weight": WEIGHT,
        "unet.conv_in.bias": rand(UNET["conv_in"].shape[0]),
    }
    return Adapter({f"unet.{LAYER}": delta}, catalog.get(BASE).model, vectors=vectors)


PLACES = {"krona": 3, "lycoris-lokr": 3, "lycoris-locon": 3, "peft-lora": 1, "diffusers-lora": 1}


@pytest.mark.parametrize("name", [f.name for f in FORMATS if f.writes and f.name != "diffusekrona"])
def test_every_format_holds_its_vectors_and_refuses_to_drop_others(tmp_path, name):
    adapter, out, kept = adapter_with_vectors(), tmp_path / "out.safetensors", PLACES.get(name, 0)
    out = tmp_path / "out" if name.startswith("peft") else out
    if kept < 3:
        with pytest.raises(InexpressibleError, match=f"no place for {3 - kept} vectors"):
            write(adapter, out, format=name, base=BASE)
        assert not out.exists()
    report = write(adapter, out, format=name, base=BASE, allow_missing=True)
    assert report.vectors == kept and len(report.left_out.vectors) == 3 - kept
    found = read(out, base=BASE, component="unet").vectors
    nonzero = {n: v for n, v in found.items() if v.any()}
    assert len(nonzero) == kept and all(torch.equal(v, adapter.vectors[n]) for n, v in nonzero.items())


@pytest.mark.parametrize(("tool", "kept"), [("comfyui", 3), ("forge", 3), ("a1111", 1), ("kohya", 0), ("peft", 1)])
def test_an_application_gets_the_vectors_that_it_loads(tmp_path, tool, kept):
    report = write(adapter_with_vectors(), tmp_path / "x", tool=tool, base=BASE, allow_missing=True)
    assert report.vectors == kept


def test_a_norm_is_written_with_both_parts(tmp_path):
    write(adapter_with_vectors(), tmp_path / "x.safetensors", format="lycoris-lokr", base=BASE)
    tensors = load_file(tmp_path / "x.safetensors")
    assert torch.equal(tensors[f"lora_unet_{NORM}.w_norm"], WEIGHT) and not tensors[f"lora_unet_{NORM}.b_norm"].any()
    assert torch.equal(tensors[f"{KOHYA}.diff_b"], BIAS)


def test_peft_gets_a_bias_in_every_module_and_its_setting(tmp_path):
    write(adapter_with_vectors(), tmp_path / "x", format="peft-lora", base=BASE, allow_missing=True)
    assert json.loads((tmp_path / "x/adapter_config.json").read_text())["lora_bias"] is True


@pytest.mark.parametrize("name", ["peft-lora", "diffusers-lora"])
def test_a_bias_has_no_place_in_peft_beside_an_adapted_layer_without_one(tmp_path, name):
    """`lora_bias` of PEFT is a setting of the whole adapter, and PEFT merges no bias into a layer that has none."""
    whole = adapter_with_vectors()
    to_q = f"unet.{LAYER.replace('to_out.0', 'to_q')}"
    delta = LayerDelta((as_lora(rand(OUT, 3), rand(3, IN)),), (OUT, IN))
    adapter = Adapter({**whole.layers, to_q: delta}, whole.base, vectors={f"unet.{LAYER}.bias": BIAS})
    out = tmp_path / "out"
    with pytest.raises(InexpressibleError, match="no place for 1 vector"):
        write(adapter, out, format=name, base=BASE)
    assert write(adapter, out, format=name, base=BASE, allow_missing=True).left_out.vectors == (f"unet.{LAYER}.bias",)
    assert set(read(out, base=BASE, component="unet")) == set(adapter)


def test_vectors_of_zeros_are_not_a_loss(tmp_path):
    adapter = adapter_with_vectors()
    zeros = Adapter(adapter.layers, adapter.base, vectors={n: torch.zeros_like(v) for n, v in adapter.vectors.items()})
    assert not write(zeros, tmp_path / "x.safetensors", format="kohya-lora", base=BASE).left_out


def test_a_conversion_counts_what_it_leaves_out_and_needs_consent(tmp_path):
    source, out = tmp_path / "s.safetensors", tmp_path / "o.safetensors"
    write(adapter_with_vectors(), source, base=BASE)
    for options in ({}, {"exact": True}, {"dry_run": True}):
        with pytest.raises(InexpressibleError) as caught:
            krona_hub.convert(source, out, to="lora", **options)
        assert caught.value.exit_code == 3 and not out.exists()
    report = krona_hub.convert(source, out, to="lora", allow_missing=True)
    assert report.verdict.startswith("Exact for 1 layer; 3 vectors (biases, norms) left out.")
    assert report.left_out.vectors and out.exists()
    complete = krona_hub.convert(source, tmp_path / "p.safetensors", to="lycoris-locon", exact=True)
    assert complete.verdict.startswith("Exact: ") and complete.vectors == 3


@pytest.mark.parametrize("goal", [{"to": "kohya-lora"}, {"to": "peft-lokr"}, {"tool": "kohya"}, {"tool": "peft"}])
def test_a_file_with_nothing_in_it_is_never_written(tmp_path, goal):
    source, folder = tmp_path / "s.safetensors", tmp_path / "out"
    write(Adapter({}, catalog.get(BASE).model, vectors={f"unet.{NORM}.weight": WEIGHT}), source, base=BASE)
    folder.mkdir()
    with pytest.raises(InexpressibleError, match="would be empty") as caught:
        krona_hub.convert(source, folder / "o", base=BASE, allow_missing=True, **goal)
    assert caught.value.exit_code == 3 and not any(folder.iterdir())


def test_vectors_alone_are_not_written_for_an_application_that_does_not_run_the_base(tmp_path):
    source = tmp_path / "s.safetensors"
    write(Adapter({}, catalog.get(BASE).model, vectors={f"unet.{NORM}.weight": WEIGHT}), source, base=BASE)
    with pytest.raises(
        InexpressibleError, match="musubi-tuner does not run tiny-scenes; nothing was written"
    ) as caught:
        krona_hub.convert(source, tmp_path / "o.safetensors", base=BASE, allow_missing=True, tool="musubi")
    assert caught.value.exit_code == 3 and not (tmp_path / "o.safetensors").exists()


def test_the_error_of_rounded_vectors_is_reported(tmp_path):
    source = tmp_path / "s.safetensors"
    write(Adapter({}, catalog.get(BASE).model, vectors={f"unet.{NORM}.weight": WEIGHT}), source, base=BASE)
    report = krona_hub.convert(source, tmp_path / "o.safetensors", dtype="bf16")
    found = read(tmp_path / "o.safetensors").vectors[f"unet.{NORM}.weight"].double()
    true = float((found - WEIGHT.double()).norm() / WEIGHT.double().norm())
    assert true > 1e-4 and report.relative_error == pytest.approx(true, rel=1e-6)


def test_embeddings_have_a_place_in_kohya_files_and_count_elsewhere(tmp_path):
    tensors = LORA | {"bundle_emb.sks.string_to_param.*": rand(1, 8)}
    source = save(tmp_path, tensors)
    with pytest.raises(InexpressibleError, match="no place for 1 embedding"):
        krona_hub.convert(source, tmp_path / "a", base=BASE, to="peft-lora")
    krona_hub.convert(source, tmp_path / "b.safetensors", base=BASE, to="lycoris-locon")
    assert torch.equal(load_file(tmp_path / "b.safetensors")["bundle_emb.sks.string_to_param.*"], rand(1, 8))


def test_an_application_that_ignores_vectors_does_not_load_the_file_rightly(tmp_path):
    write(adapter_with_vectors(), tmp_path / "x.safetensors", format="lycoris-locon", base=BASE)
    verdicts = loads_in(describe(tmp_path / "x.safetensors", base=BASE))
    assert verdicts["comfyui"].ok and not verdicts["a1111"].ok and "ignores 2 vectors" in verdicts["a1111"].why


def test_plain_weights_in_a_file_that_is_not_peft_stay_unknown(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(LORA | {"unet.conv_norm_out.weight": WEIGHT}, path)
    with pytest.raises(IncompleteError, match="a whole weight, as in a checkpoint"):
        read(path, base=BASE)


def test_a_layer_is_never_read_without_its_magnitude(tmp_path):
    other = LAYER.replace("attn1.to_out.0", "attn1.to_q")
    plain = module(
        f"lora_unet_{other.replace('.', '_')}", lora_up=rand(*UNET[other].shape)[:, :1], lora_down=rand(1, IN)
    )
    path = save(tmp_path, LORA | plain | {f"unet.{LAYER}.lora_magnitude_vector": rand(OUT)})
    with pytest.raises(IncompleteError, match="of the same layer has another name"):
        read(path, base=BASE)
    assert list(read(path, base=BASE, allow_missing=True)) == [f"unet.{other}"]


def test_validate_compares_vectors_with_the_base(tmp_path):
    from krona_hub.schema.validate import validate

    vectors = {f"unet.{NORM}.weight": WEIGHT, f"unet.{NORM}.bias": rand(WIDTH + 1), "unet.nothing.bias": rand(4)}
    write(Adapter({}, catalog.get(BASE).model, vectors=vectors), tmp_path / "x.safetensors")
    findings = [f for f in validate(tmp_path / "x.safetensors", catalog.get(BASE)) if f.severity == "error"]
    assert {f.where for f in findings} == {f"'unet.{NORM}.bias'", "'unet.nothing.bias'"}


def test_a_weight_that_is_set_is_a_difference_from_the_base(tmp_path):
    from krona_hub.bases.loading import base_weights

    shape = UNET["conv_out"].shape
    tensors = {f"unet.{NORM}.set_weight": WEIGHT, "unet.conv_out.set_weight": rand(*shape)}
    adapter, weights = read(save(tmp_path, tensors), base=BASE), base_weights(BASE)
    torch.testing.assert_close(adapter.vectors[f"unet.{NORM}.weight"], WEIGHT - weights(f"unet.{NORM}.weight").float())
    torch.testing.assert_close(adapter["unet.conv_out"].dense(), rand(*shape) - weights("unet.conv_out").float())


def test_exact_never_leaves_anything_out(tmp_path):
    path = save(tmp_path, LORA | {"lora_unet_nothing.w_norm": rand(4)})
    with pytest.raises(UsageError, match="exclude each other"):
        krona_hub.convert(path, tmp_path / "y.safetensors", base=BASE, exact=True, allow_missing=True)


def test_copies_of_biases_that_peft_stores_twice_are_one(tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "bias": "all", "modules_to_save": ["conv_out"]}
    config["auto_mapping"] = {"base_model_class": "UNet2DConditionModel"}
    bias = rand(UNET["conv_out"].shape[0])
    tensors = {f"{LAYER}.lora_A.weight": rand(2, IN), f"{LAYER}.lora_B.weight": rand(OUT, 2), "conv_out.bias": bias}
    tensors |= {"conv_out.modules_to_save.bias": bias + 0, "conv_out.original_module.bias": bias + 0}
    assert list(vectors_of(peft_folder(tmp_path / "a", config, tensors))) == ["unet.conv_out.bias"]


def test_unknown_settings_are_reported_by_a_conversion_and_a_merge(tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "foo_mode": "bar"}
    config["auto_mapping"] = {"base_model_class": "UNet2DConditionModel"}
    tensors = {f"{LAYER}.lora_A.weight": rand(2, IN), f"{LAYER}.lora_B.weight": rand(OUT, 2)}
    folder = peft_folder(tmp_path / "a", config, tensors)
    report = krona_hub.convert(folder, tmp_path / "x.safetensors", to="lycoris-locon", base=BASE)
    assert any("foo_mode" in note for note in report.notes)
    assert any("foo_mode" in note for note in krona_hub.plan_merge(BASE, [(folder, 1.0)]).notes)


def test_a_merge_that_leaves_parts_out_says_so_in_its_verdict(tmp_path):
    path = save(tmp_path, LORA | {"lora_unet_nothing.w_norm": rand(4)})
    report = krona_hub.merge(BASE, [(path, 1.0)], tmp_path / "merged", allow_missing=True)
    assert report.verdict.startswith("1 part of the adapters not merged; ") and "contain the rest" in report.verdict


def test_peft_loads_the_parameters_that_it_stored(tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 1, "bias": "all"}
    config["auto_mapping"] = {"base_model_class": "UNet2DConditionModel"}
    tensors = {f"{LAYER}.lora_A.weight": rand(2, IN), f"{LAYER}.lora_B.weight": rand(OUT, 2), f"{NORM}.bias": WEIGHT}
    assert loads_in(describe(peft_folder(tmp_path / "a", config, tensors), base=BASE))["peft"].ok


def test_a_single_weight_that_is_set_is_recognized(tmp_path):
    path = save(tmp_path, {"unet.conv_out.set_weight": rand(*UNET["conv_out"].shape)})
    assert list(read(path, base=BASE)) == ["unet.conv_out"]


def test_a_comparison_says_what_it_did_not_compare(tmp_path, capsys):
    from krona_hub.cli.main import main

    path = save(tmp_path, LORA | {"lora_unet_nothing.w_norm": rand(4)})
    assert main(["verify", str(path), str(path), "--base", BASE, "--allow-missing"]) == 0
    assert "2 parts of the files were not compared." in " ".join(capsys.readouterr().out.split())
