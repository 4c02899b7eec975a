"""Norms, biases and bare parameters of base models: none is forgotten, and each is found in every dialect."""

import pytest
import torch
from safetensors.torch import load_file

from krona_hub.bases import catalog, ldm_names, loading
from krona_hub.bases.base import Base
from krona_hub.bases.component import Component
from krona_hub.bases.module_spec import ModuleSpec, OtherParameters, Placement
from krona_hub.bases.name_patterns import encode_module, parse_module
from krona_hub.bases.name_table import DIALECTS, table
from krona_hub.bases.original_names import AUTHORS
from krona_hub.errors import InexpressibleError, NotFoundError
from krona_hub.merging.base_weights import open_tree
from tests import single_file, tiny
from tests.bases.every_base import every_base
from tests.bases.original_checkpoints import (
    CONVERTERS,
    PREFIX,
    SPELLING,
    Checkpoint,
    convert,
    denoiser,
    homes,
    named,
    original_checkpoint,
    stacked,
)  # fmt: skip
from tests.shared import shared

CATALOG = tuple(name for name in catalog.component_names() if catalog.component(name).class_name)


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


@pytest.mark.parametrize("name", every_base())
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
                assert dialect == "processor" or not names.parts[component].is_clear(path)
                continue
            places = names.vector_places(spelled, component)
            assert layer in [place.layer for place in places]
            if path in part:
                assert (spelled, places) == (names.spell(layer, dialect), names.find(spelled, component))
            else:
                assert all(place.plain for place in places)
                assert [place.layer for place in places[1:]] == [*places[0].shared_with]
                assert names.find(spelled, component) is None, "only modules have deltas of weights"


@pytest.mark.parametrize("name", every_base())
def test_underscored_names_of_norms_never_collide(name):
    for part in table(catalog.get(name)).parts.values():
        homes = [home for who in part.spellings for home in part.norm_homes(who).values()]
        names = [
            *part.modules,
            *filter(part.is_clear, part.modules.norms),
            *(n for s in part.spellings.values() for n in s),
            *homes,
        ]
        owners: dict[str, set[str]] = {}
        for known in names:
            places = part.find_vector(known)
            owners.setdefault(known.replace(".", "_"), set()).add(places[0].layer)
        assert all(len(layers) == 1 for layers in owners.values())
        assert all(
            part.find_vector(path)[0].layer == f"{part.component}.{path}"
            for path in filter(part.is_clear, part.modules.norms)
        )


