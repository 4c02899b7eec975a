"""krona's answer for adapter files against what the applications did with them (`tools-golden/index.json`).

An application loads a file if it changed every layer by what the file means; the answer must be yes exactly then, and
the number of layers that it loads correctly must be the measured one.
"""

import json

import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from krona_hub.formats.compatibility.applications import APPLICATIONS
from krona_hub.formats.compatibility.verdicts import verdict
from krona_hub.formats.reading.describe import describe
from tests.shared import SHARED, shared

INDEX = SHARED / "tools-golden" / "index.json"
ENTRIES = json.loads(INDEX.read_text())["samples"] if INDEX.exists() else []
NAMES = {"ComfyUI": "comfyui", "stable-diffusion-webui-forge": "forge", "OneTrainer": "onetrainer"}
AGREES = 2e-5  # relative Frobenius difference


def application_of(entry):
    name = NAMES.get(entry["tool"], "a1111")
    assert name != "a1111" or entry["tool"].startswith("AUTOMATIC1111")
    return name


def case(entry):
    return f"{application_of(entry)}-{entry['adapter'].removeprefix('adapters/').removesuffix('.safetensors')}"


def file_for(name, path, folder):
    """The file; for AUTOMATIC1111, whose names were matched by hand in the measurement, under names that it finds."""
    if name != "a1111":
        return path
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {key.replace("lycoris_", "lora_unet_", 1): tensor for key, tensor in load_file(path).items()}
    save_file(tensors, folder / "x.safetensors", metadata)
    return folder / "x.safetensors"


@pytest.mark.parametrize("entry", ENTRIES, ids=map(case, ENTRIES))
def test_the_answer_is_what_the_application_did(entry, tmp_path):
    name = application_of(entry)
    path = file_for(name, shared("tools-golden", *entry["adapter"].split("/")), tmp_path)
    about = describe(path, base=str(shared("golden", "base")), component=None)
    differences = entry["relative_difference_from_what_the_file_means"]
    layers = {layer for module in about.modules for layer in module.layers}
    right = {layer for layer in entry["layers_applied"] if differences.get(layer, 1.0) < AGREES}
    stopped = name == "forge" and entry["errors"]  # an error ends the load of the whole file
    found = verdict(APPLICATIONS[name], about)
    assert found.ok == (right >= layers and not entry["errors"]), found
    assert found.layers == len(layers)
    if not stopped:
        assert found.loaded == len(right & layers), found
    assert found.ok or found.why
