"""The settings that krona prints for a trainer are those under which the trainer takes the file that was written."""

import re

import pytest
from safetensors.torch import load_file

from krona_hub.bases import catalog
from krona_hub.bases.name_table import table
from krona_hub.formats.writing.writer import write
from tests.applications import emulation
from tests.applications.test_matrix import dora
from tests.formats import made

BASE = catalog.get("sd15")
BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
LAYERS = [f"{BLOCK}.attn1.to_q", f"{BLOCK}.attn2.to_k", f"{BLOCK}.ff.net.2", "unet.down_blocks.0.resnets.0.conv1"]
SHAPES = {layer: BASE.module(layer).shape for layer in LAYERS}
LINEAR = {layer: shape for layer, shape in SHAPES.items() if len(shape) == 2}
ADAPTERS = {
    "lora": made.lora(SHAPES),
    "lora, DoRA per column": dora(made.lora(LINEAR, ranks=(3,)), "in"),
    "lora, DoRA per row": dora(made.lora(LINEAR, ranks=(3,)), "out"),
    "lokr, full": made.lokr(SHAPES, made.by_lycoris(8), (None,)),
    "lokr, factored": made.lokr(SHAPES, made.by_lycoris(4), (2,)),
    "lokr, both factored": made.lokr(LINEAR, made.by_lycoris(-1), (2,), (2,)),
    "lokr, DoRA per column": dora(made.lokr(LINEAR, made.by_lycoris(4), (2,)), "in"),
    "lokr, DoRA per row": dora(made.lokr(LINEAR, made.by_lycoris(4), (2,)), "out"),
}


def parsed(note):
    """The settings in the form of the trainer's configuration."""
    found = re.findall(r"((?:lora|lokr)_\w+) (on|off|-?[0-9]+)", note)
    return {name: value == "on" if value in ("on", "off") else int(value) for name, value in found}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_onetrainer_takes_the_file_with_its_settings(kind, tmp_path):
    adapter = ADAPTERS[kind]
    report = write(adapter, tmp_path / "x.safetensors", tool="onetrainer", base=BASE)
    settings = parsed(next(note for note in report.notes if note.startswith("OneTrainer settings")))
    for module, parts in emulation.modules_of(load_file(report.path)).items():
        (place,) = table(BASE).find(module)
        delta = adapter.layers[place.layer]
        weight = made.lora({place.layer: delta.weight_shape}).layers[place.layer].dense()
        meant = delta.dense(weight) if delta.magnitude is not None else delta.dense()
        found = emulation.onetrainer(parts, weight, settings)
        assert (found - meant.reshape(found.shape)).norm() <= 2e-5 * meant.norm(), module


@pytest.mark.parametrize(
    ("tool", "kind", "expected"),
    [
        ("ai-toolkit", "lora", "network type lora, linear 3"),
        ("ai-toolkit", "lokr, factored", "lokr_factor 4, lokr_full_rank false, linear 2"),
        ("ai-toolkit", "lokr, full", "lokr_factor 8, lokr_full_rank true"),
    ],
)
def test_other_trainers_get_their_settings(tool, kind, expected, tmp_path):
    report = write(ADAPTERS[kind], tmp_path / "x.safetensors", tool=tool, base=BASE)
    assert any(expected in note for note in report.notes), report.notes


def test_musubi_is_told_how_to_resume_only_where_it_can(tmp_path):
    base = catalog.get("z-image")
    layers = {f"transformer.layers.0.attention.to_{x}": (3840, 3840) for x in "qk"}
    one = write(made.lora(layers, ranks=(2,)), tmp_path / "one.safetensors", tool="musubi", base=base)
    assert any("--network_dim 2 --network_alpha 2" in note for note in one.notes)
    two = write(made.lora(layers, ranks=(2, 3)), tmp_path / "two.safetensors", tool="musubi", base=base)
    assert any("inference and merging only" in note for note in two.notes)
