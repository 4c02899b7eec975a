"""The tables of original names against diffusers' own converters, run on every weight of every base they know."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from krona_hub.bases import catalog, ldm_names
from krona_hub.bases.name_table import ComponentNames, table
from krona_hub.bases.original_names import ORIGINALS
from tests.bases.original_checkpoints import (
    CONVERTERS,
    PREFIX,
    convert,
    denoiser,
    original_checkpoint,
    stacked,
    stand_ins,
)  # fmt: skip

UNETS = ("sd15", "sd21", "sdxl", "sdxl-refiner")


@pytest.mark.slow
@pytest.mark.parametrize("base", CONVERTERS)
def test_diffusers_converts_the_original_names_of_a_denoiser_to_ours(base):
    component = denoiser(base)
    converted = convert(base, original_checkpoint(base, component, PREFIX.get(base, "")))
    for path, weight in stand_ins(catalog.get(base).components[component]).items():
        assert torch.equal(converted[f"{path}.weight"], weight), path


@pytest.mark.slow
@pytest.mark.parametrize("base", UNETS)
def test_diffusers_converts_the_ldm_names_of_a_unet_to_ours(base):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    checkpoint = original_checkpoint(base, "unet", "model.diffusion_model.")
    checkpoint |= {k.replace(".weight", ".bias"): v for k, v in checkpoint.items()}
    norms = (
        "out.0",
        *(f"{block}.0.{part}" for block in blocks(checkpoint) for part in ("in_layers.0", "out_layers.0")),
    )
    checkpoint |= {f"model.diffusion_model.{n}.{p}": torch.zeros(1) for n in norms for p in ("weight", "bias")}
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(catalog.component(f"{base}.unet").config))
    for path, weight in stand_ins(catalog.get(base).components["unet"]).items():
        assert torch.equal(converted[f"{path}.weight"], weight), path


def blocks(checkpoint: Mapping[str, Tensor]) -> set[str]:
    paths = (key.removeprefix("model.diffusion_model.").split(".") for key in checkpoint)
    return {".".join(path[:2]) for path in paths if path[0] in ("input_blocks", "output_blocks")}


@pytest.mark.slow
def test_diffusers_converts_openclip_names_to_ours():
    from types import SimpleNamespace

    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    modules = catalog.get("sdxl").components["text_encoder_2"]
    weights = {path: torch.randn(m.shape[0], 3) for path, m in modules.items()}
    weights["text_projection"] = torch.randn(1280, 1280)
    names = table(catalog.get("sdxl")).parts["text_encoder_2"].originals
    checkpoint = {}
    for name, places in names.items():
        key = f"conditioner.embedders.1.model.{name.removeprefix('openclip.')}"
        weight = torch.cat([weights[p.layer.partition(".")[2]] for p in places])
        weight = weight.T if places[0].transpose else weight
        suffix = {"in_proj": "_weight", "text_projection": ""}.get(name.split(".")[-1], ".weight")
        checkpoint[key + suffix] = weight
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=1280))
    converted = convert_open_clip_checkpoint(model, checkpoint, prefix="conditioner.embedders.1.model.")
    for path, weight in weights.items():
        key = path if path == "text_projection" else f"text_model.{path}"
        assert torch.equal(converted[f"{key}.weight"], weight), path


@pytest.mark.slow
def test_diffusers_reads_what_we_spell_for_sd_scripts_and_sdxl():
    """Its LoRA converter, which renames ldm blocks, on every layer of SDXL's attention in `kohya-ldm`."""
    from types import SimpleNamespace

    from diffusers.loaders import lora_conversion_utils as conversion

    base = catalog.get("sdxl")
    layers = [name for name, _ in base.layers("unet") if ".attentions." in name]
    spelled = {table(base).spell(layer, "kohya-ldm"): torch.full((1,), float(i)) for i, layer in enumerate(layers)}
    file = {f"{name}.lora_{half}.weight": value for name, value in spelled.items() for half in ("down", "up")}
    file = conversion._maybe_map_sgm_blocks_to_diffusers(file, SimpleNamespace(layers_per_block=2))
    converted, _ = conversion._convert_non_diffusers_lora_to_diffusers(file)
    assert len(converted) == 2 * len(layers) == 2 * 722
    for key, value in converted.items():
        module = key.rpartition("lora")[0].rstrip("._")  # `….to_q_lora.up.weight` or `….lora.up.weight`
        assert table(base).find(module)[0].layer == layers[int(value)]


