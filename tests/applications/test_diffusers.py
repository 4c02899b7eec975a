"""What krona says of diffusers, against the converters of the installed diffusers itself.

The files are those that people could not load (`wild/files`), and the files that krona writes of them with
`--for diffusers`. `scripts/measure_diffusers.py` made the table: it loads every layer of every base model.
"""

import json
import warnings

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders import FluxLoraLoaderMixin
from safetensors.torch import load_file, save_file

from krona_hub import read, write
from krona_hub.bases import catalog
from krona_hub.errors import KronaError
from krona_hub.formats.compatibility.applications import APPLICATIONS
from krona_hub.formats.compatibility.verdicts import verdict
from krona_hub.formats.reading.describe import describe
from scripts.measure_diffusers import loader_of
from tests.shared import SHARED, shared

EXPECTED = SHARED / "wild" / "files" / "expected.json"
LISTED = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
OPEN = {
    "wan21_i2v_lora_k_img": "wan21-i2v-14b", "ltx2_lora": "ltx-2", "ltxv_transformer_prefix": "ltx-video-2b",
    "ernie_onetrainer": "ernie-image", "kandinsky5_kohya": "kandinsky5-lite-video",
}  # fmt: skip
CASES = {case: facts["base"] or OPEN[case] for case, facts in LISTED.items() if facts["base"] or case in OPEN}
ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora.down.weight", ".lora.up.weight", ".lokr_w1", ".lokr_w1_a")
FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
LOST = ("dora_scale", "magnitude", "alpha", "diff")  # parts that a converter drops while it keeps the layer
DIFFUSERS = APPLICATIONS["diffusers"]


def converted(tensors, base):
    """The layers of the base model under whose names diffusers returns tensors; none if its converter raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            state = loader_of(base.name).lora_state_dict(dict(tensors))
        except Exception:  # its converters raise ValueError, KeyError and others
            return set()
    state = state[0] if isinstance(state, tuple) else state
    names = {key[: -len(end)] for key in state for end in ENDINGS if key.endswith(end)}
    found = {name.replace("text_model.", "") for name in names}
    for name in names:
        stem, _, last = name.rpartition(".")
        found |= {f"{stem}.{part}" for part in FUSED.get(last, ())}
    return {layer for layer in found if base.module(layer) is not None}


def file_of(case):
    return shared("wild", "files", f"{case}.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_the_answer_for_a_wild_file_is_what_the_converter_does(case):
    base = catalog.get(CASES[case])
    try:
        about = describe(file_of(case), base=CASES[case])
    except KronaError:
        pytest.skip("refused by krona")
    layers = {layer for module in about.modules for layer in module.layers}
    found = verdict(DIFFUSERS, about)
    tensors = load_file(file_of(case))
    whole = layers <= converted(tensors, base) and bool(layers)
    if found.ok:
        assert whole, found
    elif found.answer == "no" and whole:
        assert any(part in key for part in LOST for key in tensors) or about.unmatched, found


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case, base in CASES.items() if LISTED[case]["want"] == "read"])
def test_every_file_for_diffusers_is_converted_whole(case, tmp_path):
    base = catalog.get(CASES[case])
    adapter = read(file_of(case), base=CASES[case])
    try:
        report = write(adapter, tmp_path / "out.safetensors", tool="diffusers", base=CASES[case])
    except KronaError as error:
        assert error.code and error.fix
        return
    if report.format == "diffusers-lora":
        assert set(adapter.layers) <= converted(load_file(report.path), base)


def test_the_table_was_measured_with_the_installed_version():
    import diffusers

    assert DIFFUSERS.evidence.version == diffusers.__version__


@pytest.mark.parametrize("uneven", [False, True])
def test_alphas_of_layers_whose_names_end_alike_are_confused_if_they_differ(uneven, tmp_path):
    """Loaded by diffusers into a small model of the architecture; only the paths of the layers matter."""
    sizes = {"in_channels": 4, "num_layers": 1, "num_single_layers": 2, "attention_head_dim": 16}
    heads = {"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32}
    model = FluxTransformer2DModel(**sizes, **heads, axes_dims_rope=[4, 4, 8])
    layers = ["x_embedder", *(f"single_transformer_blocks.{i}.proj_out" for i in range(2)), "proj_out"]
    alphas = {layer: 6.0 if uneven and layer == "proj_out" else 2.0 for layer in layers}

    def stored(path, shape):
        up, down = torch.ones(shape[0], 4), torch.ones(4, shape[1])
        name = f"transformer.{path}"
        return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(alphas[path])}

    small = {k: t for layer in layers for k, t in stored(layer, model.get_submodule(layer).weight.shape).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, found = FluxLoraLoaderMixin.lora_state_dict(small, return_alphas=True)
        FluxLoraLoaderMixin.load_lora_into_transformer(state, found, model)
    scales = {layer: float(next(iter(model.get_submodule(layer).scaling.values()))) for layer in layers}
    right = all(scales[layer] == alphas[layer] / 4 for layer in layers)
    base = catalog.get("flux1-dev")
    whole = {k: t for layer in layers for k, t in stored(layer, base.module(f"transformer.{layer}").shape).items()}
    save_file(whole, tmp_path / "a.safetensors")
    answer = verdict(DIFFUSERS, describe(tmp_path / "a.safetensors", base="flux1-dev"))
    assert right is (not uneven) and answer.ok is right, (scales, answer)
