"""The HTML report of a conversion that leaves layers out."""

from pathlib import Path

from krona_hub.adapters.adapter import Adapter
from krona_hub.conversion.report import LEFT_OUT, ConversionReport, LayerReport
from krona_hub.rendering.html.conversion_report import conversion_html


def report_of(*afters):
    """Layers of the norm 1: those left out, and others with half of it lost."""
    layers = tuple(
        LayerReport(f"unet.mid.{i}", "LoRA r8", after, 100, 0 if after == LEFT_OUT else 20, 400, 80,
                    1.0 if after == LEFT_OUT else 0.5, 1.0)
        for i, after in enumerate(afters)
    )  # fmt: skip
    return ConversionReport("in.safetensors", "kohya-lora", "krona", None, Path("out.safetensors"), layers)


def test_the_report_counts_the_layers_left_out_and_lists_them_with_their_error():
    page = conversion_html(report_of("LoRA r1", LEFT_OUT, LEFT_OUT), Adapter({}))
    assert "3 (1 kept, 2 left out)" in page
    assert page.count(">left out<") == 2 and "The largest errors of the kept layers" in page


def test_without_any_the_report_does_not_speak_of_it():
    page = conversion_html(report_of("LoRA r1", "LoRA r1"), Adapter({}))
    assert "left out" not in page and "kept layers" not in page and "The largest errors" in page
