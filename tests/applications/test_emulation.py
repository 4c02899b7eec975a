"""The emulated applications against what the real ones computed, and against the facts that were read of them."""

import json
import re

import pytest
import torch
from lycoris.functional.general import factorization
from safetensors.torch import load_file

from tests.applications.emulation import (
    FORGE_MOST_UNKNOWN_KEYS,
    NotApplied,
    Target,
    a1111,
    comfyui,
    finder,
    forge,
    invokeai,
    kohya,
    lycoris_split,
    modules_of,
    musubi,
    onetrainer,
    sdcpp,
)
from tests.shared import SHARED, shared

INDEX = SHARED / "tools-golden" / "index.json"
ENTRIES = json.loads(INDEX.read_text())["samples"] if INDEX.exists() else []
TOOLS = {
    "ComfyUI": comfyui,
    "stable-diffusion-webui-forge": forge,
    "OneTrainer": onetrainer,
    "AUTOMATIC1111 stable-diffusion-webui, extensions-builtin/Lora": a1111,
}
LISTS = {"ComfyUI": "names-comfyui.json", "stable-diffusion-webui-forge": "names-forge.json"}
NOT_RECORDED = {"lyclocon_dora_out_dim4_a1_conv4_a2": {"lora_decompose_output_axis": True}}  # the default is False
ALL = [comfyui, forge, a1111, invokeai, sdcpp, musubi, kohya, onetrainer]
KOHYA, PEFT = ("lora_up.weight", "lora_down.weight"), ("lora_B.weight", "lora_A.weight")
LDM = {
    "input_blocks_1_1": "down_blocks_0_attentions_0",
    "input_blocks_1_0": "down_blocks_0_resnets_0",
    "input_blocks_3_0": "down_blocks_1_resnets_0",
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}


def name_of(entry) -> str:
    return entry["adapter"].removeprefix("adapters/").removesuffix(".safetensors")


def ids(entries) -> list[str]:
    return [f"{re.split('[ ,]', entry['tool'])[0]}-{name_of(entry)}" for entry in entries]


def golden(name, *folder) -> tuple[dict, dict, dict]:
    """Of a sample: the tensors of each module by its name in the file, the layer of each module, the deltas meant."""
    meant = load_file(shared("golden", f"{name}.delta.safetensors"))
    layers = {layer.split(".", 1)[1].replace(".", "_"): layer for layer in meant}
    modules = modules_of(load_file(shared(*folder or ["golden"], f"{name}.safetensors")))
    found = {}
    for module in modules:
        short = re.sub(r"^(?:lycoris_|lora_(?:unet|te1?)_|unet\.|text_encoder\.)", "", module).replace(".", "_")
        for theirs, ours in LDM.items():
            short = short.replace(theirs, ours)
        found[module] = layers[short.removeprefix("text_model_")]
    assert sorted(found.values()) == sorted(meant)
    return modules, found, meant


def outcome(tool, parts, weight, *settings) -> torch.Tensor | None:
    try:
        return tool(parts, weight, *settings)
    except NotApplied:
        return None


def deltas(tool, name, *settings, change=dict, folder=()) -> dict[str, torch.Tensor | None]:
    """What a tool adds to each layer of a sample whose modules are changed before; None where it is not applied."""
    modules, layers, _ = golden(name, *folder)
    weights = load_file(shared("golden", "_base_weights.safetensors"))
    return {
        layer: outcome(tool, change(modules[module]), weights[f"{layer}.weight"], *settings)
        for module, layer in layers.items()
    }


def computed(entry) -> dict[str, torch.Tensor | None]:
    settings = [entry["settings"] | NOT_RECORDED.get(name_of(entry), {})] if "settings" in entry else []
    return deltas(TOOLS[entry["tool"]], name_of(entry), *settings, folder=("tools-golden", "adapters"))


