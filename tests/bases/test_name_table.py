"""Names in every dialect: what is spelled is found again, what readers meet is found at all, doubts are errors."""

import json
import re
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krona_hub.bases import catalog, ldm_names, loading
from krona_hub.bases.base import Base
from krona_hub.bases.component import Component
from krona_hub.bases.module_spec import ModuleSpec, Placement
from krona_hub.bases.name_rules import apply, fused_projections
from krona_hub.bases.name_table import DIALECTS, ComponentNames, table, underscored
from krona_hub.checkpoints.header import read_header
from krona_hub.errors import AmbiguousError, InexpressibleError, NotFoundError, UsageError
from tests.bases.every_base import every_base
from tests.shared import shared

PARAMETER = re.compile(
    r"(\.lokr_\w+|\.alpha|\.dora_scale|\.lora_magnitude_vector|[._]lora(_linear_layer)?\.(up|down)\.weight"
    r"|\.lora_(A|B|up|down|mid)\.weight)$"
)


def first(base: str, name: str, component: str | None = None) -> Placement:
    places = table(catalog.get(base)).find(name, component)
    assert places, name
    return places[0]


@pytest.mark.parametrize("name", every_base())
@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_is_spelled_is_found_again(dialect, name):
    """In every dialect of every base: the name leads back to the layer, and a fused name is listed as fused."""
    base = catalog.get(name)
    names, fused = table(base), table(base).fused(dialect)
    for layer, _ in base.layers():
        try:
            spelled = names.spell(layer, dialect)
        except InexpressibleError:
            assert dialect == "processor"
            continue
        places = names.find(spelled, layer.partition(".")[0])
        assert layer in [place.layer for place in places]
        assert fused.get(spelled, places) == places
        assert (spelled in fused) == (places != (Placement(layer),))


@pytest.mark.parametrize("name", catalog.names())
def test_underscored_names_never_collide(name):
    """One table can hold the diffusers and the original names of a component (FORMATS 12.1)."""
    for part in table(catalog.get(name)).parts.values():
        flat = {path.replace(".", "_"): path for path in part.modules}
        assert len(flat) == len(part.modules)
        for original, places in part.originals.items():
            same = flat.get(original.replace(".", "_"))
            assert same is None or [place.layer for place in places] == [f"{part.component}.{same}"]


def test_no_two_targets_in_the_catalog_have_the_same_underscored_name():
    """In all spellings, with the fused names of diffusers; of layers, norms and bare parameters of each component."""
    checked, clashes = 0, []
    for file in catalog.component_names():
        modules = catalog.component(file).modules
        targets: dict[str, set[tuple[Placement, ...]]] = {}
        for name, places in named_targets(modules):
            targets.setdefault(underscored(name.removesuffix(".weight").removesuffix(".scale")), set()).add(places)
        checked += len(targets)
        clashes += [(file, name, found) for name, found in targets.items() if len(found) > 1]
        part = ComponentNames(file, modules)
        original = modules.original
        unclear = tuple(underscored(end) for end in original.unclear) if original else ()  # these are refused
        known = {*part.index, *part.norm_index}
        assert known <= targets.keys() and all(name.endswith(unclear) for name in targets.keys() - known)
    assert clashes == []
    assert checked >= 28_341, f"checked only {checked:,} names"


def named_targets(modules: Component) -> Iterator[tuple[str, tuple[Placement, ...]]]:
    known = {**modules, **modules.norms}
    yield from ((path, (Placement(path),)) for path in known)
    yield from fused_projections(modules).items()
    if modules.original:
        for who in modules.original.spellings:
            yield from apply(modules.original.rules(who), known).items()
    else:
        yield from ldm_names.names(modules).items()
        yield from ldm_names.names(modules, modules.norms).items()


