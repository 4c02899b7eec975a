"""Keys of every era and every trainer, alone and mixed in one file."""

import json

import pytest
import torch

from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.reader import read
from tests.formats.files_on_disk import TINY, TO_Q, Q, module, peft_folder, rand, save

DOTTED = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
OLD = "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"
UP, DOWN = rand(12, 2), rand(2, 10)
LYCORIS = Q.replace("lora_unet", "lycoris")
ERAS = {
    "kohya": (f"{Q}.lora_up.weight", f"{Q}.lora_down.weight"),
    "lycoris": (f"{LYCORIS}.lora_up.weight", f"{LYCORIS}.lora_down.weight"),
    "processor": (f"unet.{OLD}.up.weight", f"unet.{OLD}.down.weight"),
    "processor without component": (f"{OLD}.up.weight", f"{OLD}.down.weight"),
    "dreambooth": (f"unet.{DOTTED}.lora.up.weight", f"unet.{DOTTED}.lora.down.weight"),
    "linear layer": (f"unet.{DOTTED}.lora_linear_layer.up.weight", f"unet.{DOTTED}.lora_linear_layer.down.weight"),
    "peft": (f"unet.{DOTTED}.lora_B.weight", f"unet.{DOTTED}.lora_A.weight"),
    "peft with the name of the adapter": (f"unet.{DOTTED}.lora_B.style.weight", f"unet.{DOTTED}.lora_A.style.weight"),
    "ldm, as ai-toolkit": (
        "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.lora_B.weight",
        "diffusion_model.middle_block.1.transformer_blocks.0.attn1.to_q.lora_A.weight",
    ),
}


@pytest.mark.parametrize("era", ERAS)
def test_a_lora_of_any_era_is_the_same_adapter(tmp_path, era):
    up, down = ERAS[era]
    adapter = read(save(tmp_path, {up: UP, down: DOWN}), base=TINY)
    assert list(adapter.layers) == [TO_Q]
    assert torch.allclose(adapter[TO_Q].dense(), UP @ DOWN, atol=1e-6)


def test_every_module_of_a_file_of_mixed_eras_is_read(tmp_path):
    k = DOTTED.replace("to_q", "to_k")
    text = "text_encoder.text_model.encoder.layers.0.self_attn.to_q_lora"
    tensors = {f"unet.{DOTTED}.lora.up.weight": UP, f"unet.{DOTTED}.lora.down.weight": DOWN}
    tensors |= {f"unet.{k}.lora_B.weight": UP.clone(), f"unet.{k}.lora_A.weight": DOWN.clone()}
    tensors |= {f"{text}.up.weight": rand(6, 3), f"{text}.down.weight": rand(3, 4)}
    path = save(tmp_path, tensors)
    names = {TO_Q, TO_Q.replace("to_q", "to_k"), "text_encoder.encoder.layers.0.self_attn.q_proj"}
    assert set(read(path, base=TINY).layers) == names
    assert any("several diffusers versions" in warning for warning in describe(path, base=TINY).warnings)


def test_each_layer_of_a_file_is_read_by_its_own_kind(tmp_path):
    conv = "lora_unet_mid_block_resnets_0_conv1"
    tensors = module(Q, lora_up=UP, lora_down=DOWN) | module(conv, lokr_w1=rand(2, 3), lokr_w2=rand(4, 2, 3, 3))
    about = describe(save(tmp_path, tensors), base=TINY)
    assert about.kinds == {"lora": 1, "lokr": 1}


def test_an_alpha_beside_lora_a_and_b_sets_the_scale(tmp_path):
    tensors = {f"unet.{DOTTED}.lora_B.weight": UP, f"unet.{DOTTED}.lora_A.weight": DOWN}
    path = save(tmp_path, tensors | {f"unet.{DOTTED}.alpha": torch.tensor(5.0)})
    assert torch.allclose(read(path, base=TINY)[TO_Q].dense(), 2.5 * UP @ DOWN, atol=1e-6)


