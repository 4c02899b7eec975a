"""Any checkpoint is a base model: one of an architecture that the catalog does not list has the names of its file."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from krona_hub.bases import loading
from krona_hub.bases.name_table import table
from krona_hub.cli.main import main
from krona_hub.conversion import convert
from krona_hub.errors import BaseMismatchError, UnknownBaseError, UnsupportedError
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.reader import read
from krona_hub.merging.api import merge
from krona_hub.verification import validate, verify

WEIGHTS = {"fancy.0.attn.q": (24, 16), "fancy.0.attn.to_out": (16, 24), "fancy.1.ff_up": (24, 10), "stem": (6, 4, 3, 3)}
SPLITS = {"fancy.0.attn.q": (3, 2), "fancy.0.attn.to_out": (2, 4), "fancy.1.ff_up": (4, 5), "stem": (2, 2)}
WRAPPERS = ("", "model.diffusion_model.", "diffusion_model.", "net.", "model.", "transformer.")


def rand(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.3


def checkpoint(path, wrapper="", more=None, dtype=torch.float32):
    tensors = {f"{wrapper}{name}.weight": rand(i, *shape) for i, (name, shape) in enumerate(WEIGHTS.items())}
    tensors |= {f"{wrapper}fancy.0.attn.q.bias": rand(9, 24), f"{wrapper}fancy.0.norm.weight": rand(8, 16)}
    tensors |= {f"{wrapper}fancy.0.table": rand(7, 2, 5)}
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()} | (more or {}), path)
    return path


def lokr(path, prefix="lora_unet_", alpha=3.0):
    """A LoKr of rank 2 and alpha 3 with a bias and a norm; module of the base -> dense delta."""
    tensors, deltas = {}, {}
    for seed, (module, (out, cols, *kernel)) in enumerate(WEIGHTS.items(), 20):
        (a1, a2), size = SPLITS[module], cols * torch.tensor([*kernel, 1]).prod().item()
        w1, up, down = rand(seed, a1, a2), rand(seed, out // a1, 2), rand(seed, 2, size // a2)
        name = prefix + (module.replace(".", "_") if prefix.endswith("_") else module)
        tensors |= {f"{name}.lokr_w1": w1, f"{name}.lokr_w2_a": up, f"{name}.lokr_w2_b": down}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        w2 = (up.double() @ down.double()).reshape(out // a1, cols // a2, -1)
        dense = alpha / 2 * torch.einsum("ij,klm->ikjlm", w1.double(), w2).reshape(out, cols, *kernel)
        deltas[module] = dense
    save_file(tensors, path)
    return deltas


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_checkpoint_of_an_unknown_architecture_has_its_own_names(wrapper, tmp_path):
    base = loading.load_base(checkpoint(tmp_path / "new.safetensors", wrapper))
    assert {name: m.shape for name, m in base.layers()} == {f"transformer.{n}": s for n, s in WEIGHTS.items()}
    assert (base.family, base.candidates) == (None, ())
    assert base.parameter("transformer.fancy.0.norm.weight") == (16,)
    assert base.parameter("transformer.fancy.0.table") == (2, 5)
    for name in ("diffusion_model.fancy.1.ff_up", "lora_unet_fancy_1_ff_up", "transformer.fancy.1.ff_up",
                 "lycoris_fancy_1_ff_up", "base_model.model.fancy.1.ff_up", "fancy.1.ff_up"):  # fmt: skip
        assert [p.layer for p in table(base).find(name)] == ["transformer.fancy.1.ff_up"]


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", "lycoris_"])
def test_merging_into_it_gives_the_dense_sum(wrapper, prefix, tmp_path):
    base = checkpoint(tmp_path / "new.safetensors", wrapper)
    deltas = lokr(tmp_path / "a.safetensors", prefix)
    out = tmp_path / "merged.safetensors"
    assert main(["merge", str(base), f"{tmp_path / 'a.safetensors'}:0.8", "-o", str(out)]) == 0
    before, after = load_file(base), load_file(out)
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        delta = deltas.get(name.removeprefix(wrapper).removesuffix(".weight"))
        wanted = tensor if delta is None else (tensor.double() + 0.8 * delta).float()
        torch.testing.assert_close(
            after[name], wanted, rtol=0 if delta is None else 1e-6, atol=0 if delta is None else 1e-6
        )
    assert verify(out, base=base, adapters=[(tmp_path / "a.safetensors", 0.8)]).same


def test_beside_a_vae_the_denoiser_is_the_base(tmp_path):
    more = {"first_stage_model.decoder.conv_in.weight": rand(1, 4, 4, 3, 3)}
    path = checkpoint(tmp_path / "new.safetensors", "model.diffusion_model.", more)
    assert {name for name, _ in loading.load_base(path).layers()} == {f"transformer.{n}" for n in WEIGHTS}
    lokr(tmp_path / "a.safetensors")
    merge(path, [(tmp_path / "a.safetensors", 1.0)], tmp_path / "m.safetensors")
    after = load_file(tmp_path / "m.safetensors")
    assert torch.equal(after["first_stage_model.decoder.conv_in.weight"], rand(1, 4, 4, 3, 3))


def test_similar_names_are_told_apart_by_their_dots(tmp_path):
    tensors = {"a.b_c.weight": rand(1, 4, 6), "a_b.c.weight": rand(2, 4, 6)}
    save_file(tensors, tmp_path / "new.safetensors")
    pair = {
        "diffusion_model.a.b_c.lora_down.weight": rand(3, 2, 6),
        "diffusion_model.a.b_c.lora_up.weight": rand(4, 4, 2),
    }
    save_file(pair, tmp_path / "a.safetensors")
    merge(tmp_path / "new.safetensors", [(tmp_path / "a.safetensors", 1.0)], tmp_path / "m.safetensors")
    after = load_file(tmp_path / "m.safetensors")
    assert torch.equal(after["a_b.c.weight"], tensors["a_b.c.weight"])
    down, up = pair.values()
    torch.testing.assert_close(after["a.b_c.weight"], tensors["a.b_c.weight"] + up @ down)


def test_an_adapter_is_read_and_converted_with_it(tmp_path):
    base = checkpoint(tmp_path / "new.safetensors", "net.")
    deltas = lokr(tmp_path / "a.safetensors", "diffusion_model.")
    adapter = read(tmp_path / "a.safetensors", base=base)
    assert adapter["transformer.stem"].weight_shape == WEIGHTS["stem"]  # the file alone does not tell the kernel
    out = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="lora", exact=True, base=base).out
    assert load_file(out)["lora_unet_stem.lora_down.weight"].shape[1:] == (4, 3, 3)
    again = read(out, base=base)
    for name, dense in deltas.items():
        torch.testing.assert_close(again[f"transformer.{name}"].dense().double(), dense, rtol=1e-5, atol=1e-5)
    assert validate(out, base=base).valid


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_a_native_file_of_kept_names_finds_its_base(prefix, tmp_path):
    base = checkpoint(tmp_path / "new.safetensors")
    deltas = lokr(tmp_path / "a.safetensors", prefix)
    native = convert(tmp_path / "a.safetensors", tmp_path / "n.safetensors", to="krona", exact=True).out
    adapter = read(native, base=base)
    assert set(adapter) == {f"transformer.{name}" for name in WEIGHTS}
    assert adapter["transformer.stem"].weight_shape == WEIGHTS["stem"] and adapter.base is not None
    assert validate(native, base=base).valid
    merge(base, [(native, 1.0)], tmp_path / "m.safetensors")
    before, after = load_file(base), load_file(tmp_path / "m.safetensors")
    for name, delta in deltas.items():
        wanted = (before[f"{name}.weight"].double() + delta).float()
        torch.testing.assert_close(after[f"{name}.weight"], wanted, rtol=1e-6, atol=1e-6)


def test_a_native_file_of_kept_names_does_not_fit_a_base_with_none_of_them(tmp_path):
    lokr(tmp_path / "a.safetensors", "diffusion_model.")
    native = convert(tmp_path / "a.safetensors", tmp_path / "n.safetensors", to="krona", exact=True).out
    assert describe(native, base=checkpoint(tmp_path / "new.safetensors")).mismatch is None
    refusal = describe(native, base="sdxl").mismatch
    assert isinstance(refusal, BaseMismatchError) and "not an adapter of sdxl: 0 of 4 modules fit" in str(refusal)


def test_a_component_folder_with_unknown_names(tmp_path):
    folder = tmp_path / "new"
    folder.mkdir()
    checkpoint(folder / "model.safetensors")
    deltas = lokr(tmp_path / "a.safetensors")
    merge(folder, [(tmp_path / "a.safetensors", 1.0)], tmp_path / "m")
    after, before = load_file(tmp_path / "m" / "model.safetensors"), load_file(folder / "model.safetensors")
    for name, delta in deltas.items():
        wanted = (before[f"{name}.weight"].double() + delta).float()
        torch.testing.assert_close(after[f"{name}.weight"], wanted, rtol=1e-6, atol=1e-6)
    checkpoint(folder / "model.safetensors", "net.")
    with pytest.raises(UnknownBaseError, match="Specify the file"):
        merge(folder, [(tmp_path / "a.safetensors", 1.0)], tmp_path / "m2")


@pytest.mark.parametrize(
    ("config", "component", "layer"),
    [
        ({"_class_name": "FluxTransformer2DModel", "num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2,
          "attention_head_dim": 8, "axes_dims_rope": [2, 2, 4]}, "transformer", "x_embedder"),
        ({"architectures": ["CLIPTextModel"], "model_type": "clip_text_model", "hidden_size": 8, "num_hidden_layers": 1,
          "num_attention_heads": 2, "intermediate_size": 12}, "text_encoder", "encoder.layers.0.mlp.fc1"),
    ],
)  # fmt: skip
def test_a_folder_with_only_a_configuration(config, component, layer, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    base = loading.load_base(tmp_path)
    assert base.module(f"{component}.{layer}") is not None


def test_what_is_no_model_and_what_is_quantized_is_refused(tmp_path):
    lokr(tmp_path / "a.safetensors")
    with pytest.raises(
        UnknownBaseError, match=r"not a checkpoint.*--base: a catalog name, a Hub id, a checkpoint file"
    ):
        loading.load_base(tmp_path / "a.safetensors")
    packed = {"fancy.0.attn.q.SCB": torch.ones(3)}
    base = checkpoint(tmp_path / "new.safetensors", more=packed)
    with pytest.raises(UnsupportedError, match="quantized"):
        merge(base, [(tmp_path / "a.safetensors", 1.0)], tmp_path / "m.safetensors")


def test_a_unet_is_called_one(tmp_path):
    names = ("input_blocks.0.0", "middle_block.0.q", "output_blocks.0.0")
    save_file({f"{name}.weight": rand(1, 4, 6) for name in names}, tmp_path / "new.safetensors")
    assert loading.load_base(tmp_path / "new.safetensors").denoiser == "unet"


def test_vectors_and_adapters_in_memory_find_the_base_by_their_kept_names(tmp_path):
    base = checkpoint(tmp_path / "new.safetensors", "net.")
    lokr(tmp_path / "a.safetensors")
    vectors = {"lora_unet_fancy_0_norm.w_norm": rand(1, 16), "lora_unet_fancy_0_attn_q.diff_b": rand(2, 24)}
    save_file(load_file(tmp_path / "a.safetensors") | vectors, tmp_path / "a.safetensors")
    native = convert(tmp_path / "a.safetensors", tmp_path / "n.safetensors", to="krona", exact=True).out
    merged = []
    for i, source in enumerate((tmp_path / "a.safetensors", native, read(native))):
        merge(base, [(source, 1.0)], tmp_path / f"{i}.safetensors")
        merged.append(load_file(tmp_path / f"{i}.safetensors"))
    before = load_file(base)
    for after in merged:
        assert torch.equal(after["net.fancy.0.norm.weight"], before["net.fancy.0.norm.weight"] + rand(1, 16))
        assert torch.equal(after["net.fancy.0.attn.q.bias"], before["net.fancy.0.attn.q.bias"] + rand(2, 24))
        assert all(torch.equal(tensor, merged[0][name]) for name, tensor in after.items())


def test_a_live_model_takes_an_adapter_of_kept_names(tmp_path):
    from krona_hub.pipelines.load_adapter import load_into

    class Fancy(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = torch.nn.Linear(6, 4, bias=False)

        def forward(self, x):
            return self.block(x)

    down, up = rand(3, 2, 6), rand(4, 4, 2)
    save_file(
        {"lora_unet_block.lora_down.weight": down, "lora_unet_block.lora_up.weight": up}, tmp_path / "a.safetensors"
    )
    for source in (tmp_path / "a.safetensors", read(tmp_path / "a.safetensors")):
        model = Fancy()
        x = rand(5, 3, 6)
        plain = model(x)
        load_into(model, source, component="transformer")
        torch.testing.assert_close(model(x), plain + x @ (up @ down).T)
