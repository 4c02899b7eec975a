"""The references of the samples are right: the formulas, applied to the stored tensors in float64, give the same."""

import json
from collections import defaultdict
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from krona_hub.adapters.adapter import canonical_name
from krona_hub.assets.shipped import folder_of

HERE = Path(__file__).parent
INDEX = json.loads((HERE / "index.json").read_text())
LIMIT = 1e-6  # the references are float64 results stored in float32; initial factors come from a float32 SVD or QR
NORM_PARTS = {"w_norm": ".weight", "b_norm": ".bias", "diff_b": ".bias"}


@lru_cache
def base_parameters():
    """All parameters of tiny-scenes by canonical name, in float64."""
    found = {}
    for component in ("unet", "text_encoder"):
        path = next((folder_of(INDEX["base"]) / component).glob("*.safetensors"))
        found |= {canonical_name(f"{component}.{key}"): value.double() for key, value in load_file(path).items()}
    return found


def grouped(tensors, known):
    """Tensors of each module: module name -> part -> float64 tensor; parts are the names in `known`."""
    modules = defaultdict(dict)
    for key, value in tensors.items():
        part = next(p for p in known if key.endswith("." + p))
        modules[key.removesuffix("." + part)][part] = value.double()
    return modules


def normalized(directed, magnitude, axis):
    others = [d for d in range(directed.ndim) if d != axis]
    return directed * magnitude / directed.square().sum(others, keepdim=True).sqrt()


# --- lycoris ---------------------------------------------------------------------------------------------------------

LYCORIS_PARTS = (
    "lora_down.weight", "lora_up.weight", "lokr_w1", "lokr_w2_a", "lokr_w2_b", "hada_w1_a", "hada_w1_b", "hada_w2_a",
    "hada_w2_b", "hada_t1", "hada_t2", "alpha", "dora_scale", "diff", *NORM_PARTS,
)  # fmt: skip


def lycoris_meaning(path):
    paths = {}
    for name in base_parameters():
        component, _, module = name.rpartition(".")[0].partition(".")
        flat = module.replace(".", "_")
        prefixes = ("lycoris", "lora_unet") if component == "unet" else ("lora_te",)
        paths |= {f"{prefix}_{flat}": f"{component}.{module}" for prefix in prefixes}
    found = {}
    for module, parts in grouped(load_file(path), LYCORIS_PARTS).items():
        name = paths[module]
        found |= {name + NORM_PARTS[part]: parts.pop(part) for part in tuple(parts) if part in NORM_PARTS}
        if parts:
            weight = base_parameters()[f"{name}.weight"]
            delta = lycoris_delta(parts).reshape(weight.shape)
            if "dora_scale" in parts:
                axis = 0 if len(parts["dora_scale"]) == len(weight) else 1
                delta = normalized(weight + delta, parts["dora_scale"], axis) - weight
            found[name] = delta
    return found


def lycoris_delta(parts):
    if "diff" in parts:
        return parts["diff"]
    if "lokr_w1" in parts:
        rank = len(parts["lokr_w2_b"])
        return parts["alpha"] / rank * torch.kron(parts["lokr_w1"], parts["lokr_w2_a"] @ parts["lokr_w2_b"])
    if "lora_up.weight" in parts:
        down, up = parts["lora_down.weight"], parts["lora_up.weight"]
        return parts["alpha"] / len(down) * (up.flatten(1) @ down.flatten(1))
    rank = len(parts["hada_w1_b"])
    halves = []
    for number in "12":
        a, b = parts[f"hada_w{number}_a"], parts[f"hada_w{number}_b"]
        core = parts.get(f"hada_t{number}")
        halves.append(a @ b if core is None else torch.einsum("pqyx,po,qi->oiyx", core, a, b))
    return parts["alpha"] / rank * halves[0] * halves[1]


# --- peft ------------------------------------------------------------------------------------------------------------

PEFT_PARTS = (
    "lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_magnitude_vector", "base_layer.bias", "weight", "bias",
)  # fmt: skip


def peft_meaning(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    base, found = base_parameters(), {}
    for key, parts in grouped(load_file(folder / "adapter_model.safetensors"), PEFT_PARTS).items():
        path = key.removeprefix("base_model.model.")
        name = next(c for c in (f"unet.{path}", f"text_encoder.{path}") if f"{c}.weight" in base)
        weight = base[f"{name}.weight"]
        if "lora_A.weight" in parts:
            found[name] = peft_delta(parts, weight, scale, config["init_lora_weights"])
        if "lora_B.bias" in parts:
            found[f"{name}.bias"] = scale * parts["lora_B.bias"]
        if "weight" in parts:
            found[f"{name}.weight" if weight.ndim == 1 else name] = parts["weight"] - weight
        for part in ("bias", "base_layer.bias"):
            if part in parts:
                found[f"{name}.bias"] = parts[part] - base[f"{name}.bias"]
    return found


def peft_delta(parts, weight, scale, start):
    delta = scale * (parts["lora_B.weight"].flatten(1) @ parts["lora_A.weight"].flatten(1)).reshape(weight.shape)
    rank = len(parts["lora_A.weight"])
    if start == "pissa":  # the best approximation of rank r, whatever the scale
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        delta = delta - left[:, :rank] * values[:rank] @ right[:rank]
    elif start == "olora":
        orthogonal, triangular = torch.linalg.qr(weight)
        delta = delta - scale * orthogonal[:, :rank] @ triangular[:rank]
    if "lora_magnitude_vector" in parts:
        magnitude = parts["lora_magnitude_vector"].reshape(-1, *[1] * (weight.ndim - 1))
        delta = normalized(weight + delta, magnitude, 0) - weight
    return delta


# --- the samples -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", INDEX["samples"], ids=lambda s: s["name"])
def test_the_formulas_give_the_deltas_that_were_measured(sample):
    path = HERE / sample["adapter"]
    meaning = peft_meaning(path) if path.is_dir() else lycoris_meaning(path)
    measured = load_file(HERE / sample["delta"])
    assert set(meaning) == set(measured)
    for name, delta in measured.items():
        assert delta.shape == meaning[name].shape, name
        assert delta.abs().max() > 1e-3, name
        assert (meaning[name] - delta).abs().max() <= LIMIT * delta.abs().max(), name


def test_every_file_here_belongs_to_a_sample():
    listed = {name for sample in INDEX["samples"] for name in (sample["adapter"], sample["delta"])}
    present = {path.name for path in HERE.iterdir() if path.suffix == ".safetensors" or path.name.startswith("peft_")}
    assert present == listed
