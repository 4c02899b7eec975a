"""A page of the largest adapters there are stays a file that can be mailed: under 150 kB."""

import random
from pathlib import Path

import pytest
from PIL import Image

from krona_hub.adapters.adapter import Adapter
from krona_hub.bases import catalog
from krona_hub.conversion.report import ConversionReport, LayerReport
from krona_hub.rendering.html.conversion_report import conversion_html
from krona_hub.rendering.html.training_report import Run, training_html

LIMIT = 150_000


NOTHING = Adapter({})  # whose curve is empty


def every_layer_of(base):
    return [f"{part}.{name}" for part, modules in catalog.get(base).components.items() for name in modules]


def one_of(name, dice):
    """As `--max-error` reports layers: half of them as a LoRA, half as Kronecker sums of any form."""
    truncated = dice.random() < 0.5
    form = f"{dice.randint(2, 6)} × 16x16 ⊗ 80x80, B r{dice.randint(1, 8)}"
    return LayerReport(
        name, "LoRA r16", "LoRA r5" if truncated else form, 40_960, dice.randint(1_000, 99_999), 0, 0,
        dice.random(), 1.0, "kept as LoRA, rank reduced 16 → 5" if truncated else "",
        f"{form}, error {dice.random():.3f}" if truncated else None,
    )  # fmt: skip


@pytest.mark.parametrize("base", ["sdxl", "flux1-dev"])
def test_a_conversion_of_every_layer_of_a_large_base_has_a_small_page(base):
    names, dice = [n for n in every_layer_of(base) if not n.startswith("text_encoder_3")], random.Random(0)
    layers = tuple(one_of(name, dice) for name in names)
    assert len(layers) > 500
    report = ConversionReport("a.safetensors", "kohya-lora", "krona", None, Path("b.safetensors"), layers)
    document = conversion_html(report, NOTHING)
    assert len(document.encode()) < LIMIT
    assert document.count("best alternative") == 1


@pytest.mark.parametrize("prompts", [1, 4, 8])
def test_a_training_with_many_samples_has_a_small_page(prompts, tmp_path):
    noise = Image.effect_noise((512, 512), 90).convert("RGB")  # no picture packs worse
    noise.save(tmp_path / "a.png")
    rows = [{"step": i, "loss": 1 / i, "smooth_loss": 1.5 / i, "validation_loss": 2 / i} for i in range(1, 2000)]
    samples = {step: [tmp_path / "a.png"] * prompts for step in range(0, 2000, 100)}
    run = Run("toy", rows, {"steps": "2000"}, None, samples, ["a photo of sks toy on a table"] * prompts)
    document = training_html(run)
    assert len(document.encode()) < LIMIT
    assert document.count("<img") >= prompts * 6
