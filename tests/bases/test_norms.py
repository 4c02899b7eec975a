"""Norms, biases and bare parameters of base models: none is forgotten, and each is found in every dialect."""

import pytest

from krona_hub.bases import catalog, ldm_names
from krona_hub.bases.component import Component
from krona_hub.bases.module_spec import ModuleSpec, OtherParameters, Placement
from krona_hub.bases.name_patterns import encode_module, parse_module
from krona_hub.bases.name_table import DIALECTS, table
from krona_hub.errors import InexpressibleError, NotFoundError

CATALOG = catalog.component_names()


def vectors(component: Component) -> list[str]:
    """The parameters that are vectors: biases of layers, norms and bare parameters."""
    biases = [f"{path}.bias" for path, module in component.items() if module.bias]
    norms = {path: module for path, module in component.norms.items() if path not in component.bare}
    inside = [f"{path}.{part}" for path, module in norms.items() for part in ("weight", "bias")[: 1 + module.bias]]
    return [*biases, *inside, *component.bare]


@pytest.mark.slow
@pytest.mark.parametrize("name", CATALOG)
def test_every_parameter_of_a_model_is_exactly_one_of_the_kinds(name):
    """A weight of a layer, a vector of the known shape, or an embedding."""
    import torch

    from krona_hub.bases.meta_device import build

    entry = catalog.component(name)
    model = build(entry.library, entry.class_name, entry.config)
    tables = {f"{path}.weight" for path, module in model.named_modules() if isinstance(module, torch.nn.Embedding)}
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters(remove_duplicate=False) if n not in tables}
    shapes = {n.removeprefix("text_model."): shape for n, shape in shapes.items()}
    weights = {f"{path}.weight": module.shape for path, module in entry.modules.items()}
    known = {path: entry.modules.parameter(path) for path in vectors(entry.modules)}
    assert not weights.keys() & known.keys()
    assert weights | known == shapes
    assert all(entry.modules.parameter(path) is None for path in weights)


@pytest.mark.parametrize("name", catalog.names())
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_vector_is_found_again_by_the_name_it_is_given(dialect, name):
    base = catalog.get(name)
    names = table(base)
    for component, part in base.components.items():
        for path in (*part, *part.norms):
            layer = f"{component}.{path}"
            try:
                spelled = names.vector_name(layer, dialect)
            except InexpressibleError:
                assert dialect == "processor"
                continue
            places = names.vector_places(spelled, component)
            assert layer in [place.layer for place in places]
            if path in part:
                assert (spelled, places) == (names.spell(layer, dialect), names.find(spelled, component))
            else:
                assert places == (Placement(layer),)
                assert names.find(spelled, component) is None, "only modules have deltas of weights"


@pytest.mark.parametrize("name", catalog.names())
def test_underscored_names_of_norms_never_collide(name):
    for part in table(catalog.get(name)).parts.values():
        names = [*part.modules, *part.modules.norms, *part.originals, *part.norm_homes.values()]
        owners: dict[str, set[str]] = {}
        for known in names:
            places = part.find_vector(known)
            owners.setdefault(known.replace(".", "_"), set()).add(places[0].layer)
        assert all(len(layers) == 1 for layers in owners.values())
        assert all(part.find_vector(path)[0].layer == f"{part.component}.{path}" for path in part.modules.norms)


