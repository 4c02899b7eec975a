"""What krona answers and offers where an application does not load a file, or not all of it."""

from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from lycoris import create_lycoris_from_weights
from safetensors.torch import load_file, save_file

from krona_hub import convert, write
from krona_hub.bases import catalog
from krona_hub.conversion.report import verdict as said
from krona_hub.errors import InexpressibleError, UnknownBaseError, UsageError
from krona_hub.formats.compatibility.applications import APPLICATIONS, application_named
from krona_hub.formats.compatibility.verdicts import verdict
from krona_hub.formats.reading.describe import describe
from tests.formats import made

TO_Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
CONV_IN = "unet.conv_in"
PATCHES = "transformer.patch_embedding"
FLUX = ("transformer.transformer_blocks.0.attn.to_q", "transformer.single_transformer_blocks.0.attn.to_k")
SPLIT = made.by_lycoris(4)


def shapes(base, *layers):
    return {layer: catalog.get(base).module(layer).shape for layer in layers}


def stored(folder, adapter, base, **options):
    return write(adapter, folder / "made.safetensors", base=base, **options).path


def answer(name, path, base=None):
    return verdict(APPLICATIONS[name], describe(path, base=base))


@pytest.mark.parametrize("prefix", ["transformer.", "diffusion_model.", "lora_unet_", "lycoris_"])
def test_lycoris_wraps_modules_of_its_own_names_only(prefix, tmp_path):
    """As LyCORIS itself does, with the same names for a small model."""

    def renamed(layer):
        path = layer.removeprefix("transformer.")
        return prefix + (path if prefix.endswith(".") else path.replace(".", "_"))

    sizes = {"in_channels": 4, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16}
    heads = {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    model = FluxTransformer2DModel(**sizes, **heads, axes_dims_rope=[4, 4, 8])
    parts = {"lokr_w1": torch.ones(4, 4), "lokr_w2": torch.ones(8, 8), "alpha": torch.tensor(1.0)}
    small = {f"{renamed(layer)}.{part}": tensor for layer in FLUX for part, tensor in parts.items()}
    network, _ = create_lycoris_from_weights(1.0, None, model, weights_sd=small)

    path = stored(tmp_path, made.lokr(shapes("flux1-dev", *FLUX), SPLIT, (None,)), "flux1-dev", tool="lycoris")
    names = {f"lycoris_{x.removeprefix('transformer.').replace('.', '_')}": renamed(x) for x in FLUX}
    tensors = load_file(path)
    save_file({f"{names[k.partition('.')[0]]}.{k.partition('.')[2]}": t for k, t in tensors.items()}, path)
    assert len(network.loras) == (len(FLUX) if prefix == "lycoris_" else 0)
    assert answer("lycoris", path, "flux1-dev").ok is (len(network.loras) == len(FLUX))


def test_the_base_model_that_it_does_not_run_is_the_first_reason(tmp_path):
    path = stored(tmp_path, made.lokr(shapes("sdxl", TO_Q), SPLIT, (None,)), "sdxl", format="lycoris-lokr")
    assert answer("nunchaku", path, "sdxl").why == answer("musubi", path, "sdxl").why == "it does not run sdxl"
    with pytest.raises(InexpressibleError, match="Nunchaku does not run sdxl") as refusal:
        convert(path, tmp_path / "out.safetensors", tool="nunchaku", base="sdxl")
    assert "comfyui" in refusal.value.fix and "--for nunchaku" not in refusal.value.fix


def test_no_way_is_offered_that_is_refused_as_well(tmp_path):
    path = stored(tmp_path, made.lora(shapes("wan21-t2v-1.3b", PATCHES)), "wan21-t2v-1.3b", format="kohya-lora")
    with pytest.raises(InexpressibleError, match="a convolution with a kernel") as refusal:
        convert(path, tmp_path / "out.safetensors", tool="diffsynth", base="wan21-t2v-1.3b")
    assert "--exact" not in refusal.value.fix and "Merge" in refusal.value.fix


def test_an_embedding_that_an_application_is_not_known_to_load_is_in_the_answer(tmp_path):
    path = stored(tmp_path, made.lora(shapes("sdxl", TO_Q)), "sdxl", format="kohya-lora")
    save_file(load_file(path) | {"bundle_emb.sks.string_to_param.*": torch.ones(1, 8)}, path)
    assert answer("a1111", path, "sdxl").ok
    assert answer("comfyui", path, "sdxl").answer == "not known" and "embedding" in answer("comfyui", path, "sdxl").why
    with pytest.raises(InexpressibleError, match="no place for 1 embedding"):
        convert(path, tmp_path / "out.safetensors", tool="comfyui", base="sdxl")


def test_layers_that_an_application_does_not_find_can_be_left_out(tmp_path):
    adapter = made.lora(shapes("sdxl", TO_Q, CONV_IN))
    path = stored(tmp_path, adapter, "sdxl", format="kohya-lora")
    out = tmp_path / "out.safetensors"
    with pytest.raises(InexpressibleError, match="ai-toolkit finds no module") as refusal:
        convert(path, out, tool="ai-toolkit", base="sdxl")
    assert "--allow-missing" in refusal.value.fix and not out.exists()
    report = convert(path, out, tool="ai-toolkit", base="sdxl", allow_missing=True)
    assert report.left_out.modules == (CONV_IN,) and "1 module left out" in said(report)
    assert answer("ai-toolkit", out, "sdxl").ok
    written = write(adapter, tmp_path / "too.safetensors", tool="ai-toolkit", base="sdxl", allow_missing=True)
    assert written.left_out.modules == (CONV_IN,) and written.layers == 1


def test_a_file_without_a_layer_that_the_application_finds_is_refused_even_if_layers_may_be_left_out(tmp_path):
    adapter = made.lora(shapes("sdxl", CONV_IN))
    path, out = stored(tmp_path, adapter, "sdxl", format="kohya-lora"), tmp_path / "out.safetensors"
    with pytest.raises(InexpressibleError, match=r"ai-toolkit finds no module of .* for 1 of 1 layer") as refusal:
        convert(path, out, tool="ai-toolkit", base="sdxl", allow_missing=True)
    assert "--allow-missing" not in refusal.value.fix
    with pytest.raises(InexpressibleError, match=r"ai-toolkit finds no module of .* for 1 of 1 layer"):
        write(adapter, out, tool="ai-toolkit", base="sdxl", allow_missing=True)
    assert not out.exists()


def test_a_dora_that_has_to_be_dissolved_says_why_and_who_keeps_it(tmp_path):
    delta = made.lora(shapes("sdxl", TO_Q))
    size = shapes("sdxl", TO_Q)[TO_Q][0]
    layers = {n: replace(d, magnitude=torch.ones(size), magnitude_axis="out") for n, d in delta.layers.items()}
    path = stored(tmp_path, delta.with_layers(layers), "sdxl", format="lycoris-locon")
    with pytest.raises(UnknownBaseError, match=r"comfyui cannot hold the DoRA of .* base weights") as refusal:
        convert(path, tmp_path / "out.safetensors", tool="comfyui", base="sdxl")
    assert "onetrainer" in refusal.value.fix and "comfyui" not in refusal.value.fix


def test_an_application_without_facts_is_not_known():
    with pytest.raises(UsageError, match="What Draw Things loads is not known"):
        application_named("Draw Things")
