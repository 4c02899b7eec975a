"""A LoKr of fused modules, converted for an application that fuses them, comes out as it came."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from krona_hub import convert
from krona_hub.errors import InexpressibleError
from tests.shared import shared

BASE = "flux2-klein-9b"
QKV = "diffusion_model.double_blocks.0.img_attn.qkv"


def wild():
    return shared("wild", "files", "flux2_klein9b_aitoolkit_fused_lokr.safetensors")


def factors(path):
    return {
        k: t for k, t in load_file(path).items() if not k.endswith(".alpha")
    }  # where both are full, it means nothing


def assert_equal(found, wanted):
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.equal(found[key], tensor), key


def test_a_wild_file_is_written_back_bit_for_bit_directly_and_from_the_native_format(tmp_path):
    direct, native, back = (tmp_path / f"{name}.safetensors" for name in ("direct", "native", "back"))
    report = convert(wild(), base=BASE, tool="comfyui", out=direct)
    assert report.relative_error == 0 and report.target_format == "lycoris-lokr"
    assert_equal(factors(direct), factors(wild()))
    convert(wild(), base=BASE, to="krona", out=native)
    convert(native, tool="comfyui", out=back)
    assert_equal(factors(back), factors(wild()))


def test_the_dtype_is_that_of_the_fused_module(tmp_path):
    out = tmp_path / "out.safetensors"
    convert(wild(), base=BASE, tool="comfyui", out=out, dtype="float32")
    assert_equal(factors(out), {key: tensor.float() for key, tensor in factors(wild()).items()})


def lokr(random, scale):
    """A fused module of rank 2, with alpha other than the rank; its rows do not divide q, k and v."""

    def rand(*shape):
        return torch.randn(*shape, generator=random)

    halves = {f"{QKV}.lokr_w2_a": rand(192, 2), f"{QKV}.lokr_w2_b": rand(2, 64)}
    return {f"{QKV}.lokr_w1": rand(64, 64), **halves, f"{QKV}.alpha": torch.tensor(2 * scale)}


def test_a_low_rank_factor_stays_low_rank_and_the_scale_is_folded_in_once(tmp_path):
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    stored = lokr(torch.Generator().manual_seed(0), 0.3)
    save_file(stored, source)
    convert(source, base=BASE, tool="comfyui", out=out)
    wanted = {**stored, f"{QKV}.lokr_w1": stored[f"{QKV}.lokr_w1"] * 0.3, f"{QKV}.alpha": torch.tensor(2.0)}
    found = load_file(out)
    assert found.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert torch.allclose(found[key], tensor, rtol=1e-6), key


@pytest.fixture
def separate(tmp_path):
    """A file of q, k and v as LoKr modules of their own, in the diffusers names."""
    random = torch.Generator().manual_seed(0)
    tensors = {
        f"transformer.transformer_blocks.0.attn.to_{x}.lokr_w{i}": torch.randn(64, 64, generator=random)
        for x in "qkv"
        for i in (1, 2)
    }
    save_file(tensors, tmp_path / "separate.safetensors")
    return tmp_path / "separate.safetensors"


def test_separate_projections_stay_apart_for_an_application_that_finds_them(separate, tmp_path):
    out = tmp_path / "out.safetensors"
    report = convert(separate, base=BASE, tool="comfyui", out=out)
    assert report.relative_error == 0 and report.target_format == "lycoris-lokr"
    assert_equal(factors(out), factors(separate))


def test_separate_projections_are_refused_by_name_for_one_that_only_finds_the_fused_module(separate, tmp_path):
    with pytest.raises(InexpressibleError, match=r"lora_unet_double_blocks_0_img_attn_qkv fuses 3 projections"):
        convert(separate, base=BASE, tool="musubi", out=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