def test_a_norm_whose_name_means_another_one_elsewhere_is_not_found():
    """The authors of Hunyuan-DiT and diffusers call each other's norms norm2 and norm3."""
    names = table(catalog.get("hunyuan-dit-12"))
    for name in ("lora_unet_blocks_0_norm2", "diffusion_model.blocks.0.norm3", "transformer.blocks.0.norm2"):
        assert names.vector_places(name) is None
    assert names.vector_places("transformer.blocks.0.attn1.norm_q") is not None
    with pytest.raises(InexpressibleError):
        names.vector_name("transformer.blocks.0.norm2", "kohya")


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
    "diffusion_model.double_blocks.7.txt_attn.norm.key_norm.scale":
        ("flux1-dev", "transformer.transformer_blocks.7.attn.norm_added_k"),
    "lora_unet_single_blocks_37_norm_query_norm": ("flux2-dev", "transformer.single_transformer_blocks.37.attn.norm_q"),
    "diffusion_model.blocks.0.self_attn.norm_q": ("wan21-t2v-14b", "transformer.blocks.0.attn1.norm_q"),
    "diffusion_model.blocks.0.norm3": ("wan21-t2v-14b", "transformer.blocks.0.norm2"),
    "diffusion_model.blocks.0.modulation": ("wan21-t2v-14b", "transformer.blocks.0.scale_shift_table"),
    "diffusion_model.head.modulation": ("wan21-t2v-14b", "transformer.scale_shift_table"),
    "conditioner.embedders.1.model.ln_final": ("sdxl", "text_encoder_2.final_layer_norm"),
    "diffusion_model.scale_shift_table": ("pixart-sigma-xl", "transformer.scale_shift_table"),
    "diffusion_model.final_layer.scale_shift_table": ("pixart-sigma-xl", "transformer.scale_shift_table"),
    "diffusion_model.blocks.3.scale_shift_table":
        ("pixart-alpha-xl", "transformer.transformer_blocks.3.scale_shift_table"),
    "diffusion_model.semantic_txt_norm": ("ovis-image", "transformer.context_embedder_norm"),
    "diffusion_model.txt_norm": ("ovis-image", "transformer.context_embedder_norm"),
    "lora_unet_double_blocks_5_img_attn_norm_key_norm": ("ovis-image", "transformer.transformer_blocks.5.attn.norm_k"),
    "diffusion_model.single_blocks.9.norm.query_norm":
        ("longcat-image", "transformer.single_transformer_blocks.9.attn.norm_q"),
    "diffusion_model.double_blocks.19.txt_attn_k_norm":
        ("hunyuan-image-21", "transformer.transformer_blocks.19.attn.norm_added_k"),
    "diffusion_model.byt5_in.layernorm": ("hunyuan-video-15", "transformer.context_embedder_2.norm"),
    "diffusion_model.vision_in.proj.0": ("hunyuan-video-15", "transformer.image_embedder.norm_in"),
    "diffusion_model.vision_in.proj.4": ("hunyuan-video-15", "transformer.image_embedder.norm_out"),
    "diffusion_model.txt_in.individual_token_refiner.blocks.1.norm2":
        ("framepack", "transformer.context_embedder.token_refiner.refiner_blocks.1.norm2"),
    "diffusion_model.blocks.39.attn2.k_norm": ("hunyuan-dit-12", "transformer.blocks.39.attn2.norm_k"),
    "diffusion_model.blocks.0.norm1": ("hunyuan-dit-11", "transformer.blocks.0.norm1.norm"),
    "diffusion_model.pooler.positional_embedding":
        ("hunyuan-dit-12", "transformer.time_extra_emb.pooler.positional_embedding"),
    "diffusion_model.layers.7.attention.ky_norm": ("lumina-next", "transformer.layers.7.attn2.norm_k"),
    "diffusion_model.layers.7.attention_y_norm": ("lumina-next", "transformer.layers.7.norm1_context"),
    "diffusion_model.layers.7.attention.gate": ("lumina-next", "transformer.layers.7.gate"),
    "diffusion_model.transformer.layers.41.post_attention_layernorm":
        ("cogvideox-5b", "transformer.transformer_blocks.41.norm2.norm"),
    "diffusion_model.mixins.adaln_layer.query_layernorm_list.41":
        ("cogvideox-5b", "transformer.transformer_blocks.41.attn1.norm_q"),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_names_of_vectors_that_files_have_are_found(name):
    base, path = SEEN[name]
    assert table(catalog.get(base)).vector_places(name) == (Placement(path),)


def test_one_norm_of_lumina_next_is_two_of_diffusers():
    places = table(catalog.get("lumina-next")).vector_places("diffusion_model.layers.7.attention.q_norm")
    assert [place.layer for place in places] == [f"transformer.layers.7.attn{i}.norm_q" for i in (1, 2)]


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


# --- original names --------------------------------------------------------------------------------------------------

SCALED = ("flux1", "chroma", "flux2", "flux3", "krea2")  # their authors call the weight of a norm `scale`
MOTION_ENCODER = "motion_encoder."  # of Wan Animate: no rule renames its parameters, which no adapter changes
FLAT = (".mod.lin",)  # tables that Krea 2 stores as one vector


def numbers(part: Component) -> dict[str, torch.Tensor]:
    """Vector -> numbers that occur in no other one."""
    found, start = {}, 1
    for path in vectors(part):
        shape = part.parameter(path)
        size = torch.Size(shape).numel()
        found[path] = torch.arange(start, start + size).reshape(shape)
        start += size
    return found


def original_vectors(base: str, component: str, prefix: str = "") -> dict[str, torch.Tensor]:
    """The vectors in a checkpoint with the names of its authors."""
    part, names = catalog.get(base).components[component], table(catalog.get(base)).parts[component]
    values = numbers(part)
    stored = {}
    for name, places in homes(base, component).items():
        paths = [place.layer.partition(".")[2] for place in places]
        if all(f"{path}.bias" in values for path in paths):
            stored[named(name, "bias")] = stacked(places, {path: values[f"{path}.bias"] for path in paths})
    scaled = part.original is not None and part.original.name in SCALED
    for path in part.norms:
        if path.startswith(MOTION_ENCODER):
            continue
        name = names.norm_homes(SPELLING.get(base, AUTHORS)).get(f"{component}.{path}", path)
        if path in part.bare:
            stored[name] = values[path].flatten() if name.endswith(FLAT) else values[path]
            continue
        stored[f"{name}.{'scale' if scaled else 'weight'}"] = values[f"{path}.weight"]
        if f"{path}.bias" in values:
            stored[f"{name}.bias"] = values[f"{path}.bias"]
    return {prefix + name: tensor for name, tensor in stored.items()}


