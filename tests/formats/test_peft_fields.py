"""Fields of a PEFT configuration that change ΔW: honored as peft itself merges them, or refused by name."""

import dataclasses
import json

import pytest
import torch
from peft import LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from krona_hub import load_into, merge, read
from krona_hub.bases.loading import load_base
from krona_hub.errors import UnknownBaseError, UnsupportedError
from krona_hub.formats.parsing.peft_fields import HONORED, OTHER_PRODUCTS
from krona_hub.formats.reading.describe import describe
from tests import tiny
from tests.formats.files_on_disk import Q, peft_folder, rand

RANK, ALPHA = 3, 5
TARGETS = ["to_q", "to_k", "ff.net.0.proj"]  # square, and rectangular: to_k of the cross attention, the feed-forward


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(tiny.sd15(), tmp_path_factory.mktemp("base") / "sd15")


def unet(dtype=torch.float32):
    return tiny.sd15().unet.to(dtype)


def trained(folder, dtype=torch.float32, **options):
    """A PEFT folder with factors that have moved since they were initialized."""
    torch.manual_seed(3)
    options = {"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS, **options}
    model = get_peft_model(unet(dtype), LoraConfig(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(str(folder))
    return folder


def merged_by_peft(folder, dtype=torch.float32):
    return PeftModel.from_pretrained(unet(dtype), str(folder)).merge_and_unload().state_dict()


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


OPTIONS = [
    {"init_lora_weights": "pissa"},
    {"init_lora_weights": "olora"},
    {"init_lora_weights": "pissa", "use_rslora": True},
    {"init_lora_weights": "pissa", "use_dora": True},
    {"init_lora_weights": "orthogonal", "r": 4},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_deltas_are_those_that_peft_merges(options, base, tmp_path):
    folder = trained(tmp_path / "adapter", **options)
    adapter = read(folder, base=base, component="unet")
    merged, plain = merged_by_peft(folder), unet().state_dict()
    assert len(adapter) == sum(not torch.equal(merged[k], plain[k]) for k in plain)
    for layer, delta in adapter.items():
        key = layer.removeprefix("unet.") + ".weight"
        assert relative(delta.dense(plain[key]), merged[key] - plain[key]) < 1e-5, layer


@pytest.mark.parametrize("kind", ["pissa", "olora"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_factors_in_half_precision_do_not_round_the_first_factors(kind, dtype, base, tmp_path):
    """The same file with its factors rounded differs by what that changes in s·BA alone."""
    folder = trained(tmp_path / "adapter", init_lora_weights=kind)
    path = folder / "adapter_model.safetensors"
    factors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(factors, path)
    exact = {name: tensor.double() for name, tensor in factors.items()}
    plain = unet().state_dict()
    for layer, delta in read(folder, base=base, component="unet").items():
        name = f"base_model.model.{layer.removeprefix('unet.')}"
        product = ALPHA / RANK * exact[f"{name}.lora_B.weight"] @ exact[f"{name}.lora_A.weight"]
        weight = plain[f"{layer.removeprefix('unet.')}.weight"]  # in float32, as peft: σ₃ and σ₄ lie close together
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        q, r = torch.linalg.qr(weight)
        first = u[:, :RANK] * s[:RANK] @ vh[:RANK] if kind == "pissa" else ALPHA / RANK * q[:, :RANK] @ r[:RANK]
        assert relative(delta.dense(), product - first) < 1e-5, layer


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_a_half_precision_base_differs_by_its_rounding_only(kind, tmp_path):
    """peft rounds the reduced base to bfloat16, too: twice half a unit in the last place of the base weight."""
    pipe = tiny.sd15()
    pipe.unet.to(torch.bfloat16)
    base = tiny.save(pipe, tmp_path / "base")
    folder = trained(tmp_path / "adapter", torch.bfloat16, init_lora_weights=kind)
    merged, plain = merged_by_peft(folder, torch.bfloat16), pipe.unet.state_dict()
    for layer, delta in read(folder, base=base, component="unet").items():
        key = layer.removeprefix("unet.") + ".weight"
        apart = (plain[key].double() + delta.dense().double() - merged[key].double()).abs().max()
        largest = max(float(plain[key].abs().max()), float(merged[key].abs().max()))
        assert apart <= 2 * 2**-8 * largest, layer


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_merging_and_loading_know_the_base_weights(kind, base, tmp_path):
    folder = trained(tmp_path / "adapter", init_lora_weights=kind)
    wanted = merged_by_peft(folder)
    merge(base, [(folder, 1.0)], tmp_path / "merged", component="unet")
    from diffusers import UNet2DConditionModel

    merged = UNet2DConditionModel.from_pretrained(tmp_path / "merged", subfolder="unet").state_dict()
    assert all(torch.allclose(merged[key], wanted[key], atol=1e-5) for key in wanted)
    pipe = tiny.sd15()
    before = tiny.output(pipe.unet)
    load_into(pipe, folder, component="unet")
    loaded = tiny.output(pipe.unet)
    reference = tiny.sd15()
    reference.unet.load_state_dict(wanted)
    assert torch.allclose(loaded, tiny.output(reference.unet), atol=1e-4)
    assert not torch.allclose(loaded, before, atol=1e-3)


@pytest.mark.parametrize("kind", ["pissa", "olora"])
def test_without_base_weights_such_a_file_is_refused_and_described(kind, base, tmp_path):
    folder = trained(tmp_path / "adapter", init_lora_weights=kind)
    with pytest.raises(UnknownBaseError, match=rf"init_lora_weights is {kind}.*path_initial_model"):
        read(folder, component="unet")
    about = describe(folder, base=base, component="unet")
    assert any("subtracted from the base weights" in warning for warning in about.warnings)
    with pytest.raises(UnknownBaseError, match="--base"):  # names and shapes alone do not suffice
        read(folder, base=load_base(base), component="unet", allow_missing=True)


@pytest.mark.parametrize("kind", ["pissa_niter_4", "loftq", "corda", "lora_ga", "tomorrow"])
def test_initializations_that_are_no_function_of_the_base_are_refused(kind, base, tmp_path):
    with pytest.raises(UnsupportedError, match=rf"init_lora_weights '{kind}'.*path_initial_model"):
        read(configured(tmp_path, init_lora_weights=kind), base=base)


@pytest.mark.parametrize("field", OTHER_PRODUCTS)
def test_other_products_are_refused_by_name(field, tmp_path):
    with pytest.raises(UnsupportedError, match=rf"sets {field}.*{OTHER_PRODUCTS[field][:20]}"):
        read(configured(tmp_path, **{field: {"a": 1}}))


def test_an_unknown_field_with_a_value_is_noted(tmp_path):
    about = describe(configured(tmp_path, from_tomorrow=2, also_new="", peft_version="9"))
    assert [w for w in about.warnings if "from_tomorrow" in w and "also_new" not in w and "peft_version" not in w]


def test_every_field_of_the_installed_peft_is_known():
    fields = {f.name for config in (LoraConfig, LoKrConfig) for f in dataclasses.fields(config)}
    assert fields <= HONORED | OTHER_PRODUCTS.keys()


def test_diffusers_metadata_with_such_an_initialization_is_refused(tmp_path):
    config = {"unet.r": RANK, "unet.lora_alpha": ALPHA, "unet.init_lora_weights": "pissa"}
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": rand(RANK, 10), f"{name}.lora_B.weight": rand(12, RANK)}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    with pytest.raises(UnsupportedError, match="pissa"):
        read(tmp_path / "x.safetensors")


def configured(folder, **fields):
    """A PEFT LoRA of one layer whose configuration sets these fields."""
    name = Q.removeprefix("lora_unet_").replace("mid_block_attentions_0_transformer_blocks_0_attn1_to_q",
                                                "mid_block.attentions.0.transformer_blocks.0.attn1.to_q")  # fmt: skip
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, **fields}
    peft_folder(
        folder / "adapter", config, {f"{name}.lora_A.weight": rand(RANK, 10), f"{name}.lora_B.weight": rand(12, RANK)}
    )
    return folder / "adapter"
