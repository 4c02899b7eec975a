"""Doubt about the base model is shown, and nothing is written that is right for one of several base models only."""

import json
import re

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from krona_hub import convert, merge, read, write
from krona_hub.bases import catalog
from krona_hub.bases.name_table import table
from krona_hub.errors import AmbiguousError, BaseMismatchError, ConflictError
from krona_hub.formats.compatibility.verdicts import loads_in
from krona_hub.formats.reading.describe import describe

RANK, ALPHA = 2, 3.0


def lora(name: str, out: int, columns: int) -> dict[str, torch.Tensor]:
    up, down = torch.randn(out, RANK), torch.randn(RANK, columns)
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(ALPHA)}


def save(path, tensors, **metadata):
    save_file(tensors, path, metadata=metadata or None)
    return path


def attention(base: str, dialect: str, step: int) -> dict[str, torch.Tensor]:
    """A LoRA of the attention projections of every n-th block, small ones in place of the real ranks."""
    model, tensors = catalog.get(base), {}
    for layer, module in model.layers("transformer"):
        block = layer.removeprefix("transformer.transformer_blocks.").partition(".")[0]
        if layer.endswith("attn.to_out.0") and block.isdigit() and int(block) % step == 0:
            tensors |= lora(table(model).spell(layer, dialect), *module.shape)
    return tensors


def keys_of(path):
    with safe_open(path, "pt") as file:
        return set(file.keys()), file.metadata() or {}


@pytest.fixture
def sparse(tmp_path):
    """A HunyuanVideo LoRA of two blocks, which FLUX.1 has too."""
    return save(tmp_path / "sparse.safetensors", attention("hunyuan-video", "diffusers", 18))


def test_all_base_models_that_may_be_meant_are_named_with_their_shares(sparse):
    about = describe(sparse)
    assert {"flux1-dev", "hunyuan-video", "framepack"} <= set(about.candidates)
    fit = next(fit for fit in about.fits if fit.base == "hunyuan-video")
    assert (fit.matched, fit.modules, fit.changed, fit.layers) == (2, 2, 2, 548)
    assert fit.same_layers == ("hunyuan-video-i2v",)


def test_no_names_are_chosen_for_an_application_among_base_models_in_doubt(sparse, tmp_path):
    with pytest.raises(AmbiguousError, match="hunyuan-video"):
        write(read(sparse), tmp_path / "out.safetensors", tool="comfyui")
    report = write(read(sparse, base="hunyuan-video"), tmp_path / "out.safetensors", tool="comfyui")
    assert all(".double_blocks." in key for key in keys_of(report.path)[0])