def over_golden(tool, name, *settings, change=dict) -> dict[str, float | None]:
    """The distance of a tool from the meaning of a sample, per layer; None where the layer is not applied."""
    meant, found = golden(name)[2], deltas(tool, name, *settings, change=change)
    return {layer: None if delta is None else distance(delta, meant[layer]) for layer, delta in found.items()}


def distance(found, meant) -> float:
    return float((found.double() - meant.double()).norm() / meant.double().norm())


def made(shapes, **scalars) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    parts = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return parts | {name: torch.tensor(float(value)) for name, value in scalars.items()}


def lokr_meant(parts, shape, scale=1.0) -> torch.Tensor:
    """scale · w1 ⊗ w2 by its indices, in double precision."""
    w1 = (parts["lokr_w1"] if "lokr_w1" in parts else parts["lokr_w1_a"] @ parts["lokr_w1_b"]).double()
    w2 = (parts["lokr_w2"] if "lokr_w2" in parts else parts["lokr_w2_a"] @ parts["lokr_w2_b"]).double()
    w2 = w2.flatten(1)
    return torch.einsum("ac,bd->abcd", w1, w2).reshape(shape) * scale


# --- what the applications computed ----------------------------------------------------------------------------------


def test_every_application_that_ran_is_in_the_index():
    entries = json.loads(shared("tools-golden", "index.json").read_text())["samples"]
    assert {entry["tool"] for entry in entries} == TOOLS.keys()
    assert len(entries) >= 42


@pytest.mark.parametrize("entry", ENTRIES, ids=ids(ENTRIES))
def test_the_emulation_adds_what_the_application_added(entry):
    found, stored = computed(entry), load_file(shared("tools-golden", entry["delta"]))
    assert stored.keys() == set(entry["layers"])
    for layer, delta in stored.items():
        if delta.any():
            assert found[layer] is not None and distance(found[layer], delta) < 2e-5, layer
        else:
            assert found[layer] is None, layer


@pytest.mark.parametrize("entry", ENTRIES, ids=ids(ENTRIES))
def test_the_emulation_is_as_far_from_the_meaning_of_the_file_as_the_application_was(entry):
    found, meant = computed(entry), golden(name_of(entry))[2]
    for layer, recorded in entry["relative_difference_from_what_the_file_means"].items():
        delta = torch.zeros_like(meant[layer]) if found[layer] is None else found[layer]
        assert distance(delta, meant[layer]) == pytest.approx(recorded, rel=0.01, abs=2e-5), layer


@pytest.mark.parametrize("entry", named := [e for e in ENTRIES if e["tool"] in LISTS], ids=ids(named))
def test_the_lists_of_names_tell_what_an_application_passes_over(entry):
    find = finder(json.loads(shared("tools-golden", LISTS[entry["tool"]]).read_text())["bases"]["sd15"])
    modules, layers, _ = golden(name_of(entry))
    unknown = {f"{module}.{name}" for module in modules if find(module) is None for name in modules[module]}
    assert unknown == set(entry["keys_not_loaded"])
    assert len(unknown) <= FORGE_MOST_UNKNOWN_KEYS
    applied = {layers[module] for module in modules if find(module) is not None}
    if entry["tool"] != "ComfyUI":  # which counts a layer as applied when its arithmetic fails
        applied -= {layer for layer, delta in computed(entry).items() if delta is None}
    assert applied == set(entry["layers_applied"])


def test_onetrainer_refuses_dora_of_the_output_axis_without_the_setting_for_it():
    settings = {"lora_rank": 4, "lora_decompose": True}
    assert set(over_golden(onetrainer, "lyclocon_dora_out_dim4_a1_conv4_a2", settings).values()) == {None}


# --- facts that were measured, but not stored ------------------------------------------------------------------------


@pytest.mark.parametrize("tool", [comfyui, forge])
def test_an_alpha_in_the_metadata_alone_is_ignored(tool):
    assert list(over_golden(tool, "diffusers_unet_lora_r3_a6").values()) == pytest.approx([0.5] * 10)


