"""Where the modules of a file land: fused, swapped, transposed and prefix-less names, folders, and unknown bases."""

import json

import pytest
import torch
from safetensors.torch import load_file

from krona_hub.adapters.unknown_base import KEPT_NAMES
from krona_hub.bases import catalog
from krona_hub.bases.base import Base
from krona_hub.bases.module_spec import ModuleSpec
from krona_hub.errors import (
    AmbiguousError,
    BaseMismatchError,
    ConflictError,
    IncompleteError,
    NotFoundError,
    PickleError,
    ShapeError,
    UnrecognisedError,
    UnsupportedError,
    UsageError,
)
from krona_hub.formats.known import cloneofsimo
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.reader import read
from tests.formats.files_on_disk import TINY, TO_Q, Q, module, peft_folder, rand, save
from tests.shared import shared

WIDE = 3072  # of FLUX


def lora(name, out, in_, rank=2):
    return module(name, lora_up=rand(out, rank), lora_down=rand(rank, in_))


def test_a_fused_lora_is_split_by_rows(tmp_path):
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    adapter = read(save(tmp_path, lora(name, 3 * WIDE, WIDE)), base="flux1-dev")
    whole = rand(3 * WIDE, 2) @ rand(2, WIDE)
    for part, layer in enumerate(("to_q", "to_k", "to_v")):
        found = adapter[f"transformer.transformer_blocks.0.attn.{layer}"].dense()
        assert torch.allclose(found, whole[part * WIDE : (part + 1) * WIDE], atol=1e-5)


