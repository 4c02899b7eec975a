"""How the samples were made: `python tests/samples/make_samples.py [NAME …]`. Existing files are replaced.

Each sample is an adapter of the base model tiny-scenes that the named library trained (here: perturbed) and saved
itself. Beside it lies what it means, `<name>.delta.safetensors`: W' − W of every parameter that changes, measured in
float64 through the forward passes of that library. See README.md.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from krona_hub.assets.shipped import folder_of
from tests.samples.measuring import deltas, perturb

HERE = Path(__file__).parent
BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
OUT, KEY = f"{BLOCK}.attn1.to_out.0", f"{BLOCK}.attn2.to_k"  # linear: 80 × 80 with a bias, 80 × 128 without
PROJECTION = "down_blocks.0.attentions.0.proj_in"  # convolution 1×1, 80 ← 80
CONV_IN, CONV_OUT = "conv_in", "conv_out"  # convolutions 3×3, 80 ← 8 and 8 ← 80
LAYER_NORM, GROUP_NORM, LAST_NORM = f"{BLOCK}.norm1", "down_blocks.1.resnets.0.norm2", "conv_norm_out"
TEXT_QUERY, TEXT_NORM, TEXT_LAST_NORM = "encoder.layers.0.self_attn.q_proj", "encoder.layers.1.layer_norm1", \
    "final_layer_norm"  # fmt: skip


@dataclass(frozen=True)
class Sample:
    """One adapter: the maker of its library, the modules that change, and the options of the library."""

    make: Callable[[Sample, Path, int], dict[str, Tensor]]
    modules: tuple[str, ...]
    format: str
    note: str = ""
    needs_base: bool = False  # the file alone does not determine W' − W
    norms: tuple[str, ...] = ()
    text: tuple[str, ...] = ()  # modules of the text encoder
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    @property
    def description(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items() if key != "modules_to_save")
        return options + ("" if self.dtype == torch.float32 else f", {str(self.dtype).removeprefix('torch.')}")


def component(name: str) -> nn.Module:
    """A component of tiny-scenes in float32, without the path that `from_pretrained` would record in its adapters."""
    folder = folder_of("tiny-scenes") / name
    config = json.loads((folder / "config.json").read_text())
    if name == "unet":
        from diffusers import UNet2DConditionModel

        model = UNet2DConditionModel.from_config(config)
    else:
        from transformers import CLIPTextConfig, CLIPTextModel

        model = CLIPTextModel(CLIPTextConfig(**config))
    weights = load_file(next(folder.glob("*.safetensors")))
    own = model.state_dict()
    fitting = {key if key in own else key.removeprefix("text_model."): value for key, value in weights.items()}
    model.load_state_dict(fitting)
    return model.float().eval().requires_grad_(False)


# --- peft ------------------------------------------------------------------------------------------------------------


def peft_sample(sample: Sample, path: Path, seed: int) -> dict[str, Tensor]:
    """Write the folder that `save_pretrained` writes, and measure what the model computes."""
    from peft import LoraConfig, get_peft_model

    name, modules = ("text_encoder", sample.text) if sample.text else ("unet", sample.modules)
    model = component(name)
    targets = list(modules)
    wrapped = get_peft_model(model, LoraConfig(target_modules=targets, **sample.options))
    perturb({n: p for n, p in wrapped.named_parameters() if p.requires_grad}, seed, sample.dtype)
    state = {key: value.to(sample.dtype) for key, value in wrapped.state_dict().items()}
    wrapped.save_pretrained(path, state_dict=state)
    (path / "README.md").unlink()
    in_file_order(path / "adapter_config.json")
    changed = {*modules, *sample.options.get("modules_to_save", ())}
    return deltas(component(name).double(), wrapped.double().eval().base_model.model, name, changed)


def in_file_order(config: Path) -> None:
    """Sort the lists of a PEFT configuration, which are sets in memory and differ from run to run."""
    fields = json.loads(config.read_text())
    fields["target_modules"] = sorted(fields["target_modules"])
    config.write_text(json.dumps(fields, indent=2, sort_keys=True))


# --- lycoris ---------------------------------------------------------------------------------------------------------


def lycoris_sample(sample: Sample, path: Path, seed: int) -> dict[str, Tensor]:
    """Write the file of `create_lycoris`, and measure the model that it is applied to."""
    from lycoris import create_lycoris

    model = component("unet")
    targets = [*sample.modules, *sample.norms]
    with tempfile.TemporaryDirectory() as folder:
        preset = Path(folder) / "preset.toml"
        preset.write_text(f"target_module = []\ntarget_name = {json.dumps(targets)}\nuse_fnmatch = true\n")
        network = create_lycoris(model, 1.0, preset=str(preset), **sample.options)
    network.apply_to()
    save_network(network, sample, path, seed)
    return deltas(component("unet").double(), model.double(), "unet", set(targets))


def kohya_sample(sample: Sample, path: Path, seed: int) -> dict[str, Tensor]:
    """The same through `lycoris.kohya`, as sd-scripts calls it, for the U-Net and the text encoder."""
    from lycoris.kohya import create_network

    unet, text, targets = component("unet"), component("text_encoder"), [*sample.modules, *sample.norms]
    with tempfile.TemporaryDirectory() as folder:
        preset = Path(folder) / "preset.toml"
        preset.write_text(
            f"unet_target_module = []\nunet_target_name = {json.dumps(targets)}\nuse_fnmatch = true\n"
            f"text_encoder_target_module = []\ntext_encoder_target_name = {json.dumps(sample.text)}\n"
        )
        options = dict(sample.options)
        sizes = options.pop("linear_dim"), options.pop("linear_alpha")
        network = create_network(1.0, *sizes, None, text, unet, preset=str(preset), **options)
    network.apply_to(text, unet, True, True)
    save_network(network, sample, path, seed)
    found = deltas(component("unet").double(), unet.double(), "unet", set(targets))
    return found | deltas(component("text_encoder").double(), text.double(), "text_encoder", set(sample.text))


def save_network(network: Any, sample: Sample, path: Path, seed: int) -> None:
    perturb(dict(network.named_parameters()), seed, sample.dtype)
    network.save_weights(str(path), sample.dtype, None)
    network.requires_grad_(False).double().eval()


# --- the samples -----------------------------------------------------------------------------------------------------

PEFT = {"make": peft_sample, "format": "peft_lora"}
LYCORIS = {"make": lycoris_sample}
SIZES = {"linear_dim": 3, "linear_alpha": 2, "conv_dim": 2, "conv_alpha": 1}

SAMPLES = {
    "peft_lora_pissa_r3_a5": Sample(
        **PEFT, modules=(OUT, KEY), options={"r": 3, "lora_alpha": 5, "init_lora_weights": "pissa"}, needs_base=True,
        note="trained on W − s·B₀A₀, the singular vectors of W: W' − W = s·(BA − B₀A₀)",
    ),
    "peft_lora_pissa_rslora_r2_a3": Sample(
        **PEFT, modules=(KEY,), needs_base=True,
        options={"r": 2, "lora_alpha": 3, "init_lora_weights": "pissa", "use_rslora": True},
        note="the same with scale alpha/sqrt(r)",
    ),
    "peft_lora_olora_r3_a5": Sample(
        **PEFT, modules=(OUT, KEY), options={"r": 3, "lora_alpha": 5, "init_lora_weights": "olora"}, needs_base=True,
        note="trained on W − s·QᵣRᵣ of the QR decomposition of W",
    ),
    "peft_lora_rslora_r4_a2": Sample(
        **PEFT, modules=(OUT, KEY, CONV_IN), options={"r": 4, "lora_alpha": 2, "use_rslora": True},
        note="scale alpha/sqrt(r)",
    ),
    "peft_lora_lora_bias_r3_a5": Sample(
        **PEFT, modules=(OUT, PROJECTION, CONV_IN), options={"r": 3, "lora_alpha": 5, "lora_bias": True},
        note="lora_B.bias, scaled like BA",
    ),
    "peft_lora_modules_to_save_r3_a5": Sample(
        **PEFT, modules=(KEY,), needs_base=True,
        options={"r": 3, "lora_alpha": 5, "modules_to_save": [CONV_OUT, LAST_NORM, OUT]},
        note="full values of a convolution, a norm and a linear layer with their biases",
    ),
    "peft_lora_modules_to_save_bf16_r3_a2": Sample(
        **PEFT, modules=(KEY,), needs_base=True, dtype=torch.bfloat16,
        options={"r": 3, "lora_alpha": 2, "modules_to_save": [CONV_OUT, LAYER_NORM]},
        note="full values rounded to bfloat16: W' is the stored value, W the base in its own dtype",
    ),
    "peft_lora_bias_all_r3_a5": Sample(
        **PEFT, modules=(OUT, KEY), options={"r": 3, "lora_alpha": 5, "bias": "all"}, needs_base=True,
        note="full values of every bias of the component, those of norms, too",
    ),
    "peft_lora_bias_lora_only_r3_a5": Sample(
        **PEFT, modules=(OUT, PROJECTION, CONV_IN), needs_base=True,
        options={"r": 3, "lora_alpha": 5, "bias": "lora_only"}, note="full values of the biases of the adapted layers",
    ),
    "peft_lora_dora_r3_a5": Sample(
        **PEFT, modules=(OUT, KEY, PROJECTION, CONV_IN), options={"r": 3, "lora_alpha": 5, "use_dora": True},
        needs_base=True, note="lora_magnitude_vector (out,) / (1,out,1,1)",
    ),
    "peft_lora_te_modules_to_save_r2_a6": Sample(
        **PEFT, modules=(), text=(TEXT_QUERY,), needs_base=True,
        options={"r": 2, "lora_alpha": 6, "modules_to_save": [TEXT_NORM, TEXT_LAST_NORM]},
        note="component text_encoder: full values of two norms",
    ),
    "lyc_lokr_norm_f4_dim2_a1": Sample(
        **LYCORIS, format="lycoris_lokr", modules=(OUT, KEY, CONV_IN), norms=(LAYER_NORM, LAST_NORM),
        options={"algo": "lokr", "linear_dim": 2, "linear_alpha": 1, "factor": 4, "train_norm": True},
        note="w_norm, b_norm beside LoKr",
    ),
    "lyc_locon_norm_dim3_a2_conv2_a1": Sample(
        **LYCORIS, format="lycoris_locon", modules=(KEY, PROJECTION, CONV_IN), norms=(LAYER_NORM, GROUP_NORM),
        options={"algo": "locon", **SIZES, "train_norm": True}, note="w_norm, b_norm beside LoCon",
    ),
    "lyc_full": Sample(
        **LYCORIS, format="lycoris_locon", modules=(OUT, KEY, CONV_OUT),
        options={"algo": "full"}, note="diff, and diff_b where the layer has a bias",
    ),
    "lyc_norm": Sample(
        **LYCORIS, format="lycoris_locon", modules=(), norms=(LAYER_NORM, GROUP_NORM, LAST_NORM),
        options={"algo": "full", "train_norm": True}, note="w_norm, b_norm alone: no layer changes",
    ),
    "lyc_loha_dim3_a2_conv2_a1": Sample(
        **LYCORIS, format="lycoris_loha", modules=(OUT, KEY, PROJECTION, CONV_IN), options={"algo": "loha", **SIZES},
        note="linear layers, convolutions 1×1 and 3×3",
    ),
    "lyc_loha_bf16_dim3_a2_conv2_a1": Sample(
        **LYCORIS, format="lycoris_loha", modules=(KEY, CONV_IN), options={"algo": "loha", **SIZES},
        dtype=torch.bfloat16, note="every tensor BF16, alpha included",
    ),
    "lyc_loha_tucker_dim3_a2_conv2_a1": Sample(
        **LYCORIS, format="lycoris_loha", modules=(KEY, CONV_IN, CONV_OUT),
        options={"algo": "loha", **SIZES, "use_tucker": True}, note="hada_t1, hada_t2 (CP) of convolutions 3×3",
    ),
    "lyc_loha_dora_out_dim3_a2_conv2_a1": Sample(
        **LYCORIS, format="lycoris_loha", modules=(KEY, CONV_IN), options={"algo": "loha", **SIZES, "dora_wd": True},
        needs_base=True, note="dora_scale (out,1[,1,1])",
    ),
    "lyc_loha_dora_in_dim3_a2_conv2_a1": Sample(
        **LYCORIS, format="lycoris_loha", modules=(KEY, CONV_IN), needs_base=True,
        options={"algo": "loha", **SIZES, "dora_wd": True, "wd_on_output": False}, note="dora_scale (1,in[,1,1])",
    ),
    "lyckohya_loha_norm_te_rslora_dim3_a2": Sample(
        make=kohya_sample, format="lycoris_loha", modules=(OUT, CONV_OUT), norms=(LAYER_NORM,),
        text=(TEXT_QUERY, TEXT_NORM), options={"algo": "loha", **SIZES, "rs_lora": True, "train_norm": True},
        note="lora_unet_ and lora_te_ names; stored alpha = alpha*sqrt(rank)",
    ),
}  # fmt: skip


def main(names: list[str]) -> None:
    for seed, (name, sample) in enumerate(SAMPLES.items()):
        if names and name not in names:
            continue
        path = HERE / (name if sample.make is peft_sample else f"{name}.safetensors")
        if path.is_dir():
            shutil.rmtree(path)
        torch.manual_seed(seed)
        with torch.no_grad():
            meaning = sample.make(sample, path, 1000 + seed)
        save_file({key: value.float() for key, value in meaning.items()}, HERE / f"{name}.delta.safetensors")
        print(name, len(meaning), file=sys.stderr)
    write_index()


def write_index() -> None:
    entries = []
    for name, sample in SAMPLES.items():
        library = "peft" if sample.make is peft_sample else "lycoris-lora"
        entries.append({
            "name": name,
            "format": sample.format,
            "adapter": name if sample.make is peft_sample else f"{name}.safetensors",
            "delta": f"{name}.delta.safetensors",
            "producer": f"{library} {version(library)}",
            "options": sample.description,
            "note": sample.note,
            "needs_base": sample.needs_base,
        })  # fmt: skip
    (HERE / "index.json").write_text(json.dumps({"base": "tiny-scenes", "samples": entries}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