def test_a1111_loses_a_layer_whose_first_factor_mixes_dtypes():
    def promoted(parts):
        return {name: t.float() if name == "lokr_w1_a" else t for name, t in parts.items()}

    assert None not in over_golden(a1111, "lyc_fp16_dim2_a1").values()
    assert list(over_golden(a1111, "lyc_fp16_dim2_a1", change=promoted).values()).count(None) == 5


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("lyc_unbalanced_f4_dim3_a1", {"lokr_dim": 3, "lokr_decompose_factor": 4}),
        ("lyclocon_dim3_a2_conv2_a1", {"lora_rank": 3}),
        ("lyclocon_tucker_dim3_a2_conv2_a1", {"lora_rank": 3}),
        ("lyc_decompose_both_f8_dim3_a2", {"lokr_dim": 3, "lokr_decompose_factor": 8}),
        ("lyc_tucker_dim2_a1", {"lokr_dim": 2}),
    ],
)
def test_onetrainer_refuses_what_its_settings_do_not_build(name, settings):
    assert None in over_golden(onetrainer, name, settings).values()


def test_onetrainer_demands_an_alpha_of_a_lokr_and_the_split_of_lycoris():
    parts, settings = made({"lokr_w1": (4, 4), "lokr_w2": (8, 5)}, alpha=1), {"lokr_dim": 9, "lokr_decompose_factor": 4}
    assert outcome(onetrainer, parts, torch.zeros(32, 20), settings) is not None
    assert outcome(onetrainer, {k: t for k, t in parts.items() if k != "alpha"}, torch.zeros(32, 20), settings) is None
    for size in (7, 12, 32, 36, 320, 1280):
        for factor in (-1, 2, 4, 5, 8, 16, 64):
            assert lycoris_split(size, factor) == tuple(sorted(factorization(size, factor)))


def test_onetrainer_scales_where_both_factors_are_full():
    def alpha_of_one(parts):
        return parts | ({"alpha": torch.tensor(1.0)} if "lokr_w1" in parts and "lokr_w2" in parts else {})

    found = over_golden(onetrainer, "lyc_default_dim4_a4", {"lokr_dim": 4}, change=alpha_of_one).values()
    assert sorted(found) == pytest.approx([0] * 3 + [0.75] * 7, abs=2e-5)
    for dim, error in ((100000, 1), (1, 0)):
        settings = {"lokr_dim": dim, "lokr_decompose_factor": 8, "lokr_full_matrix": True}
        found = over_golden(onetrainer, "lyc_full_matrix_f8", settings, change=alpha_of_one).values()
        assert list(found) == pytest.approx([error] * 10, abs=2e-5)


# --- facts that were read --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tool", [kohya, musubi, invokeai, sdcpp])
@pytest.mark.parametrize("name", ["kohya_lora_dim4_a1_conv2_a1", "kohya_lora_ldmnames_dim3_a3"])
def test_a_plain_lora_means_the_same_in_all(tool, name):
    assert max(over_golden(tool, name).values()) < 2e-5


@pytest.mark.parametrize("tool", [invokeai, sdcpp])
@pytest.mark.parametrize("name", ["lyc_f4_dim2_a1", "lyc_decompose_both_f8_dim3_a2", "lyckohya_te_f4_dim2_a1"])
def test_a_factored_lokr_means_the_same_in_all(tool, name):
    assert max(over_golden(tool, name).values()) < 2e-5


SPELLINGS = [KOHYA, PEFT, *[(f"lora{x}.up.weight", f"lora{x}.down.weight") for x in ("", "_linear_layer")]]
SPELLINGS += [(f"lora_B{x}", f"lora_A{x}") for x in ("", ".default.weight")]
READS = {comfyui: 6, forge: 4, onetrainer: 3, a1111: 2, invokeai: 2, sdcpp: 2, musubi: 1, kohya: 1}