SEEN = {  # name in a file -> base, layer
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q":
        ("sdxl", "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"),
    "lora_unet_middle_block_1_proj_in": ("sdxl", "unet.mid_block.attentions.0.proj_in"),
    "lora_unet_label_emb_0_2": ("sdxl", "unet.add_embedding.linear_2"),
    "lycoris_down_blocks_1_attentions_0_proj_in": ("sdxl", "unet.down_blocks.1.attentions.0.proj_in"),
    "lora_te1_text_model_encoder_layers_3_mlp_fc1": ("sdxl", "text_encoder.encoder.layers.3.mlp.fc1"),
    "lora_te2_encoder_layers_31_self_attn_out_proj": ("sdxl", "text_encoder_2.encoder.layers.31.self_attn.out_proj"),
    "lora_te2_text_projection": ("sdxl", "text_encoder_2.text_projection"),
    "lora_te_text_model_encoder_layers_0_mlp_fc2": ("sd15", "text_encoder.encoder.layers.0.mlp.fc2"),
    "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora":
        ("sd15", "text_encoder.encoder.layers.0.self_attn.out_proj"),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj":
        ("sd15", "text_encoder.encoder.layers.0.self_attn.q_proj"),
    "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.processor.to_out_lora":
        ("sd15", "unet.up_blocks.3.attentions.2.transformer_blocks.0.attn2.to_out.0"),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_k_lora":
        ("sd15", "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k"),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out":  # ComfyUI's key map
        ("sd15", "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"),
    "base_model.model.down_blocks.0.resnets.0.conv1": ("sd15", "unet.down_blocks.0.resnets.0.conv1"),
    "base_model.model.unet.down_blocks.0.resnets.0.conv1": ("sd15", "unet.down_blocks.0.resnets.0.conv1"),
    "unet.base_model.model.down_blocks.0.resnets.0.conv1": ("sd15", "unet.down_blocks.0.resnets.0.conv1"),
    "diffusion_model.input_blocks.1.1.proj_in": ("sd15", "unet.down_blocks.0.attentions.0.proj_in"),
    "model.diffusion_model.out.2": ("sd15", "unet.conv_out"),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": ("flux1-dev", "text_encoder.encoder.layers.0.mlp.fc1"),
    "lora_te3_encoder_block_0_layer_1_DenseReluDense_wi_0":
        ("flux1-dev", "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wi_0"),
    "lora_te2_encoder_block_0_layer_0_SelfAttention_q":  # Forge
        ("flux1-dev", "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q"),
    "lora_te3_encoder_block_0_layer_0_SelfAttention_k":
        ("sd3-medium", "text_encoder_3.encoder.block.0.layer.0.SelfAttention.k"),
    "lora_transformer_transformer_blocks_0_attn_to_q": ("sd3-medium", "transformer.transformer_blocks.0.attn.to_q"),
    "lycoris_transformer_transformer_blocks_0_attn_to_q":  # ai-toolkit
        ("flux1-dev", "transformer.transformer_blocks.0.attn.to_q"),
    "lycoris_transformer_blocks_0_attn_to_q": ("flux1-dev", "transformer.transformer_blocks.0.attn.to_q"),
    "transformer_blocks.0.attn.to_q": ("flux1-dev", "transformer.transformer_blocks.0.attn.to_q"),
    "diffusion_model.transformer_blocks.0.attn.to_q": ("qwen-image", "transformer.transformer_blocks.0.attn.to_q"),
    "diffusion_model.blocks.0.self_attn.o": ("wan21-t2v-14b", "transformer.blocks.0.attn1.to_out.0"),
    "lora_unet_all_x_embedder_2-1": ("z-image", "transformer.all_x_embedder.2-1"),
    "text_encoders.t5xxl.transformer.encoder.block.0.layer.0.SelfAttention.o":
        ("flux1-dev", "text_encoder_2.encoder.block.0.layer.0.SelfAttention.o"),
    "lora_te1_text_model_encoder_layers_0_mlp_fc2": ("sdxl-refiner", "text_encoder_2.encoder.layers.0.mlp.fc2"),
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_names_that_files_have_are_found(name):
    base, layer = SEEN[name]
    assert first(base, name) == Placement(layer)


def test_fused_modules_say_which_rows_are_whose():
    base = catalog.get("flux1-dev")
    places = table(base).find("lora_unet_single_blocks_37_linear1")
    assert [(p.layer.rpartition("37.")[2], p.rows) for p in places] == [
        ("attn.to_q", (0, 3072)), ("attn.to_k", (3072, 6144)), ("attn.to_v", (6144, 9216)), ("proj_mlp", (9216, 21504)),
    ]  # fmt: skip
    assert first("flux1-dev", "diffusion_model.final_layer.adaLN_modulation.1").swap_halves
    assert not first("flux1-dev", "lora_unet_double_blocks_0_img_mod_lin").swap_halves
    assert first("sdxl", "conditioner.embedders.1.model.text_projection").transpose
    assert not first("sdxl", "text_encoder_2.text_projection").transpose


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("sdxl", "lora_unet_no_such_block"),
        ("sdxl", "lora_te3_text_model_encoder_layers_0_mlp_fc1"),
        ("sdxl", "transformer.transformer_blocks.0.attn.to_q"),
        ("flux1-dev", "unet.conv_in"),
        ("sdxl", ""),
        ("sdxl", "lora_unet_"),
        ("sdxl", "unet."),
    ],
)
def test_an_unknown_name_is_none(base, name):
    assert table(catalog.get(base)).find(name) is None


pieces = st.sampled_from(
    ["lora_unet_", "lora_te1_", "lycoris_", "unet.", "base_model.model.", "text_model.", "processor.", "to_out",
     "_lora", "input_blocks_1_1_", "encoder.layers.0.", "mlp.fc1", "self_attn_to_q", ".", "_", "0", "ünï", "conv_in"]
)  # fmt: skip


@settings(deadline=None)
@given(st.one_of(st.text(max_size=30), st.lists(pieces, max_size=6).map("".join)))
def test_no_name_breaks_the_search(name):
    for base in ("sdxl", "flux1-dev"):
        names = table(catalog.get(base))
        try:
            found = names.find(name)
        except AmbiguousError:
            assert len(names.candidates(name)) > 1
        else:
            assert found is None or all(names.base.module(place.layer) for place in found)