@pytest.mark.parametrize("a1", [12, 8])
def test_a_fused_lokr_is_split_exactly_whether_or_not_three_divides_its_left_factor(tmp_path, a1):
    w1, w2 = rand(a1, 8), rand(3 * WIDE // a1, WIDE // 8)
    path = save(tmp_path, module("lora_unet_double_blocks_0_img_attn_qkv", lokr_w1=w1, lokr_w2=w2))
    adapter = read(path, base="flux1-dev")
    whole = torch.kron(w1, w2)
    for part, layer in enumerate(("to_q", "to_k", "to_v")):
        found = adapter[f"transformer.transformer_blocks.0.attn.{layer}"]
        assert found.sums[0].terms == (1 if a1 == 12 else 3)
        assert torch.allclose(found.dense(), whole[part * WIDE : (part + 1) * WIDE])


def test_swapped_halves_of_a_modulation_come_back_in_order(tmp_path):
    up, down = rand(2 * WIDE, 2), rand(2, WIDE)
    path = save(tmp_path, module("lora_unet_final_layer_adaLN_modulation_1", lora_up=up, lora_down=down))
    found = read(path, base="flux1-dev")["transformer.norm_out.linear"].dense()
    whole = up @ down
    assert torch.allclose(found, torch.cat([whole[WIDE:], whole[:WIDE]]), atol=1e-5)


def test_without_a_base_the_catalog_is_searched_and_ties_are_told(tmp_path):
    names = [f"transformer.transformer_blocks.{i}.attn.to_q" for i in range(19)]
    path = save(tmp_path, {k: v for n in names for k, v in lora(n, WIDE, WIDE).items()})
    adapter = read(path)
    assert adapter.base is not None and set(adapter.base.candidates) >= {"flux1-dev", "flux1-schnell"}
    assert "19 of 19 modules matched" in adapter.provenance.notes[0]


def test_a_lycoris_file_of_a_text_encoder_lands_by_its_shapes(tmp_path):
    path = save(tmp_path, lora("lycoris_encoder_layers_0_self_attn_q_proj", 1280, 1280))
    assert list(read(path, base="sdxl").layers) == ["text_encoder_2.encoder.layers.0.self_attn.q_proj"]


def test_a_tie_of_components_is_refused_until_one_is_named(tmp_path):
    modules = {"encoder.layers.0.self_attn.q_proj": ModuleSpec((6, 4))}
    base = Base("twins", None, {"text_encoder": modules, "text_encoder_2": modules})
    path = save(tmp_path, lora("lycoris_encoder_layers_0_self_attn_q_proj", 6, 4))
    with pytest.raises(AmbiguousError, match="--component"):
        read(path, base=base)
    assert read(path, base=base, component="text_encoder_2").components == ("text_encoder_2",)


def test_dotted_names_of_an_unknown_base_speak_for_themselves(tmp_path):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    tensors = {f"{name}.processor.to_out_lora.down.weight": rand(3, 12), f"{name}.to_q.lora_A.weight": rand(2, 10)}
    tensors |= {f"{name}.processor.to_out_lora.up.weight": rand(10, 3), f"{name}.to_q.lora_B.weight": rand(12, 2)}
    adapter = read(save(tmp_path, tensors))
    assert set(adapter.layers) == {f"{name}.to_out.0", f"{name}.to_q"} and adapter.base is None


def test_underscored_names_of_an_unknown_base_are_kept(tmp_path):
    path = save(tmp_path, lora("lora_unet_something_new", 6, 4))
    adapter = read(path)
    assert (set(adapter), adapter.base) == ({"unknown.lora_unet_something_new"}, None)
    assert adapter.provenance.warnings == (KEPT_NAMES,)
    about = describe(path)
    assert (about.base, about.modules[0].layers, about.modules[0].weight_shape) == (None, tuple(adapter), (6, 4))
    assert about.matched == "1 of 1 modules read by their own names"


def test_a_module_that_the_base_lacks_is_named_with_the_nearest_and_left_out_on_consent(tmp_path):
    path = save(tmp_path, lora(Q, 12, 10) | lora(Q.replace("to_q", "to_quark"), 12, 10))
    with pytest.raises(BaseMismatchError, match=r"to_quark.*nearest layer is .*to_q.*--allow-missing"):
        read(path, base=TINY)
    adapter = read(path, base=TINY, allow_missing=True)
    assert list(adapter.layers) == [TO_Q] and any("to_quark" in note for note in adapter.provenance.notes)
    assert [m.layers for m in describe(path, base=TINY).modules] == [(TO_Q,)]


def test_a_module_of_another_size_is_a_mismatch_with_both_sizes(tmp_path):
    with pytest.raises(BaseMismatchError, match=r"12x8.*12x10"):
        read(save(tmp_path, lora(Q, 12, 8)), base=TINY)


def test_nothing_matched_is_an_error_even_with_consent(tmp_path):
    with pytest.raises(BaseMismatchError):
        read(save(tmp_path, lora("lora_unet_none_of_it", 6, 4)), base=TINY, allow_missing=True)


def test_two_modules_for_one_layer_are_a_conflict(tmp_path):
    both = lora(Q, 12, 10) | lora(Q.replace("lora_unet_", "lycoris_"), 12, 10)
    with pytest.raises(ConflictError, match="same layer"):
        read(save(tmp_path, both), base=TINY)


def test_foreign_algorithms_are_named_and_left_out_on_consent(tmp_path):
    path = save(tmp_path, lora(Q, 12, 10) | module("lora_unet_mid_block_resnets_0_conv1", oft_blocks=rand(2, 3)))
    with pytest.raises(UnsupportedError, match=r"conv1.*OFT"):
        read(path, base=TINY)
    assert list(read(path, base=TINY, allow_missing=True).layers) == [TO_Q]


def test_a_peft_folder_per_component_is_one_adapter(tmp_path):
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}
    q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    text = "text_model.encoder.layers.0.self_attn.q_proj"
    peft_folder(tmp_path / "a" / "unet", config, {f"{q}.lora_A.weight": rand(2, 10), f"{q}.lora_B.weight": rand(12, 2)})
    peft_folder(
        tmp_path / "a" / "text_encoder",
        config | {"use_rslora": True},
        {f"{text}.lora_A.weight": rand(2, 4), f"{text}.lora_B.weight": rand(6, 2)},
    )
    adapter = read(tmp_path / "a", base=TINY)
    assert adapter.components == ("unet", "text_encoder")
    assert torch.allclose(adapter[TO_Q].dense(), 3 * rand(12, 2) @ rand(2, 10), atol=1e-5)
    found = adapter["text_encoder.encoder.layers.0.self_attn.q_proj"].dense()
    assert torch.allclose(found, 6 / 2**0.5 * rand(6, 2) @ rand(2, 4), atol=1e-5)
    assert describe(tmp_path / "a", base=TINY).components == ("text_encoder", "unet")


def test_peft_tensors_without_their_configuration_have_no_known_scale(tmp_path):
    name = "base_model.model.x"
    path = save(tmp_path, {f"{name}.lora_A.weight": rand(2, 4), f"{name}.lora_B.weight": rand(6, 2)})
    with pytest.raises(AmbiguousError, match=r"adapter_config\.json"):
        read(path)


def test_a_configuration_of_another_rank_is_refused(tmp_path):
    q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{q}.lora_A.weight": rand(2, 10), f"{q}.lora_B.weight": rand(12, 2)}
    with pytest.raises(ShapeError, match=r"rank 2.*states 4"):
        read(peft_folder(tmp_path / "p", {"peft_type": "LORA", "r": 4, "lora_alpha": 4}, tensors), base=TINY)