@pytest.mark.parametrize("tool", ALL)
def test_each_application_reads_so_many_spellings_of_a_lora_and_not_every_full_difference(tool):
    settings, weight = [{"lora_rank": 2}] if tool is onetrainer else [], torch.zeros(6, 4)
    for i, (up, down) in enumerate(SPELLINGS):
        parts = made({up: (6, 2), down: (2, 4)})
        found = outcome(tool, parts, weight, *settings)
        assert distance(found, parts[up] @ parts[down]) < 1e-6 if i < READS[tool] else found is None
    for name, tools in (("diff", {comfyui, forge, a1111, invokeai, sdcpp}), ("w_norm", {comfyui, forge})):
        found = outcome(tool, parts := made({name: (6, 4)}), weight, *settings)
        assert torch.equal(found, parts[name]) if tool in tools else found is None


@pytest.mark.parametrize("tool", [a1111, musubi])
def test_products_without_a_cast_refuse_mixed_dtypes(tool):
    lokr = made({"lokr_w1": (4, 2), "lokr_w2_a": (8, 3), "lokr_w2_b": (3, 6)}, alpha=2)
    lora = made({KOHYA[0]: (6, 2), KOHYA[1]: (2, 4)}, alpha=1)
    assert outcome(tool, lokr | {"lokr_w2_b": lokr["lokr_w2_b"].half()}, torch.zeros(32, 12)) is None
    assert outcome(tool, lokr | {"lokr_w1": lokr["lokr_w1"].half()}, torch.zeros(32, 12)) is not None
    found = outcome(tool, lora | {KOHYA[0]: lora[KOHYA[0]].half()}, torch.zeros(6, 4))
    assert (found is None) == (tool is musubi)


def test_invokeai_takes_the_rank_of_w1_first():
    parts = made({"lokr_w1_a": (4, 2), "lokr_w1_b": (2, 4), "lokr_w2_a": (8, 4), "lokr_w2_b": (4, 6)}, alpha=1)
    for tool, rank in {invokeai: 2, comfyui: 4, forge: 4, a1111: 4, sdcpp: 4}.items():
        assert distance(tool(parts, torch.zeros(32, 24)), lokr_meant(parts, (32, 24), 1 / rank)) < 1e-6


def test_invokeai_stops_at_a_lokr_with_dora_and_takes_that_of_a_lora_along_the_input():
    parts = made({"lokr_w1": (2, 2), "lokr_w2": (3, 3), "dora_scale": (6, 1)}, alpha=1)
    with pytest.raises(NotApplied, match=r"lora_up\.weight"):
        invokeai(parts, torch.ones(6, 6))
    for axis, right in (((1, 4), True), ((6, 1), False)):
        parts = made({KOHYA[0]: (6, 2), KOHYA[1]: (2, 4), "dora_scale": axis}, alpha=2)
        weight = made({"": (6, 4)})[""]
        changed = weight + parts[KOHYA[0]] @ parts[KOHYA[1]]
        meant = changed * parts["dora_scale"] / changed.norm(dim=axis.index(1), keepdim=True) - weight
        assert (distance(invokeai(parts, weight), meant) < 1e-5) == right


def test_invokeai_reads_the_core_of_a_lora_unless_it_has_dora():
    shapes = {KOHYA[0]: (6, 2, 1, 1), KOHYA[1]: (2, 4, 1, 1), "lora_mid.weight": (2, 2, 3, 3)}
    parts, weight = made(shapes, alpha=1), torch.ones(6, 4, 3, 3)
    assert torch.equal(invokeai(parts, weight), comfyui(parts, weight))
    assert outcome(invokeai, parts | {"dora_scale": torch.ones(1, 4, 1, 1)}, weight) is None