@pytest.mark.slow
@pytest.mark.parametrize("base", CONVERTERS)
def test_diffusers_converts_the_original_names_of_vectors_to_ours(base):
    component, prefix = denoiser(base), PREFIX.get(base, "")
    checkpoint = original_checkpoint(base, component, prefix)
    heights = checkpoint.heights
    checkpoint = Checkpoint(checkpoint | original_vectors(base, component, prefix))
    checkpoint.heights = heights
    converted = convert(base, checkpoint)
    for path, value in numbers(catalog.get(base).components[component]).items():
        if not path.startswith(MOTION_ENCODER):
            assert torch.equal(converted[path], value), path


@pytest.mark.slow
@pytest.mark.parametrize("base", ["sd15", "sd21", "sdxl", "sdxl-refiner"])
def test_diffusers_converts_the_ldm_names_of_vectors_to_ours(base):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    prefix = "model.diffusion_model."
    checkpoint = dict(original_checkpoint(base, "unet", prefix)) | original_vectors(base, "unet", prefix)
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(catalog.component(f"{base}.unet").config))
    for path, value in numbers(catalog.get(base).components["unet"]).items():
        assert torch.equal(converted[path], value), path


# --- files -----------------------------------------------------------------------------------------------------------


def tensors_of(folder) -> dict[str, torch.Tensor]:
    """Canonical parameter -> tensor, of the default variant of a pipeline folder."""
    return {
        f"{component}.{name.removeprefix('text_model.')}": tensor
        for component in loading.load_base(folder).components
        for path in (folder / component).glob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def assert_vectors_are_those_of(source, tensors):
    """Files, base and tree agree: every vector is found, has its shape, and is read whole and in order."""
    base, places, tree = loading.load_base(source), loading.vector_files(source), open_tree(source)
    layers = {f"{layer}.weight" for layer, _ in base.layers()}
    components = tuple(f"{component}." for component in base.components)
    wanted = {n for n in tensors if n not in layers and ".embeddings." not in n and n.startswith(components)}
    assert set(places) == set(tree.vectors) == wanted and wanted
    weights = loading.base_weights(source)
    for name, place in places.items():
        assert base.parameter(name) == tuple(tensors[name].shape)
        assert torch.equal(loading.read(place), tensors[name]), name
        assert torch.equal(weights(name), tensors[name]) and torch.equal(tree.weight(name), tensors[name])
        assert tree.vectors[name] == (place,)
    assert weights("unet.conv_in.nothing") is None and tree.weight("unet.conv_in.nothing") is None


def test_the_vectors_of_a_folder_are_its_other_tensors():
    folder = shared("golden", "base")
    assert_vectors_are_those_of(folder, tensors_of(folder))


@pytest.mark.parametrize("pipeline", [tiny.sd15, tiny.sdxl, tiny.flux], ids=["sd15", "sdxl", "flux"])
def test_a_checkpoint_has_the_vectors_of_the_folder(pipeline, tmp_path):
    """With ldm, OpenCLIP and BFL names: rows of fused biases, swapped halves, and `scale` of norms."""
    pipe = pipeline()
    for part in (getattr(pipe, name) for name in ("unet", "transformer", "text_encoder", "text_encoder_2")
                 if getattr(pipe, name, None) is not None):  # fmt: skip
        torch.manual_seed(0)
        for parameter in part.parameters():
            if parameter.dim() == 1:  # norms are ones and biases zeros in a new model
                torch.nn.init.normal_(parameter)
    plain = tiny.save(pipe, tmp_path / "plain")
    single_file.save(pipe, tmp_path / "base.safetensors")
    with single_file.known("tiny", plain):
        assert_vectors_are_those_of(tmp_path / "base.safetensors", tensors_of(tmp_path / "plain"))


def test_a_table_stored_flat_is_read_in_its_own_shape(tmp_path):
    from safetensors.torch import save_file

    values = torch.arange(24, dtype=torch.bfloat16)
    save_file({"mod.lin": values, "scalar": torch.tensor(3.0)}, tmp_path / "w.safetensors")
    place = loading.WeightPlace(tmp_path / "w.safetensors", "mod.lin", Placement("table"), (6, 4))
    assert torch.equal(loading.read((place,)), values.reshape(6, 4))
    scalar = place._replace(tensor="scalar", shape=None)
    assert loading.read((scalar,)) == 3.0
    part = Component({"proj": ModuleSpec((4, 6))}, lambda: OtherParameters({}, {"table": ModuleSpec((6, 4), False)}))
    base = Base("x", None, {"transformer": part})
    stored = {"table": loading.StoredTensor(tmp_path / "w.safetensors", "mod.lin", (24,))}
    assert loading.landed_vectors(base, stored)["transformer.table"][0].shape == (6, 4)
