"""Modules of an adapter that match a base, for real files and shapes, and the messages about the others."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from krona_hub import merge, plan_merge, write
from krona_hub import read as krona_read
from krona_hub.bases import catalog
from krona_hub.bases.loading import load_base, read, weight_files
from krona_hub.bases.name_table import table
from krona_hub.checkpoints.header import read_header
from krona_hub.errors import (
    AmbiguousError,
    BaseMismatchError,
    ConflictError,
    ScaleError,
    UnknownBaseError,
    UsageError,
)
from krona_hub.merging.merge_record import RECORD
from tests import tiny
from tests.formats import made
from tests.merging import real_shapes
from tests.shared import shared

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj", "text_projection", "proj_in")
FLUX = ("to_q", "to_k", "to_v", "add_q_proj", "proj_mlp", "norm_out.linear", "proj_out")


def lora_file(path: Path, name: str, dialect: str, endings: tuple[str, ...], *components: str) -> Path:
    """A LoRA of rank 4 for layers of a real base, under the names of a dialect; a fused module has all its rows."""
    base = catalog.get(name)
    names, tensors = table(base), {}
    fused = names.fused(dialect)
    for layer, module in base.layers():
        if layer.endswith(endings) and layer.split(".")[0] in components:
            spelled = names.spell(layer, dialect)
            places = fused.get(spelled, ())
            out = sum(base.module(p.layer).shape[0] for p in places) or module.shape[0]
            kernel = module.shape[2:]
            tensors[f"{spelled}.lora_down.weight"] = (4, module.shape[1], *kernel)
            tensors[f"{spelled}.lora_up.weight"] = (out, 4, *(1 for _ in kernel))
    return real_shapes.write(path, tensors)


REAL = {
    "SD 1.5, kohya": ("sd15", "kohya", ATTENTION, ("unet", "text_encoder")),
    "SDXL, kohya": ("sdxl", "kohya", ATTENTION, ("unet", "text_encoder", "text_encoder_2")),
    "SDXL, ldm names": ("sdxl", "kohya-ldm", ATTENTION, ("unet", "text_encoder", "text_encoder_2")),
    "SDXL, dotted": ("sdxl", "diffusers", ATTENTION, ("unet", "text_encoder", "text_encoder_2")),
    "FLUX, fused names": ("flux1-dev", "kohya-ldm", FLUX, ("transformer",)),
    "FLUX, split names": ("flux1-dev", "kohya", FLUX, ("transformer",)),
}
BASES = {
    "sd15": {"file": lambda p: real_shapes.ldm_file(p, "sd15")},
    "sdxl": {
        "file": lambda p: real_shapes.ldm_file(p, "sdxl"),
        "folder": lambda p: real_shapes.folder(p, "sdxl", "unet", "text_encoder", "text_encoder_2"),
    },
    "flux1-dev": {"file": real_shapes.bfl_file, "folder": lambda p: real_shapes.folder(p, "flux1-dev", "transformer")},
}


@pytest.mark.parametrize("case", REAL)
def test_an_adapter_of_real_size_finds_every_layer_in_every_layout(case, tmp_path):
    name, dialect, endings, components = REAL[case]
    adapter = lora_file(tmp_path / "lora.safetensors", name, dialect, endings, *components)
    base = catalog.get(name)
    wanted = {la for la, _ in base.layers() if la.endswith(endings) and la.split(".")[0] in components}
    if "fused" in case:  # an adapter of fused modules changes all of their layers
        places = table(base).fused(dialect)
        wanted |= {p.layer for la in wanted for p in places.get(table(base).spell(la, dialect), ())}
    for layout, make in BASES[name].items():
        plan = plan_merge(make(tmp_path / f"{layout}.safetensors"), [(adapter, 0.5)])
        assert plan.adapters[0].missing == {}
        assert {t.layer for tensor in plan.tensors for t in tensor.targets} == wanted
        rows = {t.layer: t.placement.rows for tensor in plan.tensors for t in tensor.targets}
        for layer, held in rows.items():
            shape = base.module(layer).shape
            assert held is None or held[1] - held[0] == shape[0], layer
        stored = sum(t.info.nbytes for t in plan.tensors)
        assert plan.bytes_to_touch == stored and plan.bytes_of_weights == plan.tree.nbytes


# --- whose module is it ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """A pipeline folder with two text encoders of the same names and sizes."""
    folder = tmp_path_factory.mktemp("sdxl")
    tiny.save(tiny.sdxl(), folder)
    return folder


@pytest.fixture(scope="module")
def text():
    """Layers of both text encoders."""
    return tiny.layers(tiny.sdxl(), "q_proj", "fc1")


def only(shapes, component):
    return {n: s for n, s in shapes.items() if n.startswith(f"{component}.")}


def weights(folder) -> dict[str, torch.Tensor]:
    return {layer: read(place) for layer, place in weight_files(folder).items()}


def test_names_that_fit_two_text_encoders_ask_and_are_merged_where_they_are_told(sdxl, text, tmp_path):
    mine = made.lora(only(text, "text_encoder_2"))
    write(mine, tmp_path / "peft", format="peft-lora", base=sdxl)
    with pytest.raises(AmbiguousError, match="text_encoder and text_encoder_2"):
        plan_merge(sdxl, [(tmp_path / "peft", 1.0)])
    merge(sdxl, [(tmp_path / "peft", 0.5)], tmp_path / "out", component="text_encoder_2")
    before, after = weights(sdxl), weights(tmp_path / "out")
    for layer, weight in before.items():
        wanted = weight + 0.5 * mine[layer].dense() if layer in mine.layers else weight
        assert torch.allclose(after[layer], wanted, rtol=1e-6, atol=1e-7), layer
    assert plan_merge(sdxl / "text_encoder_2", [(tmp_path / "peft", 1.0)]).adapters[0].matched == len(mine)


def test_an_adapter_for_a_text_encoder_is_told_that_the_base_has_none(sdxl, text, tmp_path):
    both = {**text, **tiny.layers(tiny.sdxl(), "to_q")}
    for format_name in ("kohya-lora", "krona", "diffusers-lora"):
        path = tmp_path / f"{format_name}.safetensors"
        write(made.lora(both), path, format=format_name, base=sdxl)
        with pytest.raises(BaseMismatchError, match=r"has no text encoder") as caught:
            plan_merge(sdxl / "unet", [(path, 1.0)])
        unet = len(both) - len(text)
        assert f"{unet} of {len(both)} modules" in str(caught.value) and "--component" in caught.value.fix
        for options in ({"component": "unet"}, {"allow_missing": True}):
            plan = plan_merge(sdxl / "unet", [(path, 1.0)], **options)
            assert plan.adapters[0].matched == unet == len(plan.tensors)


def test_one_folder_per_component_is_one_adapter(sdxl, text, tmp_path):
    both = made.lora({**text, **tiny.layers(tiny.sdxl(), "to_q")})
    write(both, tmp_path / "peft", format="peft-lora", base=sdxl)
    plan = plan_merge(sdxl, [(tmp_path / "peft", 1.0)])
    assert plan.adapters[0].match_summary == f"{len(both)} of {len(both)} modules matched"
    shutil.copytree(sdxl / "unet", tmp_path / "alone/unet")
    report = merge(tmp_path / "alone", [(tmp_path / "peft", 1.0)], tmp_path / "out", allow_missing=True)
    assert report.adapters[0].matched == len(both) - len(text) and len(report.adapters[0].missing) == len(text)


def test_a_recorded_base_says_nothing_of_a_lone_text_encoder(sdxl, text, tmp_path):
    whole = replace(made.lora(only(text, "text_encoder")), base=load_base(sdxl).model)
    alone = replace(whole, base=load_base(sdxl / "text_encoder").model)
    for base, adapter in ((sdxl / "text_encoder", whole), (sdxl, alone)):
        assert len(plan_merge(base, [(adapter, 1.0)]).tensors) == len(whole)


def test_a_base_that_a_reader_has_guessed_is_no_record(tmp_path):
    path = lora_file(tmp_path / "a.safetensors", "sd15", "kohya", ("mid_block.attentions.0.proj_in",), "unet")
    name = "unet.mid_block.attentions.0.proj_in"
    slice_ = real_shapes.write(
        tmp_path / "unet/model.safetensors", {"mid_block.attentions.0.proj_in.weight": (1280, 1280, 1, 1)}
    )
    adapter = krona_read(path)
    assert adapter.base.family == "sd15" and set(adapter.layers) == {name}
    for source in (path, adapter):
        assert len(plan_merge(slice_.parent, [(source, 1.0)]).tensors) == 1
    write(krona_read(path, base="sd15"), tmp_path / "native.safetensors")
    with pytest.raises(BaseMismatchError, match="was made for sd15"):
        plan_merge(slice_.parent, [(tmp_path / "native.safetensors", 1.0)])


def test_the_component_must_be_one(sdxl, text):
    with pytest.raises(UsageError, match="Unknown component 'vae'"):
        plan_merge(sdxl, [(made.lora(text), 1.0)], component="vae")


# --- other messages --------------------------------------------------------------------------------------------------


def test_a_real_adapter_on_the_wrong_base_says_where_it_belongs(tmp_path):
    adapter = shared("real", "weapons_sd15_r4.safetensors")
    for name, layouts in BASES.items():
        base = layouts["file"](tmp_path / f"{name}.safetensors")
        if name == "sd15":
            assert plan_merge(base, [(adapter, 1.0)]).adapters[0].match_summary == "128 of 128 modules matched"
            continue
        with pytest.raises(BaseMismatchError, match=r"\d+ of 128 modules") as caught:
            plan_merge(base, [(adapter, 1.0)])
        assert "an adapter for sd15" in caught.value.fix


def test_a_partial_match_says_where_the_adapter_belongs(tmp_path):
    adapter = lora_file(tmp_path / "a.safetensors", "sdxl", "kohya", ATTENTION, "unet", "text_encoder")
    with pytest.raises(BaseMismatchError, match=r"\d+ of 619 modules .* The delta is 640x2048") as caught:
        plan_merge(real_shapes.ldm_file(tmp_path / "b.safetensors", "sd15"), [(adapter, 1.0)])
    assert "an adapter for sdxl" in caught.value.fix


def test_a_checkpoint_in_a_folder_is_named(tmp_path):
    file = real_shapes.ldm_file(tmp_path / "folder/model.safetensors", "sd15")
    adapter = lora_file(tmp_path / "a.safetensors", "sd15", "kohya", ATTENTION, "unet")
    with pytest.raises(UnknownBaseError, match="contains a single-file checkpoint") as caught:
        plan_merge(file.parent, [(adapter, 1.0)])
    assert str(file) in caught.value.fix


def test_weights_that_a_merge_leaves_as_they_are_are_named(tmp_path):
    base = real_shapes.folder(tmp_path / "base", "sd15", "unet")
    real_shapes.write(base / "v1-5-pruned.safetensors", {"x": (4,)})
    adapter = lora_file(tmp_path / "a.safetensors", "sd15", "kohya", ATTENTION, "unet")
    assert any(
        "v1-5-pruned.safetensors also contains a complete model" in n for n in plan_merge(base, [(adapter, 1.0)]).notes
    )
    file = real_shapes.ldm_file(tmp_path / "ema.safetensors", "sd15", more={"model_ema.x": (4,)})
    assert any("model_ema" in note for note in plan_merge(file, [(adapter, 1.0)]).notes)


# --- errors of reading, raised by the plan ---------------------------------------------------------------------------


@pytest.fixture
def kohya(sdxl, text, tmp_path):
    path = tmp_path / "kohya.safetensors"
    write(made.lora(text), path, format="kohya-lora", base=sdxl)
    return path


def twice(tensors):
    """Each module of the first text encoder under another of its names too."""
    return tensors | {n.replace("te1_text_model_", "te1_"): t.clone() for n, t in tensors.items() if "te1_" in n}


def endless(tensors):
    return {n: t * torch.inf if n.endswith("alpha") else t for n, t in tensors.items()}


@pytest.mark.parametrize(("broken", "error"), [(twice, ConflictError), (endless, ScaleError)])
def test_a_file_that_reading_refuses_is_refused_by_the_plan(broken, error, sdxl, kohya):
    save_file(broken(load_file(kohya)), kohya)
    with pytest.raises(error):
        plan_merge(sdxl, [(kohya, 1.0)], allow_missing=True)
    with pytest.raises(error):
        merge(sdxl, [(kohya, 1.0)], kohya.parent / "out", allow_missing=True)
    assert not (kohya.parent / "out").exists()


def test_adapters_in_memory_are_told_apart(sdxl, text):
    wrong = made.lora({"unet.nowhere": (4, 6)})
    with pytest.raises(BaseMismatchError, match="modules of adapter 2 matched"):
        plan_merge(sdxl, [(made.lora(text), 1.0), (wrong, 1.0)])


def test_a_plan_and_its_record_name_every_adapter(sdxl, text, kohya, tmp_path):
    out = tmp_path / "out"
    merge(sdxl, [(kohya, 0.5), (made.lora(text), -1.0)], out)
    record = read_header(out / "text_encoder/model.safetensors").metadata[RECORD]
    assert '"kohya.safetensors"' in record and '"adapter 2"' in record
