"""Which tools load a file: said from headers alone, and true where the tool can be asked."""

import pytest

from krona_hub.bases import catalog
from krona_hub.formats.compatibility.tools import TOOLS, loads_in
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.writing.writer import write
from tests import tiny
from tests.formats import made
from tests.shared import shared


def golden(name):
    return loads_in(describe(shared("golden", name), base=str(shared("golden", "base"))))


@pytest.mark.parametrize("tool", TOOLS)
def test_what_is_written_for_a_tool_is_said_to_load_in_it(tool, tmp_path):
    pipe = tiny.sd15()
    shapes = {k: s for k, s in tiny.layers(pipe, "to_q", "to_out.0", "ff.net.0.proj").items() if k.startswith("unet")}
    base = tiny.save(pipe, tmp_path)
    adapters = {"lora": made.lora(shapes), "lokr": made.lokr(shapes, made.by_lycoris(4), (2,))}
    for kind, adapter in adapters.items():
        if getattr(TOOLS[tool], kind) is not None:
            report = write(adapter, tmp_path / kind, tool=tool, base=base)
            verdict = loads_in(describe(report.path, base=base, component="unet"))[tool]
            assert verdict.ok, verdict.why


@pytest.mark.parametrize(
    ("name", "tool", "why"),
    [
        ("lyc_tucker_dim2_a1.safetensors", "lycoris", "Tucker"),
        ("lyc_unbalanced_f4_dim3_a1.safetensors", "lycoris", "a shape other than"),
        ("lyc_dora_in_dim3_a1.safetensors", "lycoris", "DoRA"),
        ("lyc_dora_out_dim2_a1.safetensors", "comfyui", "DoRA"),
        ("lyc_dora_out_dim2_a1.safetensors", "a1111", "DoRA"),
        ("lyc_f4_dim2_a1.safetensors", "diffusers", "LoKr"),
        ("lyc_f4_dim2_a1.safetensors", "nunchaku", "LoRA only"),
        ("lyckohya_te_f4_dim2_a1.safetensors", "comfyui", "text_model_"),
        ("kohya_lora_dim4_a1_conv2_a1.safetensors", "peft", "folder"),
        ("diffusers_pipe_lora_dreambooth_r2_a2.safetensors", "diffusers", "old and new key names"),
        ("diffusekrona_a1_8_a2_4.safetensors", "diffusers", "fails"),
        ("peft_lokr_r8_a8", "comfyui", "only PEFT"),
    ],
)
def test_known_troubles_are_told(name, tool, why):
    verdict = golden(name)[tool]
    assert not verdict.ok and why in verdict.why, verdict


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("lyc_f4_dim2_a1.safetensors", "comfyui"),
        ("lyc_f4_dim2_a1.safetensors", "lycoris"),
        ("lyc_dora_in_dim3_a1.safetensors", "comfyui"),
        ("lyc_dora_out_dim2_a1.safetensors", "lycoris"),
        ("kohya_lora_dim4_a1_conv2_a1.safetensors", "comfyui"),
        ("kohya_lora_dim4_a1_conv2_a1.safetensors", "kohya"),
        ("diffusers_pipe_lora_peftkeys_r4_a4.safetensors", "diffusers"),
        ("diffusers_unet_lokr_r3_a2.safetensors", "diffusers"),
        ("peft_lokr_r8_a8", "peft"),
    ],
)
def test_files_without_trouble_are_welcome(name, tool):
    verdict = golden(name)[tool]
    assert verdict.ok, verdict.why


def test_diffusers_loses_the_alphas_that_we_say_it_loses(tmp_path):
    pipe = tiny.sd15()
    adapter = made.lora(tiny.layers(pipe, "to_q", "to_k", "to_v", "to_out.0"), ranks=(2, 3))
    base = tiny.save(pipe, tmp_path)
    report = write(adapter, tmp_path / "x.safetensors", format="kohya-lora", base=base)
    assert "alphas" in loads_in(describe(report.path, base=base))["diffusers"].why
    pipe.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    got, want = tiny.output(pipe.unet), tiny.output(tiny.added(tiny.sd15(), adapter).unet)
    assert (got - want).abs().max() > 1e-3 * want.abs().max(), "diffusers has learned it: take the check out"


def test_every_base_is_named_as_the_catalog_names_it():
    from krona_hub.formats.compatibility.known_failures import LOKR_PIPELINES
    from krona_hub.formats.writing.kohya_metadata import BASES

    assert set(BASES) <= set(catalog.names())
    assert all(any(name.startswith(family) for name in catalog.names()) for family in LOKR_PIPELINES)