@pytest.mark.parametrize("alpha", [1, 2])
@pytest.mark.parametrize(("rank", "columns"), [(1, 6), (1, 1), (3, 6), (None, 6)])
def test_sdcpp_takes_the_columns_of_a_down_factor_of_rank_one_for_its_rank(rank, columns, alpha):
    shapes = {"lokr_w2_a": (8, rank), "lokr_w2_b": (rank, columns)} if rank else {"lokr_w2": (8, columns)}
    parts, shape = made({"lokr_w1": (4, 2), **shapes}, alpha=alpha), (32, 2 * columns)
    scale = {(1, 6): alpha / 6, (3, 6): alpha / 3}.get((rank, columns), 1)  # 1 where the rank is 1, or both are full
    assert distance(sdcpp(parts, torch.zeros(shape)), lokr_meant(parts, shape, scale)) < 1e-6
    del parts["alpha"]
    assert distance(sdcpp(parts, torch.zeros(shape)), lokr_meant(parts, shape)) < 1e-6


def test_sdcpp_reads_no_core_of_a_lokr_and_no_dora():
    parts = made({"lokr_w1": (2, 2), "lokr_t2": (2, 2, 3, 3), "lokr_w2_a": (2, 4), "lokr_w2_b": (2, 5)}, alpha=2)
    with pytest.raises(NotApplied, match="core"):
        sdcpp(parts, torch.zeros(8, 10, 3, 3))
    parts = made({KOHYA[0]: (6, 2), KOHYA[1]: (2, 4), "dora_scale": (6, 1)}, alpha=2)
    assert distance(sdcpp(parts, torch.ones(6, 4)), parts[KOHYA[0]] @ parts[KOHYA[1]]) < 1e-6