def test_what_is_written_in_doubt_names_no_base_model_and_says_so(sparse, tmp_path):
    report = convert(sparse, tmp_path / "folder", to="peft-lora", exact=True)
    assert any(note.startswith("the base model is not certain: flux1-dev") for note in report.notes)
    assert json.loads((tmp_path / "folder" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    convert(sparse, tmp_path / "krona.safetensors", exact=True)
    _, metadata = keys_of(tmp_path / "krona.safetensors")
    assert metadata["modelspec.architecture"] == "unknown/krona" and " or " in metadata["modelspec.title"]
    base = json.loads(metadata["krona.header"])["base"]
    assert not {"hub_id", "fingerprint"} & base.keys() and "hunyuan-video" in base["candidates"]


def test_metadata_of_another_base_model_are_named_and_not_passed_on(tmp_path):
    tensors = attention("flux2-dev", "diffusers", 1)
    path = save(tmp_path / "x.safetensors", tensors, **{"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"})
    adapter = read(path)
    assert any("the metadata name sdxl" in note for note in adapter.provenance.warnings)
    report = write(adapter, tmp_path / "out.safetensors", format="kohya-lora")
    assert not any("xl" in str(value) for value in keys_of(report.path)[1].values())


def test_the_prefix_of_a_trainer_names_its_base_model(tmp_path):
    tensors = lora("Hunyuan_video_I2V_lora_double_blocks_0_img_attn_proj", 3072, 3072)
    assert set(describe(save(tmp_path / "x.safetensors", tensors)).candidates) <= {
        "hunyuan-video", "hunyuan-video-i2v", "hunyuan-video-i2v-33ch",
    }  # fmt: skip


def test_a_wrong_base_model_is_one_error_that_names_the_right_one(tmp_path):
    names = ("down_blocks.0.attentions.0", "up_blocks.3.attentions.0", "mid_block.attentions.0")
    sizes = {"down_blocks.0.attentions.0": 320, "up_blocks.3.attentions.0": 320, "mid_block.attentions.0": 1280}
    tensors = {}
    for name in names:
        tensors |= lora(f"unet.{name}.transformer_blocks.0.attn1.to_q", sizes[name], sizes[name])
        tensors |= lora(f"unet.{name}.transformer_blocks.0.attn2.to_k", sizes[name], 768)
    path = save(tmp_path / "x.safetensors", tensors)
    with pytest.raises(BaseMismatchError, match=r"not an adapter of sdxl: 1 of 6 modules fit; it fits sd15 completely"):
        read(path, base="sdxl")
    about = describe(path, base="sdxl")
    assert about.mismatch is not None and about.mismatch.exit_code == 5
    assert len([w for w in about.warnings if "sdxl" in w]) == 1


@pytest.mark.parametrize("wrapper", ["transformer.", "diffusion_model.", ""])
def test_two_kept_names_of_one_layer_are_a_conflict(wrapper, tmp_path):
    save(tmp_path / "base.safetensors", {"glow.0.q.weight": torch.randn(6, 4), "glow.0.k.weight": torch.randn(6, 4)})
    tensors = {"unknown.lora_unet_glow_0_q.kron_a.0": torch.ones(1, 1, 1)} | {
        "unknown.lora_unet_glow_0_q.kron_b.0": torch.randn(1, 6, 4)
    }
    other = f"unknown.{wrapper}glow.0.q"
    tensors |= {f"{other}.kron_a.0": torch.ones(1, 1, 1), f"{other}.kron_b.0": torch.randn(1, 6, 4)}
    path = save(tmp_path / "x.safetensors", tensors, **{"krona.schema": "1.0", "krona.header": "{}"})
    with pytest.raises(ConflictError, match=r"glow\.0\.q"):
        read(path, base=tmp_path / "base.safetensors")
    with pytest.raises(ConflictError):
        merge(tmp_path / "base.safetensors", [(path, 1.0)], tmp_path / "merged.safetensors")


def test_no_application_is_named_for_a_base_model_outside_the_catalog(tmp_path):
    base = save(tmp_path / "base.safetensors", {"glow.0.q.weight": torch.randn(6, 4)})
    path = save(tmp_path / "x.safetensors", lora("diffusion_model.glow.0.q", 6, 4))
    for about in (describe(path), describe(path, base=base)):
        assert not any(verdict.ok for verdict in loads_in(about).values())


def test_text_encoders_get_the_names_that_comfyui_knows(tmp_path):
    path = save(tmp_path / "x.safetensors", lora("lora_te_layers_0_self_attn_q_proj", 4096, 2560))
    report = write(read(path, base="z-image"), tmp_path / "out.safetensors", format="kohya-lora", base="z-image")
    assert {key.partition(".")[0] for key in keys_of(report.path)[0]} == {"lora_te_layers_0_self_attn_q_proj"}


def test_a_stable_cascade_file_keeps_its_projections_apart_under_the_names_of_comfyui(tmp_path):
    path = save(tmp_path / "x.safetensors", lora("lora_prior_unet_down_blocks_1_2_attention_to_q", 2048, 2048))
    for target in ({"format": "kohya-lora"}, {"tool": "comfyui"}):
        report = write(read(path), tmp_path / "out.safetensors", overwrite=True, **target)
        modules = {re.sub(r"\.(lora_(up|down)\.weight|alpha)$", "", key) for key in keys_of(report.path)[0]}
        assert modules == {"diffusion_model.down_blocks.1.2.attention.attn.to_q"}
    assert loads_in(describe(report.path))["comfyui"].ok


def test_the_component_that_a_peft_folder_cannot_name_is_said(tmp_path):
    path = save(tmp_path / "x.safetensors", lora("transformer.glow.0.q", 6, 4))
    report = write(read(path), tmp_path / "folder", format="peft-lora")
    assert any("--component transformer" in note for note in report.notes)
    assert set(read(tmp_path / "folder", component="transformer")) == set(read(path)) == {"transformer.glow.0.q"}
