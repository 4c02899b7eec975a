"""Checkpoints in different layouts, and everything in them that is no layer."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from krona_hub import read
from krona_hub.bases import ldm_names
from krona_hub.bases.module_spec import ModuleSpec
from krona_hub.errors import BaseMismatchError, NotFoundError, UnknownBaseError, UnsupportedError
from krona_hub.extraction import extract
from tests import tiny
from tests.extraction.made import lora, pair
from tests.hub.fixtures import client_home, hub, no_waiting

__all__ = ["client_home", "hub", "no_waiting"]


def tuned_copy(pipe, rank=2):
    """The pipeline with a LoRA in every attention projection of the denoiser and in a norm and a bias."""
    generator = torch.Generator().manual_seed(5)
    model = next(iter(tiny.components(pipe).values()))
    for path, module in model.named_modules():
        if path.endswith(("to_q", "to_v", "to_out.0")):
            out, in_ = module.weight.shape
            delta = torch.randn(out, rank, generator=generator) @ torch.randn(rank, in_, generator=generator)
            module.weight.data += 0.05 * module.weight.norm() / delta.norm() * delta
    return pipe


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny SDXL, and one that was tuned: a LoRA, a norm, a bias, an embedding."""
    home = tmp_path_factory.mktemp("sdxl")
    tiny.save(tiny.sdxl(), home / "base")
    pipe = tuned_copy(tiny.sdxl())
    pipe.unet.conv_norm_out.weight.data += 0.5
    pipe.unet.conv_in.bias.data += 0.25
    pipe.text_encoder.get_input_embeddings().weight.data[3] += 1
    tiny.save(pipe, home / "tuned")
    return home


def as_ldm(folder, file):
    """The U-Net of a folder under the names of ldm, in one file."""
    weights = load_file(next((folder / "unet").glob("*.safetensors")))
    modules = {name.rpartition(".")[0]: ModuleSpec((1,)) for name in weights}
    names = {places[0].layer: other for other, places in ldm_names.names(modules).items()}
    renamed = {n: (names[n.rpartition(".")[0]], n.rpartition(".")[2]) for n in weights}
    save_file({f"model.diffusion_model.{'.'.join(renamed[n])}": w for n, w in weights.items()}, file)
    return file


def layers(report):
    return {(x.layer, x.form) for x in report.layers}


def test_a_pipeline_gives_its_loras_and_lists_what_else_changed(folders, tmp_path):
    report = extract(folders / "base", folders / "tuned", tmp_path / "x.safetensors")
    assert {form for _, form in layers(report)} == {"LoRA r2"}
    assert all(layer.startswith("unet.") for layer, _ in layers(report))
    assert {(o.name, o.kind, o.kept) for o in report.others} == {
        ("unet.conv_norm_out.weight", "norm", False),
        ("unet.conv_in.bias", "bias", False),
        ("text_encoder.embeddings.token_embedding.weight", "embedding", False),
    }
    assert report.not_captured == report.others
    assert not read(report.out).extras


@pytest.mark.slow
def test_a_folder_and_a_single_file_in_ldm_names_are_compared_layer_by_layer(folders, tmp_path):
    unet = extract(folders / "base", folders / "tuned", tmp_path / "x.safetensors", component="unet")
    old, new = (as_ldm(folders / n, tmp_path / f"{n}.safetensors") for n in ("base", "tuned"))
    pairs = {"a": (folders / "base", new), "b": (old, folders / "tuned"), "c": (old, new)}
    for name, (base, tuned) in pairs.items():
        report = extract(base, tuned, tmp_path / f"{name}.safetensors", base_name=folders / "base")
        assert layers(report) == layers(unet)
        assert {o.kind for o in report.others} == {"norm", "bias"}
        assert set(read(report.out).layers) == {x.layer for x in unet.layers}
    with pytest.raises(UnknownBaseError, match="Specify the base model by name"):
        extract(old, new, tmp_path / "d.safetensors")


@pytest.mark.parametrize("which", ["base", "tuned", "both"])
def test_ema_copies_are_left_out_and_mentioned(which, folders, tmp_path):
    files = {n: as_ldm(folders / n, tmp_path / f"{n}.safetensors") for n in ("base", "tuned")}
    plain = extract(*files.values(), tmp_path / "a.safetensors", base_name=folders / "base", also_vectors=True)
    for name in files if which == "both" else (which,):
        tensors = load_file(files[name])
        copies = {f"model_ema.{k.removeprefix('model.').replace('.', '')}": t.clone() for k, t in tensors.items()}
        save_file(tensors | copies, files[name])
    report = extract(*files.values(), tmp_path / "b.safetensors", base_name=folders / "base", also_vectors=True)
    assert layers(report) == layers(plain) and report.others == plain.others
    assert read(report.out).extras.keys() == read(plain.out).extras.keys()
    assert [any("model_ema" in note for note in r.notes) for r in (plain, report)] == [False, True]