CONVOLUTIONS = {  # a weight, a full w2 for it, the applications that take a wrong product and those that refuse it
    "image": ((32, 20, 3, 3), (8, 5, 3, 3), {sdcpp}, {kohya}),
    "video": ((32, 16, 1, 2, 2), (8, 4, 1, 2, 2), {comfyui, forge, invokeai, sdcpp}, {a1111, kohya, onetrainer}),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("tool", ALL)
def test_what_the_w2_of_a_convolution_means_in_its_own_shape_and_flat(tool, kind):
    shape, w2, wrong, refused = CONVOLUTIONS[kind]
    settings = [{"lokr_dim": 1, "lokr_full_matrix": True, "lokr_decompose_factor": 4}] if tool is onetrainer else []
    parts = made({"lokr_w1": (4, 4), "lokr_w2": w2}, alpha=1)
    meant, found = lokr_meant(parts, shape), outcome(tool, parts, torch.zeros(shape), *settings)
    assert (found is None) == (tool in refused)
    if found is not None:
        assert 1.36 < distance(found, meant) < 1.46 if tool in wrong else distance(found, meant) < 1e-6
    found = outcome(tool, parts | {"lokr_w2": parts["lokr_w2"].flatten(1)}, torch.zeros(shape), *settings)
    assert found is None if tool in {musubi, kohya, onetrainer} else distance(found, meant) < 1e-6


def test_musubi_takes_a_lokr_of_a_linear_layer_with_a_full_w1():
    shapes = {"lokr_w2_a": (8, 3), "lokr_w2_b": (3, 6)}
    parts = made({"lokr_w1": (4, 2), **shapes}, alpha=2)
    assert distance(musubi(parts, torch.zeros(32, 12)), lokr_meant(parts, (32, 12), 2 / 3)) < 1e-6
    with pytest.raises(NotApplied, match="passed over"):
        musubi(made({"lokr_w1_a": (4, 1), "lokr_w1_b": (1, 2), **shapes}, alpha=2), torch.zeros(32, 12))


@pytest.mark.parametrize("tool", [musubi, kohya, sdcpp])
def test_some_merge_lora_into_linear_layers_and_convolutions_of_two_dimensions_only(tool):
    for kernel in ((1, 1), (3, 3), (1, 2, 2)):
        parts = made({KOHYA[0]: (6, 2, *[1] * len(kernel)), KOHYA[1]: (2, 4, *kernel)}, alpha=1)
        meant = torch.einsum("or,ri...->oi...", parts[KOHYA[0]].flatten(1), parts[KOHYA[1]]) / 2
        found = outcome(tool, parts, torch.zeros(6, 4, *kernel))
        assert found is None if len(kernel) == 3 else distance(found, meant) < 1e-6
        if kernel == (1, 1):  # also for a linear layer
            found = outcome(tool, parts, torch.zeros(6, 4))
            assert found is None if tool is kohya else distance(found, meant[:, :, 0, 0]) < 1e-6


def test_sd_scripts_takes_an_alpha_of_zero_for_the_rank():
    parts = made({KOHYA[0]: (6, 2), KOHYA[1]: (2, 4)}, alpha=0)
    assert distance(kohya(parts, torch.zeros(6, 4)), parts[KOHYA[0]] @ parts[KOHYA[1]]) < 1e-6


def test_a1111_drops_the_alpha_beside_lora_a_and_lora_b():
    parts = made({PEFT[0]: (6, 2), PEFT[1]: (2, 4)}, alpha=1)
    for tool, scale in {a1111: 1, comfyui: 1 / 2}.items():
        assert distance(tool(parts, torch.zeros(6, 4)), scale * parts[PEFT[0]] @ parts[PEFT[1]]) < 1e-6


# --- names and files -------------------------------------------------------------------------------------------------


def test_keys_are_split_into_modules_and_parameters():
    dotted = "lora_unet_a_0|lora_down.weight unet.a.0|lora_A.weight a.b|lora_B.default.weight a.to_q|lora.down.weight"
    more = "a.q_proj|lora_linear_layer.up.weight lycoris_a_1|lokr_w2_b diffusion_model.a|alpha a|lora_B a.b|diff_b"
    pairs = [tuple(pair.split("|")) for pair in f"{dotted} {more}".split()]
    tensors = {".".join(pair): torch.zeros(1) for pair in pairs} | {"a.processor.to_q_lora.up.weight": torch.ones(1)}
    found = [(module, name) for module, parts in modules_of(tensors).items() for name in parts]
    assert sorted(found) == sorted([*pairs, ("a.processor.to_q", "lora.up.weight")])
    with pytest.raises(ValueError, match="no known parameter"):
        modules_of({"a.b.lora_C.weight": torch.zeros(1)})


def test_a_concrete_name_finds_its_row():
    rows = (
        ("d.#.qkv.weight", [0, 3072, 3072], ["transformer.b.#.attn.to_k", "lycoris_b_#_to_k"]),
        ("clip.#.fc1.weight", None, ["text_encoder_#.layers.#.mlp.fc1"]),
        ("time.in_layer.weight", None, ["time.linear_#"]),
        ("time.out_layer.weight", None, ["time.linear_#"]),
    )
    find = finder({"weight": weight, "rows": window, "accepted": names} for weight, window, names in rows)
    qkv, clip, first, second = (Target(weight, window) for weight, window, _ in rows)
    assert find("transformer.b.17.attn.to_k") == find("lycoris_b_3_to_k") == qkv
    assert find("text_encoder_2.layers.0.mlp.fc1") == clip
    assert (find("time.linear_1"), find("time.linear_2")) == (first, second)
    for unknown in ("transformer.b.x.attn.to_k", "transformer_b.1.attn.to_k", "lycoris_b_3_to_k.0", "time.linear_3"):
        assert find(unknown) is None


LISTED = ["tools-golden/names-comfyui.json", "tools-golden/names-forge.json", "bases/names/comfyui-accepts.json"]


@pytest.mark.parametrize("path", LISTED)
def test_every_listed_name_finds_its_own_row(path):
    for base, rows in json.loads(shared(path).read_text())["bases"].items():
        find, seen = finder(rows), {}
        for row in rows:
            for name in row["accepted"]:
                seen[name] = seen.get(name, 0) + 1
                assert find(name.replace("#", str(seen[name]))) == Target(row["weight"], row["rows"]), (base, name)
