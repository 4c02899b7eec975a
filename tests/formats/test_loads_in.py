"""Which applications load a file: said from headers alone, and true where the application can be asked."""

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from krona_hub.adapters.adapter import Adapter
from krona_hub.bases import catalog
from krona_hub.errors import InexpressibleError
from krona_hub.formats.compatibility.applications import APPLICATIONS
from krona_hub.formats.compatibility.verdicts import loads_in
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.writing.writer import write
from tests import tiny
from tests.formats import made
from tests.shared import shared

ENDINGS = ("to_q", "to_out.0", "ff.net.0.proj")
FLUX = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")  # Nunchaku takes q, k and v of a block together only
QWEN = {f"transformer.transformer_blocks.0.attn.to_{x}": (3072, 3072) for x in "qkv"}


def golden(name):
    return loads_in(describe(shared("golden", name), base=str(shared("golden", "base"))))


def under_kohya_names(name, folder):
    """The verdicts on a golden file of `lycoris_` names if its modules were called `lora_unet_`."""
    source, path = shared("golden", name), folder / "renamed.safetensors"
    with safe_open(source, "pt") as file:
        metadata = file.metadata()
    tensors = {key.replace("lycoris_", "lora_unet_", 1): tensor for key, tensor in load_file(source).items()}
    save_file(tensors, path, metadata)
    return loads_in(describe(path, base=str(shared("golden", "base"))))


def of_unet(pipe, *endings):
    return {name: shape for name, shape in tiny.layers(pipe, *endings).items() if name.startswith("unet")}


def what_it_loads(tool, kind, folder):
    """A base model that the application runs, and an adapter of that kind for it."""
    if tool == "nunchaku":
        pipe = tiny.flux()
        shapes = {name: shape for name, shape in tiny.layers(pipe, *FLUX).items() if "single" not in name}
        return tiny.save(pipe, folder), made.lora(shapes)
    if tool == "musubi":
        return "qwen-image", made.lora(QWEN) if kind == "lora" else made.lokr(QWEN, made.by_lycoris(4), (2,))
    pipe = tiny.sd15()
    base, shapes = tiny.save(pipe, folder), of_unet(pipe, *ENDINGS)
    if kind == "lora":
        return base, made.lora(shapes)
    return base, lokr(shapes, of_unet(pipe, "attn2.to_k") if tool == "invokeai" else {})


def lokr(factored, full):
    """A LoKr whose w2 is a product in some layers, and whose two factors are full in others."""
    layers = made.lokr(factored, made.by_lycoris(4), (2,)).layers | made.lokr(full, made.by_lycoris(4), (None,)).layers
    return Adapter(layers)


KINDS = [(tool, kind) for tool in APPLICATIONS for kind in ("lora", "lokr") if getattr(APPLICATIONS[tool], kind)]


@pytest.mark.parametrize(("tool", "kind"), KINDS)
def test_what_is_written_for_a_tool_is_said_to_load_in_it(tool, kind, tmp_path):
    base, adapter = what_it_loads(tool, kind, tmp_path)
    report = write(adapter, tmp_path / kind, tool=tool, base=base)
    verdict = loads_in(describe(report.path, base=base, component=adapter.components[0]))[tool]
    assert verdict.ok and verdict.answer == "yes", verdict.why
    assert verdict.loaded == verdict.layers == len(adapter)


@pytest.mark.parametrize("full", [(), ("attn1.to_k",), ("attn2.to_q",)])
def test_invokeai_recognizes_a_lokr_of_a_unet_by_two_full_factors_of_the_cross_attention_only(full, tmp_path):
    pipe = tiny.sd15()
    adapter = lokr(of_unet(pipe, "attn2.to_k", "attn2.to_v"), of_unet(pipe, *full) if full else {})
    base, path = tiny.save(pipe, tmp_path), tmp_path / "x.safetensors"
    with pytest.raises(InexpressibleError, match=r"two full factors in attn2\.to_k, attn2\.to_v or a text encoder"):
        write(adapter, path, tool="invokeai", base=base)
    assert not path.exists()
    write(adapter, path, tool="comfyui", base=base)
    verdict = loads_in(describe(path, base=base))["invokeai"]
    assert verdict.answer == "no" and "two full factors in attn2.to_k" in verdict.why and verdict.loaded == 0