def test_a_name_that_fits_two_components_is_asked_about():
    names = table(catalog.get("sdxl"))
    with pytest.raises(AmbiguousError, match="text_encoder and in text_encoder_2") as error:
        names.find("base_model.model.text_model.encoder.layers.0.mlp.fc1")
    assert "--component" in error.value.fix
    chosen = names.find("base_model.model.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2")
    assert chosen == (Placement("text_encoder_2.encoder.layers.0.mlp.fc1"),)


def test_text_model_is_written_for_tools_and_where_the_live_class_has_it():
    names = table(catalog.get("sdxl"))
    one, two = "text_encoder.encoder.layers.0.mlp.fc1", "text_encoder_2.encoder.layers.0.mlp.fc1"
    for dialect in ("diffusers", "kohya", "kohya-ldm", "original"):
        assert "text_model" in names.spell(one, dialect) and "text_model" in names.spell(two, dialect)
    assert names.spell(one, "peft") == "encoder.layers.0.mlp.fc1"
    assert names.spell(two, "peft") == "text_model.encoder.layers.0.mlp.fc1"
    assert names.spell("text_encoder_2.text_projection", "kohya") == "lora_te2_text_projection"


def test_sd_scripts_names_are_ldm_for_sdxl_and_diffusers_for_sd15():
    layer = "unet.down_blocks.1.attentions.0.proj_in"
    assert table(catalog.get("sdxl")).spell(layer, "kohya-ldm") == "lora_unet_input_blocks_4_1_proj_in"
    assert table(catalog.get("sd15")).spell(layer, "kohya-ldm") == "lora_unet_down_blocks_1_attentions_0_proj_in"
    assert table(catalog.get("sd15")).spell(layer, "original") == "diffusion_model.input_blocks.4.1.proj_in"


def test_mistakes_come_with_a_suggestion():
    names = table(catalog.get("sdxl"))
    layer = "unet.down_blocks.1.attentions.0.proj_in"
    assert names.nearest("lora_unet_down_blocks_1_attentions_0_porj_in") == layer
    with pytest.raises(NotFoundError, match="Did you mean"):
        names.spell("unet.down_blocks.1.attentions.0.proj_inn", "kohya")
    with pytest.raises(UsageError, match="Unknown dialect"):
        names.spell(layer, "esperanto")
    with pytest.raises(InexpressibleError, match="processor"):
        names.spell(layer, "processor")


def reference_files():
    for entry in json.loads(shared("golden", "index.json").read_text())["samples"]:
        if entry["format"] != "cloneofsimo":
            yield entry


def test_every_module_of_every_reference_file_is_found():
    """All named reference adapters, against the names of their own deltas."""
    base = loading.load_base(shared("golden", "base"))
    entries = list(reference_files())
    assert len(entries) > 30
    for entry in entries:
        path = shared("golden", entry["adapter"])
        header = read_header(path / "adapter_model.safetensors" if path.is_dir() else path)
        modules = {PARAMETER.sub("", name) for name in header.tensors}
        component = entry["component"] if path.is_dir() else None
        found = [table(base).find(module, component) for module in modules]
        assert all(found), (entry["name"], modules)
        layers = {place.layer for places in found for place in places}
        assert layers == set(read_header(shared("golden", entry["delta"])).tensors), entry["name"]


def test_a_base_of_any_configuration_has_ldm_names():
    """The tiny reference base has one layer per block and two blocks."""
    base = loading.load_base(shared("golden", "base"))
    originals = table(base).parts["unet"].originals
    assert len(originals) == len(base.components["unet"]) == 83
    assert originals["input_blocks.2.0.op"] == (Placement("unet.down_blocks.0.downsamplers.0.conv"),)
    assert originals["output_blocks.1.1.conv"] == (Placement("unet.up_blocks.0.upsamplers.0.conv"),)


@pytest.mark.parametrize("name", every_base())
def test_a_name_is_found_without_the_whole_index_as_in_it(name):
    for part in table(catalog.get(name)).parts.values():
        for key, entry in part.index.items():
            places = part.find(key)
            wanted = (Placement(entry),) if isinstance(entry, str) else entry
            assert [p.layer.removeprefix(f"{part.component}.") for p in places] == [p.layer for p in wanted]
            assert [p[1:5] for p in places] == [p[1:5] for p in wanted], key


def test_an_underscored_name_of_two_layers_is_none_of_them():
    """Only a model outside the catalog has such names; the dotted ones stay clear."""
    names = table(Base("x", None, {"transformer": {"a.b_c": ModuleSpec((2, 3)), "a_b.c": ModuleSpec((2, 3))}}))
    assert names.find("lora_unet_a_b_c") is None
    assert names.find("transformer.a_b.c") == (Placement("transformer.a_b.c"),)
    assert names.find("diffusion_model.a.b_c") == (Placement("transformer.a.b_c"),)