def test_a_component_folder_and_its_lone_file_are_checkpoints_too(folders, tmp_path):
    whole = extract(folders / "base", folders / "tuned", tmp_path / "a.safetensors", component="unet")
    file = next((folders / "tuned" / "unet").glob("*.safetensors"))
    for base, tuned in ((folders / "base", folders / "tuned" / "unet"), (folders / "base" / "unet", file)):
        report = extract(base, tuned, tmp_path / "b.safetensors", overwrite=True)
        assert layers(report) == layers(whole)
        assert {o.name for o in report.others} == {"unet.conv_norm_out.weight", "unet.conv_in.bias"}


@pytest.mark.parametrize("make", [tiny.sd15, tiny.flux], ids=["sd15", "flux"])
def test_what_is_extracted_makes_the_tuned_model_of_the_base(make, tmp_path):
    tiny.save(make(), tmp_path / "base")
    tuned = tuned_copy(make())
    tiny.save(tuned, tmp_path / "tuned")
    report = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "x.safetensors")
    made = tiny.outputs(tiny.added(make(), read(report.out)))
    for component, wanted in tiny.outputs(tuned).items():
        torch.testing.assert_close(made[component], wanted, rtol=1e-4, atol=1e-4)


def test_the_wrong_base_is_told_by_its_shapes_or_its_names(folders, tmp_path):
    tiny.save(tiny.sd15(), tmp_path / "sd15")
    with pytest.raises(BaseMismatchError, match=r"unet\.\S+ is \[.*\] in .* and \[.*\] in"):
        extract(tmp_path / "sd15", folders / "tuned", tmp_path / "x.safetensors")
    tiny.save(tiny.flux(), tmp_path / "flux")
    with pytest.raises(BaseMismatchError, match="none of the"):
        extract(tmp_path / "flux" / "transformer", folders / "tuned" / "unet", tmp_path / "x.safetensors")


def test_a_name_alone_has_no_weights_to_subtract(folders, tmp_path):
    with pytest.raises(UnknownBaseError, match="sdxl is a catalog name"):
        extract("sdxl", folders / "tuned", tmp_path / "x.safetensors")
    with pytest.raises(NotFoundError):
        extract(tmp_path / "nothing.safetensors", folders / "tuned", tmp_path / "x.safetensors")


def test_quantised_checkpoints_are_refused(tmp_path):
    _, tuned, _ = pair(tmp_path, lora(2))
    whole = {n: (100 * t).to(torch.int8) for n, t in tuned.items()}
    save_file(whole, tmp_path / "tuned.safetensors")
    with pytest.raises(UnsupportedError, match=r"I8 .*quantized"):
        extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "x.safetensors")
    save_file(tuned | {"conv_in.scale_weight": torch.ones(1)}, tmp_path / "tuned.safetensors")
    with pytest.raises(UnsupportedError, match="is quantized"):
        extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "x.safetensors")


def test_plain_fp8_weights_are_compared_with_their_coarse_rounding(tmp_path):
    pair(tmp_path, lora(2), torch.float8_e4m3fn, base_dtype=torch.float16, share=0.3)
    report = extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "x.safetensors")
    assert {x.form for x in report.layers} == {"LoRA r2"}


def test_layers_that_one_of_both_lacks_are_told(tmp_path):
    _, tuned, _ = pair(tmp_path, lora(2))
    tuned.pop("conv_in.weight")
    save_file(tuned, tmp_path / "tuned.safetensors")
    report = extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", tmp_path / "x.safetensors")
    assert "the tuned checkpoint lacks 1 layers of the other, such as unet.conv_in" in report.notes[0]


def test_both_checkpoints_may_be_models_on_the_hub(folders, hub, tmp_path):
    for name in ("base", "tuned"):
        files = {p.relative_to(folders / name).as_posix(): p.read_bytes() for p in (folders / name).rglob("*.*")}
        repo = hub.state.create(f"somebody/{name}", files=files)
        repo.tags["v1"] = repo.head().sha
    report = extract("somebody/base", "somebody/tuned@v1", tmp_path / "x.safetensors")
    local = extract(folders / "base", folders / "tuned", tmp_path / "y.safetensors")
    assert layers(report) == layers(local)