@pytest.mark.parametrize(
    ("name", "tool", "why"),
    [
        ("lyc_tucker_dim2_a1.safetensors", "lycoris", "Tucker"),
        ("lyc_unbalanced_f4_dim3_a1.safetensors", "lycoris", "a shape other than"),
        ("lyc_dora_in_dim3_a1.safetensors", "lycoris", "DoRA"),
        ("lyc_dora_out_dim2_a1.safetensors", "comfyui", "DoRA"),
        ("lyc_dora_out_dim2_a1.safetensors", "a1111", "does not find 10 of 10 layers, such as lycoris_down_blocks_"),
        ("lyc_f4_dim2_a1.safetensors", "diffusers", "its pipelines for this base model reject LoKr"),
        ("lyc_f4_dim2_a1.safetensors", "nunchaku", "LoRA only"),
        ("lyckohya_te_f4_dim2_a1.safetensors", "comfyui", "does not find 3 of 13 layers, such as lora_te_encoder_"),
        ("kohya_lora_dim4_a1_conv2_a1.safetensors", "peft", "folder"),
        ("diffusers_pipe_lora_dreambooth_r2_a2.safetensors", "diffusers", "old and new key names"),
        ("diffusekrona_a1_8_a2_4.safetensors", "diffusers", "fails"),
        ("peft_lokr_r8_a8", "comfyui", "only PEFT"),
    ],
)
def test_known_troubles_are_told(name, tool, why):
    verdict = golden(name)[tool]
    assert verdict.answer == "no" and not verdict.ok and why in verdict.why, verdict


@pytest.mark.parametrize(
    ("name", "tool", "why"),
    [
        ("lyc_dora_out_dim2_a1.safetensors", "a1111", "DoRA"),
        ("lyc_dora_out_dim2_a1.safetensors", "comfyui", "DoRA"),
        ("lyc_dora_out_dim2_a1.safetensors", "forge", "DoRA"),
        ("lyc_f4_dim2_a1.safetensors", "diffusers", "its pipelines for this base model reject LoKr"),
    ],
)
def test_what_is_computed_wrongly_is_told_where_the_names_are_found(name, tool, why, tmp_path):
    verdict = under_kohya_names(name, tmp_path)[tool]
    assert verdict.answer == "no" and why in verdict.why, verdict


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("lyc_f4_dim2_a1.safetensors", "a1111"),
        ("lyc_dora_in_dim3_a1.safetensors", "a1111"),
        ("lyc_dora_in_dim3_a1.safetensors", "forge"),
        ("lyc_dora_out_dim2_a1.safetensors", "onetrainer"),
    ],
)
def test_a_measured_file_under_names_that_are_found_is_welcome(name, tool, tmp_path):
    verdict = under_kohya_names(name, tmp_path)[tool]
    assert verdict.ok and verdict.loaded == verdict.layers == 10, verdict.why


def test_the_layers_that_comfyui_does_not_find_are_counted():
    verdict = golden("lyckohya_te_f4_dim2_a1.safetensors")["comfyui"]
    assert (verdict.answer, verdict.loaded, verdict.layers) == ("no", 10, 13)


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("lyc_f4_dim2_a1.safetensors", "comfyui"),
        ("lyc_f4_dim2_a1.safetensors", "lycoris"),
        ("lyc_dora_in_dim3_a1.safetensors", "comfyui"),
        ("lyc_dora_out_dim2_a1.safetensors", "lycoris"),
        ("kohya_lora_dim4_a1_conv2_a1.safetensors", "comfyui"),
        ("kohya_lora_dim4_a1_conv2_a1.safetensors", "kohya"),
        ("diffusers_pipe_lora_peftkeys_r4_a4.safetensors", "diffusers"),
        ("diffusers_unet_lokr_r3_a2.safetensors", "diffusers"),
        ("peft_lokr_r8_a8", "peft"),
    ],
)
def test_files_without_trouble_are_welcome(name, tool):
    verdict = golden(name)[tool]
    assert verdict.ok, verdict.why


def test_diffusers_loses_the_alphas_that_we_say_it_loses(tmp_path):
    pipe = tiny.sd15()
    adapter = made.lora(tiny.layers(pipe, "to_q", "to_k", "to_v", "to_out.0"), ranks=(2, 3))
    base = tiny.save(pipe, tmp_path)
    report = write(adapter, tmp_path / "x.safetensors", format="kohya-lora", base=base)
    assert "alphas" in loads_in(describe(report.path, base=base))["diffusers"].why
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    got, want = tiny.output(pipe.unet), tiny.output(tiny.added(tiny.sd15(), adapter).unet)
    assert (got - want).abs().max() > 1e-3 * want.abs().max(), "diffusers has learned it: take the check out"


def test_every_base_is_named_as_the_catalog_names_it():
    from krona_hub.formats.writing.kohya_metadata import BASES

    assert set(BASES) <= set(catalog.names())


@pytest.mark.parametrize("tool", APPLICATIONS)
def test_an_application_states_each_base_of_the_catalog_once(tool):
    stated = [base for family in APPLICATIONS[tool].families for base in family.bases]
    assert set(stated) <= set(catalog.names()) and len(set(stated)) == len(stated)
    assert bool(stated) != APPLICATIONS[tool].every_base