def test_other_peft_types_are_refused_by_name(tmp_path):
    with pytest.raises(UnsupportedError, match="OFT"):
        read(peft_folder(tmp_path / "p", {"peft_type": "OFT"}, {"x.oft_R.weight": rand(2, 2)}))


def test_a_folder_of_pickles_is_not_opened(tmp_path):
    (tmp_path / "pytorch_lora_weights.bin").write_bytes(b"\x80\x02")
    with pytest.raises(PickleError):
        read(tmp_path)


def test_a_folder_of_several_files_asks_which(tmp_path):
    save(tmp_path, lora(Q, 12, 10)).rename(tmp_path / "b.safetensors")
    save(tmp_path, lora(Q, 12, 10))
    with pytest.raises(AmbiguousError, match=r"adapter\.safetensors, b\.safetensors"):
        read(tmp_path)


def test_a_path_that_does_not_exist_is_not_found(tmp_path):
    with pytest.raises(NotFoundError):
        read(tmp_path / "nothing")


def test_a_checkpoint_is_no_adapter(tmp_path):
    with pytest.raises(UnrecognisedError, match="checkpoint"):
        read(save(tmp_path, {"model.diffusion_model.out.2.weight": rand(4, 4)}))


def test_an_unknown_format_suggests_the_nearest(tmp_path):
    with pytest.raises(UsageError, match="kohya-lora"):
        read(save(tmp_path, lora(Q, 12, 10)), format="kohya_lora")


def test_diffusekrona_and_old_lora_are_told_apart_or_asked_about(tmp_path):
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora"

    def pair(down, up):
        return save(tmp_path, {f"{name}.down.weight": rand(*down), f"{name}.up.weight": rand(*up)})

    assert describe(pair((2, 10), (12, 2)), base=TINY).format == "diffusers-lora"
    assert describe(pair((5, 3), (4, 2)), base=TINY).format == "diffusekrona"
    assert describe(pair((2, 3), (4, 5)), base=TINY).format == "diffusekrona"
    path = pair((2, 3), (7, 2))
    with pytest.raises(AmbiguousError, match="--from"):
        describe(path)
    assert describe(path, format="diffusekrona").format == "diffusekrona"


def test_the_weapons_file_is_a_lora_of_sd15():
    adapter = read(shared("real", "weapons_sd15_r4.safetensors"))
    assert (adapter.provenance.source_format, adapter.base.family, len(adapter)) == ("diffusers-lora", "sd15", 128)
    assert adapter.parameters - len(adapter) == 797_184  # each LoRA is [[1]] ⊗ up·down


def test_the_disney_file_is_read_by_position_with_its_two_learned_words():
    adapter = read(shared("real", "lora_disney.safetensors"))
    assert (adapter.base.family, len(adapter)) == ("sd15", 192)
    assert set(adapter.extras) == {"<s1>", "<s2>"} and adapter.provenance.trigger_words == ("<s1>", "<s2>")


def test_a_positional_file_of_another_base_is_refused():
    with pytest.raises(BaseMismatchError, match="positions"):
        read(shared("real", "lora_disney.safetensors"), base="sdxl")


def test_a_positional_file_with_a_missing_half_is_told_which(tmp_path):
    tensors = load_file(shared("golden", "cloneofsimo_r2_fp16.safetensors"))
    del tensors["unet:3:up"]
    path, base = save(tmp_path, tensors), shared("golden", "base")
    with pytest.raises(IncompleteError, match="unet:3: Missing 'up'"):
        read(path, base=base)
    assert len(read(path, base=base, allow_missing=True)) == 36 + 4 - 1


def test_the_extended_order_counts_the_resnet_blocks_in():
    modules = catalog.get("sd15").components["unet"]
    order = cloneofsimo.unet_order(modules, cloneofsimo.CLASSES | {"ResnetBlock2D"})
    resnets = [path for path in order if ".resnets." in path]
    assert len(order) - len(resnets) == 144
    assert set(resnets) == {p for p in modules if ".resnets." in p}
    first = [path.rpartition(".")[2] for path in order if path.startswith("down_blocks.1.resnets.0.")]
    assert first == ["conv1", "time_emb_proj", "conv2", "conv_shortcut"]


def test_split_qkv_is_reported(tmp_path):
    path = save(tmp_path, lora(Q, 12, 10), {"ss_network_args": json.dumps({"split_qkv": "True"})})
    assert any("split_qkv" in warning for warning in describe(path, base=TINY).warnings)


def test_a_missing_half_is_named(tmp_path):
    with pytest.raises(IncompleteError, match=rf"{Q}: Missing 'up' \(found: down\)"):
        read(save(tmp_path, {f"{Q}.lora_down.weight": rand(2, 10)}), base=TINY)