SEEN = {  # name in a file -> base, path of the norm, layer or bare parameter
    "lora_unet_down_blocks_0_resnets_0_norm1": ("sdxl", "unet.down_blocks.0.resnets.0.norm1"),
    "lora_unet_input_blocks_1_0_in_layers_0": ("sdxl", "unet.down_blocks.0.resnets.0.norm1"),
    "lora_unet_output_blocks_8_0_out_layers_0": ("sdxl", "unet.up_blocks.2.resnets.2.norm2"),
    "lora_unet_middle_block_1_transformer_blocks_0_norm3":
        ("sdxl", "unet.mid_block.attentions.0.transformer_blocks.0.norm3"),
    "model.diffusion_model.out.0": ("sd15", "unet.conv_norm_out"),
    "lora_te1_text_model_encoder_layers_3_layer_norm1": ("sdxl", "text_encoder.encoder.layers.3.layer_norm1"),
    "lora_te2_text_model_final_layer_norm": ("sdxl", "text_encoder_2.final_layer_norm"),
    "lora_te3_encoder_block_0_layer_1_layer_norm": ("flux1-dev", "text_encoder_2.encoder.block.0.layer.1.layer_norm"),
    "base_model.model.transformer_blocks.0.attn.norm_added_q":
        ("flux1-dev", "transformer.transformer_blocks.0.attn.norm_added_q"),
    "lora_unet_conv_in": ("sd15", "unet.conv_in"),
    "diffusion_model.double_stream_blocks.0.block.ff_i.gate":
        ("hidream-i1", "transformer.double_stream_blocks.0.block.ff_i.gate.weight"),
    "diffusion_model.scale_shift_table": ("pixart-sigma-xl", "transformer.scale_shift_table"),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_names_of_vectors_that_files_have_are_found(name):
    base, path = SEEN[name]
    assert table(catalog.get(base)).vector_places(name) == (Placement(path),)


def test_the_bias_of_a_fused_module_has_rows_as_its_weight():
    names = table(catalog.get("flux1-dev"))
    for name in ("lora_unet_double_blocks_0_img_attn_qkv", "diffusion_model.single_blocks.3.linear1"):
        assert names.vector_places(name) == names.find(name)
        assert [place.rows for place in names.vector_places(name)][:2] == [(0, 3072), (3072, 6144)]


def test_parameters_of_a_base_have_shapes():
    sdxl, wan, flux = (catalog.get(name) for name in ("sdxl", "wan21-t2v-14b", "flux1-dev"))
    assert sdxl.parameter("unet.conv_in.bias") == (320,)
    assert sdxl.parameter("unet.up_blocks.0.resnets.0.norm1.weight") == (2560,)
    assert sdxl.parameter("unet.up_blocks.0.resnets.0.norm1.bias") == (2560,)
    assert wan.parameter("transformer.blocks.39.scale_shift_table") == (1, 6, 5120)
    assert wan.parameter("transformer.scale_shift_table") == (1, 2, 5120)
    lacking = (
        "transformer.transformer_blocks.0.attn.norm_q.bias", "transformer.transformer_blocks.0.attn.to_q.weight",
        "transformer.transformer_blocks.0.norm1.weight", "transformer", "", "unet.conv_in.bias", "transformer.weight",
    )  # fmt: skip
    assert flux.parameter("transformer.transformer_blocks.0.attn.norm_q.weight") == (128,)
    assert [flux.parameter(name) for name in lacking] == [None] * len(lacking)


def test_an_unknown_norm_is_an_error():
    names = table(catalog.get("sdxl"))
    assert names.vector_places("lora_unet_down_blocks_0_resnets_0_norm9") is None
    with pytest.raises(NotFoundError):
        names.vector_name("unet.down_blocks.0.resnets.0.norm9", "kohya")


@pytest.mark.parametrize("base", ["sd15", "sd21", "sdxl", "sdxl-refiner", "tiny-scenes"])
def test_every_norm_of_a_unet_has_an_ldm_name(base):
    unet = catalog.get(base).components["unet"]
    named = ldm_names.names(unet, unet.norms)
    assert {place.layer for places in named.values() for place in places} == set(unet.norms)
    assert not named.keys() & ldm_names.names(unet).keys()


def test_norms_are_loaded_when_they_are_needed():
    calls = []

    def others() -> OtherParameters:
        calls.append(1)
        return OtherParameters({"norm": ModuleSpec((4,))})

    component = Component({"proj": ModuleSpec((4, 6))}, others)
    assert list(component) == ["proj"] and not calls
    assert list(component.norms) == ["norm"] and calls


def test_the_shape_of_a_scalar_survives():
    scalar = ModuleSpec((), False)
    assert parse_module(encode_module(scalar)) == scalar
