"""Files for diffusers, loaded by diffusers: the model must compute what base + ΔW computes."""

import warnings

import pytest
import torch

from krona_hub.errors import InexpressibleError, UnknownBaseError
from krona_hub.formats.writing.writer import write
from tests import tiny
from tests.formats import made

PIPELINES = {"sd15": tiny.sd15, "sdxl": tiny.sdxl, "flux": tiny.flux}
ALL = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "proj_in", "proj_out", "ff.net.0.proj", "norm1.linear",
       "conv1", "time_emb_proj", "conv_shortcut", "q_proj", "out_proj", "fc1")  # fmt: skip


def assert_equal_outputs(pipe, reference, least_effect=1e-2, of=None):
    """Within float32 rounding of each other, and far from the base alone."""
    base, got, want = (tiny.outputs(p) for p in (PIPELINES[pipe_name(pipe)](), pipe, reference))
    for name in of or want:
        size = want[name].abs().max()
        assert (want[name] - base[name]).abs().max() > least_effect * size, f"{name} is hardly adapted"
        assert (got[name] - want[name]).abs().max() < 1e-5 * size, name


def pipe_name(pipe):
    return {"StableDiffusionPipeline": "sd15", "StableDiffusionXLPipeline": "sdxl", "FluxPipeline": "flux"}[
        type(pipe).__name__
    ]


def load(pipe, path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # "keys did not match any targeted module and were ignored"
        pipe.load_lora_weights(str(path.parent), weight_name=path.name)
    return pipe


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_loads_the_lora_file_with_every_module_and_scale(name, tmp_path):
    pipe = PIPELINES[name]()
    adapter = made.lora(tiny.layers(pipe, *ALL))
    report = write(adapter, tmp_path / "x.safetensors", format="diffusers-lora", base=tiny.save(pipe, tmp_path))
    assert report.layers == len(adapter) and report.worst_difference < 1e-6
    assert_equal_outputs(load(pipe, report.path), tiny.added(PIPELINES[name](), adapter))


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_loads_a_lora_written_for_the_tool_diffusers_which_needs_the_base(name, tmp_path):
    pipe = PIPELINES[name]()
    adapter, path = made.lora(tiny.layers(pipe, "to_q", "fc1", "k_proj")), tmp_path / "x.safetensors"
    with pytest.raises(UnknownBaseError, match=r"module names that diffusers expects.*--base"):
        write(adapter, path, tool="diffusers")
    assert not path.exists()
    report = write(adapter, path, tool="diffusers", base=tiny.save(pipe, tmp_path))
    assert_equal_outputs(load(pipe, report.path), tiny.added(PIPELINES[name](), adapter), 1e-3)


def test_a_text_encoder_that_pipelines_would_stumble_over_is_refused_for_them_and_only_for_them(tmp_path):
    pipe = tiny.sd15()
    adapter, base = made.lora(tiny.layers(pipe, "to_q", "fc1")), tiny.save(pipe, tmp_path)
    with pytest.raises(InexpressibleError, match=r"text_encoder.*peft-lora"):
        write(adapter, tmp_path / "x.safetensors", tool="diffusers", base=base)
    assert not (tmp_path / "x.safetensors").exists()
    report = write(adapter, tmp_path / "x.safetensors", format="diffusers-lora", base=base)
    with pytest.raises(ValueError, match="Could not automatically infer"):
        load(tiny.sd15(), report.path)


def test_a_pipeline_loads_the_dora_of_a_unet(tmp_path):
    pipe = tiny.sdxl()
    plain = made.only(made.lora(tiny.layers(pipe, *ALL)), "unet")
    adapter = made.as_dora(plain, lambda layer: tiny.module_of(pipe, layer).weight)
    report = write(adapter, tmp_path / "x.safetensors", format="diffusers-lora", base=tiny.save(pipe, tmp_path))
    assert_equal_outputs(load(pipe, report.path), tiny.added(tiny.sdxl(), adapter), of=["unet"])


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_pipelines_load_kohya_files_of_one_rank(name, tmp_path):
    pipe = PIPELINES[name]()
    adapter = made.lora(tiny.layers(pipe, *ALL), ranks=(3,))
    report = write(adapter, tmp_path / "x.safetensors", format="kohya-lora", base=tiny.save(pipe, tmp_path))
    assert_equal_outputs(load(pipe, report.path), tiny.added(PIPELINES[name](), adapter))


def test_the_flux_pipeline_splits_our_fused_projections_again(tmp_path):
    pipe = tiny.flux()  # its converter knows the sizes of linear1 in the real model only: double blocks here
    adapter = made.lora(
        {k: s for k, s in tiny.layers(pipe, "attn.to_q", "attn.to_k", "attn.to_v", "fc1").items() if "single" not in k}
    )
    report = write(adapter, tmp_path / "x.safetensors", format="kohya-lora", base=tiny.save(pipe, tmp_path))
    assert report.modules == len(adapter) - 2, "q, k and v are one module"
    assert_equal_outputs(load(pipe, report.path), tiny.added(tiny.flux(), adapter))


LOKRS = {
    "factor 4": (made.by_peft(4), (None, 2)),
    "no factor": (made.by_peft(-1), (1, 3)),
    "factor 16, not swapped": (made.by_peft(16), (None, 1)),
}


@pytest.mark.parametrize("kind", LOKRS)
def test_load_lora_adapter_takes_the_lokr_of_a_unet_with_convolutions(kind, tmp_path):
    split, ranks = LOKRS[kind]
    pipe = tiny.sd15()
    adapter = made.only(made.lokr(tiny.layers(pipe, *ALL), split, ranks), "unet")
    report = write(adapter, tmp_path / "x.safetensors", tool="diffusers", base=tiny.save(pipe, tmp_path))
    assert report.format == "diffusers-lokr" and "load_lora_adapter" in report.notes[0]
    pipe.unet.load_lora_adapter(str(tmp_path), weight_name="x.safetensors", prefix=None)
    assert_equal_outputs(pipe, tiny.added(tiny.sd15(), adapter), of=["unet"])


def test_a_lokr_of_two_components_or_of_no_single_factor_is_refused_for_diffusers(tmp_path):
    shapes = tiny.layers(tiny.sd15(), "to_q", "fc1", "ff.net.0.proj")
    with pytest.raises(InexpressibleError, match="supports a single component"):
        write(made.lokr(shapes, made.by_peft(4)), tmp_path / "x.safetensors", format="diffusers-lokr")
    mixed = {k: d for f, end in ((4, "to_q"), (2, "proj")) for k, d in made.lokr(shapes, made.by_peft(f)).layers.items()
             if k.endswith(end) and k.startswith("unet")}  # fmt: skip
    with pytest.raises(InexpressibleError, match="decompose_factor"):
        write(made.only(made.lora({}), "unet").with_layers(mixed), tmp_path / "x.safetensors", format="diffusers-lokr")
    assert not list(tmp_path.iterdir())


def test_half_precision_is_what_was_asked_for(tmp_path):
    pipe = tiny.sd15()
    adapter = made.lora(tiny.layers(pipe, *ALL))
    folder = tiny.save(pipe, tmp_path)
    report = write(adapter, tmp_path / "x.safetensors", tool="diffusers", base=folder, dtype=torch.bfloat16)
    assert report.worst_difference < 1e-6, "compared with what was meant, which is rounded"
    got, want = tiny.outputs(load(pipe, report.path)), tiny.outputs(tiny.added(tiny.sd15(), adapter))
    assert (got["unet"] - want["unet"]).abs().max() < 0.05 * want["unet"].abs().max()