@pytest.mark.slow
def test_diffusers_reads_what_we_spell_for_sd_scripts_and_flux():
    """Its kohya converter takes our fused FLUX names, and puts q, k and v where our row ranges say."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    base = catalog.get("flux1-dev")
    weights = stand_ins(base.components["transformer"])
    fused = table(base).fused("kohya-ldm")
    file = {}
    for name, places in fused.items():
        if name.endswith(("_qkv", "_linear1")):
            file[f"{name}.lora_up.weight"] = stacked(places, weights).double()
            file[f"{name}.lora_down.weight"] = torch.ones(1, 2).double()
            file[f"{name}.alpha"] = torch.tensor(1.0)
    converted = _convert_kohya_flux_lora_to_diffusers(file)
    ups = {k.removesuffix(".lora_B.weight"): v for k, v in converted.items() if k.endswith(".lora_B.weight")}
    assert len(ups) == 19 * 6 + 38 * 4
    for layer, up in ups.items():
        assert torch.equal(up, weights[layer.removeprefix("transformer.")].double()), layer


@pytest.mark.parametrize("name", catalog.component_names())
def test_an_original_table_covers_its_component_once_and_whole(name):
    """No row has two places, the rows of a fused module meet without a gap, and what has no place keeps its name."""
    modules = catalog.component(name).modules
    for names in ComponentNames("x", modules).spellings.values():
        filled: dict[str, list[tuple[int, int]]] = {}
        for place in (place for places in names.values() for place in places):
            height = modules[place.layer.removeprefix("x.")].shape[0]
            filled.setdefault(place.layer, []).append(place.part or (0, height))
        for layer, parts in filled.items():
            starts, ends = zip(*sorted(parts), strict=True)
            assert (*starts, modules[layer.removeprefix("x.")].shape[0]) == (0, *ends), layer
        kept = {path for path in modules if f"x.{path}" not in filled}
        assert kept.isdisjoint(names)
        for places in names.values():
            ends = [0, *(place.rows[1] for place in places if place.rows)]
            assert [place.rows[0] for place in places if place.rows] == ends[:-1]
            heights = [modules[place.layer.removeprefix("x.")].shape[0] for place in places if place.rows]
            assert heights == [place.rows[1] - place.rows[0] for place in places if place.rows]


WHOLE = ("flux1", "flux2", "flux3", "sd3", "hunyuan-video", "hunyuan-video-15", "hunyuan-image", "mochi", "krea2")


@pytest.mark.parametrize("name", catalog.component_names())
def test_some_tables_name_every_layer(name):
    modules = catalog.component(name).modules
    if ldm_names.is_unet(modules) or (modules.original and modules.original.name in WHOLE):
        names = ComponentNames("x", modules).originals
        named = {place.layer for places in names.values() for place in places}
        assert named | {"x.encoder_hid_proj"} >= {f"x.{path}" for path in modules}


def test_every_table_serves_a_base_of_the_catalog():
    served = {o.name for c in catalog.component_names() if (o := catalog.component(c).modules.original)}
    assert served == {original.name for original in ORIGINALS}


def test_the_published_counts_of_fused_names():
    """FLUX.1: 304 fused modules cover 494 Linears; ldm tables are one to one."""
    flux = table(catalog.get("flux1-dev")).parts["transformer"].originals
    in_blocks = {n: p for n, p in flux.items() if n.startswith(("double_blocks", "single_blocks"))}
    assert (len(in_blocks), sum(map(len, in_blocks.values()))) == (304, 494)
    for base, count in {"sd15": 282, "sd21": 282, "sdxl": 794, "sdxl-refiner": 554}.items():
        assert len(ldm_names.names(catalog.get(base).components["unet"])) == count


def test_only_modulations_of_two_chunks_have_swapped_halves():
    swapped = {
        place.layer
        for name in ("flux1-dev", "sd35-medium")
        for places in table(catalog.get(name)).parts["transformer"].originals.values()
        for place in places
        if place.swap_halves
    }
    assert swapped == {"transformer.norm_out.linear", "transformer.transformer_blocks.23.norm1_context.linear"}
