"""Files for ComfyUI, Forge, A1111 and sd-scripts, which cannot be installed here: their published rules, stated again.

The rules are those of FORMATS.md §6, §11 and §12: which module names the key maps hold, and what a module means. They
share nothing with the library: names come from the live models, and the products are dense.
"""

import json

import pytest
import torch
from safetensors import safe_open

from krona_hub.errors import InexpressibleError
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.writer import write
from tests import tiny
from tests.formats import made

ALL = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv_shortcut", "time_emb_proj", "ff.net.2", "fc1")


def key_map(pipe, text_prefixes) -> dict[str, str]:
    """File name of a module -> canonical layer, as ComfyUI builds it for U-Nets (the diffusers names)."""
    prefixes = {"unet": ("lora_unet_", "lycoris_"), "transformer": ("lora_transformer_",), **text_prefixes}
    names = {}
    for component, model in tiny.components(pipe).items():
        for path, module in model.named_modules():
            if hasattr(module, "weight"):
                short = path.removeprefix("text_model.")
                full = f"text_model.{short}" if component.startswith("text") else path
                for prefix in prefixes[component]:
                    names[prefix + full.replace(".", "_")] = f"{component}.{short}"
                if component == "transformer":
                    names[f"transformer.{path}"] = f"transformer.{path}"
    return names


def weight_of(parts) -> torch.Tensor:
    """ΔW as a matrix, in double precision: up·down·alpha/r, or w1 ⊗ w2 scaled where a factor is a product."""
    parts = {k: t.double() for k, t in parts.items()}
    alpha = float(parts["alpha"])
    if "lora_up.weight" in parts:
        up, down = parts["lora_up.weight"].flatten(1), parts["lora_down.weight"].flatten(1)
        return up @ down * alpha / len(down)
    rank = None
    if "lokr_w1" in parts:
        w1 = parts["lokr_w1"]
    else:
        w1, rank = parts["lokr_w1_a"] @ parts["lokr_w1_b"], len(parts["lokr_w1_b"])
    if "lokr_w2" in parts:
        w2 = parts["lokr_w2"].flatten(1)
    else:
        w2, rank = parts["lokr_w2_a"] @ parts["lokr_w2_b"].flatten(1), len(parts["lokr_w2_b"])
    return torch.kron(w1, w2.contiguous()) * (alpha / rank if rank else 1.0)


def loaded(path, names) -> dict[str, torch.Tensor]:
    """Layer -> ΔW as a matrix; fails on any key that the tool does not know."""
    modules = {}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118
            name = max((n for n in names if key.startswith(f"{n}.")), key=len, default=None)
            assert name, f"the tool ignores {key}"
            modules.setdefault(names[name], {})[key[len(name) + 1 :]] = file.get_tensor(key)
    assert all(parts["alpha"].shape == () and parts["alpha"].dtype == torch.float32 for parts in modules.values())
    return {layer: weight_of(parts) for layer, parts in modules.items()}


def assert_same(found, adapter):
    assert found.keys() == adapter.layers.keys()
    for layer, delta in adapter.layers.items():
        want = delta.dense().flatten(1).double()
        assert (found[layer] - want).norm() < 1e-6 * want.norm(), layer