def test_metadata_of_a_pipeline_give_each_component_its_scale(tmp_path):
    text = "text_encoder.encoder.layers.0.self_attn.q_proj"
    tensors = {f"unet.{DOTTED}.lora_B.weight": UP, f"unet.{DOTTED}.lora_A.weight": DOWN}
    tensors |= {f"{text}.lora_B.weight": rand(6, 3), f"{text}.lora_A.weight": rand(3, 4)}
    config = {"unet.r": 2, "unet.lora_alpha": 3, "text_encoder.r": 1, "text_encoder.lora_alpha": 1}
    config |= {"text_encoder.rank_pattern": {"q_proj": 3}, "text_encoder.alpha_pattern": {"self_attn.q_proj": 12}}
    adapter = read(save(tmp_path, tensors, {"lora_adapter_metadata": json.dumps(config)}), base=TINY)
    assert torch.allclose(adapter[TO_Q].dense(), 1.5 * UP @ DOWN, atol=1e-6)
    assert torch.allclose(adapter[text].dense(), 4 * rand(6, 3) @ rand(3, 4), atol=1e-5)


def test_a_peft_lokr_is_scaled_also_where_both_factors_are_full(tmp_path):
    w1, w2 = rand(3, 2), rand(4, 5)
    tensors = {f"{DOTTED}.lokr_w1": w1, f"{DOTTED}.lokr_w2": w2}
    folder = peft_folder(tmp_path / "p", {"peft_type": "LOKR", "r": 8, "alpha": 2}, tensors)
    for source in (folder, folder / "adapter_model.safetensors"):  # also the bare file beside its configuration
        adapter = read(source, base=TINY, component="unet")
        assert torch.allclose(adapter[TO_Q].dense(), torch.kron(w1, w2) / 4)


def test_a_lokr_of_ai_toolkit_ignores_its_placeholder_alpha(tmp_path):
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = module(name, lokr_w1=rand(12, 8), lokr_w2=rand(768, 384), alpha=torch.tensor(9999999999.0))
    about = describe(save(tmp_path, tensors), base="flux1-dev")
    (qkv,) = about.modules
    assert (about.format, qkv.scale, len(qkv.layers)) == ("lycoris-lokr", 1.0, 3)
    assert str(qkv.split) == "12x8 ⊗ 768x384"


def test_embeddings_are_kept_in_extras(tmp_path):
    extras = {"bundle_emb.cat.clip_l": rand(1, 4), "<s1>": rand(4)}
    path = save(tmp_path, module(Q, lora_up=UP, lora_down=DOWN) | extras)
    adapter = read(path, base=TINY)
    assert list(adapter.layers) == [TO_Q]
    assert {name: t.tolist() for name, t in adapter.extras.items()} == {name: t.tolist() for name, t in extras.items()}
    assert set(describe(path, base=TINY).extras) == set(extras)


def test_what_the_file_says_about_itself_is_kept(tmp_path):
    metadata = {
        "ss_tag_frequency": json.dumps({"5_dog": {"sks dog": 9, "grass": 2}}),
        "ss_steps": "400",
        "modelspec.license": "CC0",
        "ss_network_dim": "2",
    }
    path = save(tmp_path, module(Q, lora_up=UP, lora_down=DOWN), metadata)
    told, about = read(path, base=TINY).provenance, describe(path, base=TINY)
    assert told.metadata == metadata
    for found in (told, about):
        assert (found.trigger_words, found.licence) == (("sks dog",), "CC0")
        assert found.training == {"rank": "2", "steps": "400"}


def test_parameters_are_those_of_the_file_without_alpha(tmp_path):
    path = save(tmp_path, module(Q, lora_up=UP, lora_down=DOWN, alpha=torch.tensor(1.0)))
    about = describe(path, base=TINY)
    assert (about.parameters, about.modules[0].bytes, about.bytes) == (44, 176, path.stat().st_size)