ONE_TEXT = {"text_encoder": ("lora_te_", "lora_te1_")}
TWO_TEXTS = {"text_encoder": ("lora_te1_",), "text_encoder_2": ("lora_te2_",)}
ADAPTERS = {
    "lora": lambda shapes: made.lora(shapes),
    "lokr": lambda shapes: made.lokr(shapes, made.by_lycoris(4), (None, 2), (None, None, 1)),
    "lokr of unusual shape": lambda shapes: made.lokr(shapes, lambda s: (s[0] // 4, 2), (None, 1)),
    "kernels split": lambda shapes: made.lokr(
        {k: s for k, s in shapes.items() if s[2:] == (3, 3)}, lambda s: (4, s[1] * 9 // 4)
    ),
}


@pytest.mark.parametrize("kind", ADAPTERS)
@pytest.mark.parametrize("tool", ["comfyui", "forge", "a1111"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_stated_loader_finds_every_module_and_its_delta(name, tool, kind, tmp_path):
    pipe = getattr(tiny, name)()
    adapter = ADAPTERS[kind](tiny.layers(pipe, *ALL))
    report = write(adapter, tmp_path / "x.safetensors", tool=tool, base=tiny.save(pipe, tmp_path))
    assert report.format == ("kohya-lora" if kind == "lora" else "lycoris-lokr")
    names = key_map(pipe, ONE_TEXT if name == "sd15" else TWO_TEXTS)
    assert_same(loaded(report.path, names), adapter)


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_comfyui_finds_the_transformer_of_flux_by_its_diffusers_names(kind, tmp_path):
    pipe = tiny.flux()
    adapter = made.only(ADAPTERS[kind](tiny.layers(pipe, *ALL)), "transformer")
    report = write(adapter, tmp_path / "x.safetensors", tool="comfyui", base=tiny.save(pipe, tmp_path))
    assert_same(loaded(report.path, key_map(pipe, ONE_TEXT)), adapter)


def test_sd_scripts_gets_fused_projections_under_its_own_names(tmp_path):
    pipe = tiny.flux()
    shapes = {k: s for k, s in tiny.layers(pipe, "attn.to_q", "attn.to_k", "attn.to_v").items() if "single" not in k}
    adapter = made.lora(shapes, ranks=(3, 2))
    report = write(adapter, tmp_path / "x.safetensors", tool="kohya", base=tiny.save(pipe, tmp_path))
    fused = loaded(report.path, {"lora_unet_double_blocks_0_img_attn_qkv": "qkv"})["qkv"]
    parts = [adapter.layers[f"transformer.transformer_blocks.0.attn.to_{x}"].dense().double() for x in "qkv"]
    assert (fused - torch.cat(parts)).norm() < 1e-6 * fused.norm()


def test_fused_projections_come_back_with_the_rank_of_each(tmp_path):
    pipe = tiny.flux()
    adapter = made.lora(tiny.layers(pipe, "attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"), ranks=(3, 2))
    base = tiny.save(pipe, tmp_path)
    back = read(write(adapter, tmp_path / "x.safetensors", tool="kohya", base=base).path, base=base)
    assert {k: d.sums[0].right.rank for k, d in back.layers.items()} == {
        k: d.sums[0].right.rank for k, d in adapter.layers.items()
    }


def test_fused_projections_of_which_only_some_are_adapted_hold_zeros_for_the_others(tmp_path):
    pipe = tiny.flux()
    adapter = made.lora(tiny.layers(pipe, "attn.to_q", "attn.to_k"), ranks=(3, 2))
    base = tiny.save(pipe, tmp_path)
    back = read(write(adapter, tmp_path / "x.safetensors", tool="kohya", base=base).path, base=base)
    assert back.layers.keys() > adapter.layers.keys()
    for layer, delta in back.layers.items():
        meant = adapter.layers[layer].dense() if layer in adapter.layers else torch.zeros(delta.weight_shape)
        torch.testing.assert_close(delta.dense(), meant, rtol=1e-5, atol=1e-7)


def test_split_projections_are_written_on_request_under_the_names_that_most_applications_find(tmp_path):
    pipe = tiny.flux()
    adapter, base = made.lora(tiny.layers(pipe, "attn.to_q", "attn.to_k")), tiny.save(pipe, tmp_path)
    report = write(adapter, tmp_path / "x.safetensors", format="kohya-lora", base=base, split_qkv=True)
    names = {layer: layer for layer in adapter.layers}
    assert all(layer.startswith("transformer.") for layer in names)
    assert_same(loaded(report.path, names), adapter)
    found = key_map(pipe, ONE_TEXT)
    assert {name: found[name] for name in names} == names, "as ComfyUI finds them"


def test_a_lokr_whose_projections_do_not_fuse_offers_what_does(tmp_path):
    pipe = tiny.flux()
    adapter = made.lokr(tiny.layers(pipe, "attn.to_q", "attn.to_k"), made.by_lycoris(4))
    path = tmp_path / "x.safetensors"
    with pytest.raises(InexpressibleError, match=r"LoRA only.*--to lora"):
        write(adapter, path, tool="kohya", base=tiny.save(pipe, tmp_path))
    assert not path.exists()


@pytest.mark.parametrize(
    ("tool", "name"), [("comfyui", "sd15"), ("a1111", "sd15"), ("forge", "sd15"), ("nunchaku", "flux")]
)
def test_tools_that_compute_dora_otherwise_are_refused(tool, name, tmp_path):
    pipe = getattr(tiny, name)()
    plain = made.lora(tiny.layers(pipe, "to_q", "to_k", "to_v"))
    adapter = made.as_dora(plain, lambda layer: tiny.module_of(pipe, layer).weight)
    with pytest.raises(InexpressibleError, match="DoRA"):
        write(adapter, tmp_path / "x.safetensors", tool=tool, base=tiny.save(pipe, tmp_path))
    assert not (tmp_path / "x.safetensors").exists()


def test_the_metadata_that_kohyas_tools_look_for_is_there_and_stale_hashes_are_not(tmp_path):
    from dataclasses import replace

    pipe = tiny.sd15()
    adapter = made.lora(tiny.layers(pipe, "to_q"), ranks=(4,))
    source = {"ss_epoch": "7", "ss_network_dim": "128", "sshs_model_hash": "0" * 64, "modelspec.hash_sha256": "0x0"}
    adapter = replace(adapter, provenance=replace(adapter.provenance, metadata=source, trigger_words=("duck toy",)))
    report = write(adapter, tmp_path / "x.safetensors", tool="kohya", base=tiny.save(pipe, tmp_path))
    with safe_open(report.path, "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_network_module"] == "networks.lora"
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"], metadata["ss_epoch"]) == ("4", "4.0", "7")
    assert metadata["modelspec.trigger_phrase"] == "duck toy"
    assert not any("hash" in key for key in metadata), json.dumps(metadata)
