"""Output of a conversion: readable for 12 layers and for 800."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from krona_hub.cli.convert_command import as_document, show
from krona_hub.conversion.report import LEFT_OUT, ConversionReport, LayerReport, worst_layers
from krona_hub.rendering.tables import factorization_groups

ONE = LayerReport("unet.a", "LoRA r8", "16x16 ⊗ 20x20", 5120, 656, 10240, 2624, 0.03, 1.0)


def report_of(*layers: LayerReport) -> ConversionReport:
    return ConversionReport("x.safetensors", "kohya-lora", "krona", None, Path("x.krona.safetensors"), layers)


def many(count: int) -> tuple[LayerReport, ...]:
    """Layers of five factorizations with increasing errors."""
    return tuple(
        replace(ONE, layer=f"unet.block.{i}", after=f"{2 ** (i % 5)}x4 ⊗ 5x5", relative_error=0.0001 * i)
        for i in range(count)
    )


def test_few_layers_are_listed(capsys):
    show(report_of(*many(12)), every_layer=False)
    shown = capsys.readouterr().out
    assert all(f"unet.block.{i} " in shown for i in range(12))


def test_eight_hundred_layers_are_grouped_and_the_worst_are_named(capsys):
    show(report_of(*many(800)), every_layer=False)
    shown = capsys.readouterr().out
    assert len(shown.splitlines()) < 30
    assert "unet.block.799" in shown and "unet.block.12 " not in shown


def test_layers_lists_them_all_whole(capsys):
    show(report_of(*many(800)), every_layer=True)
    shown = capsys.readouterr().out
    assert all(f"unet.block.{i} " in shown for i in range(800))


def test_the_groups_hold_every_layer_once_and_every_parameter():
    layers = tuple(replace(x, after=f"factorization {i}") for i, x in enumerate(many(100)))
    groups = factorization_groups(layers)
    assert len(groups) == 8 and sum(g.layers for g in groups) == 100
    assert sum(g.parameters_after for g in groups) == sum(x.parameters_after for x in layers)
    assert max(g.worst_error for g in groups) == max(x.relative_error for x in layers)


def test_the_worst_layers_come_worst_first_and_exact_ones_not_at_all():
    exact = replace(ONE, layer="unet.exact", relative_error=1e-8)
    assert [x.layer for x in worst_layers((exact, *many(9)), 2)] == ["unet.block.8", "unet.block.7"]
    assert worst_layers((exact,)) == ()


@pytest.mark.parametrize("written", [True, False])
def test_the_file_is_named_only_where_it_was_written(written, capsys):
    show(replace(report_of(ONE), written=written, checked="checked: 1/1"), every_layer=False)
    assert ("x.krona.safetensors" in capsys.readouterr().out) == written


def test_the_document_holds_the_totals():
    document = as_document(report_of(*many(3)))
    assert document["parameters_after"] == 3 * 656 and document["verdict"] and len(document["layers"]) == 3
    assert document["layers_left_out"] == 0


# --- layers left out -------------------------------------------------------------------------------------------------


def with_left_out(kept: int, left_out: int) -> ConversionReport:
    gone = replace(ONE, after=LEFT_OUT, parameters_after=0, bytes_after=0, relative_error=1.0)
    return report_of(*many(kept), *(replace(gone, layer=f"unet.gone.{i}") for i in range(left_out)))


def test_the_total_states_how_many_layers_are_left_out_and_they_are_one_group(capsys):
    show(with_left_out(13, 43), every_layer=False)
    shown = capsys.readouterr().out
    assert "total       56 layers (13 kept, 43 left out), kohya-lora → krona" in shown
    (group,) = [line for line in shown.splitlines() if "left out  " in line]
    assert group.split() == ["43", "LoRA", "r8", "left", "out", "220,160", "0", "1"]


def test_the_largest_errors_are_those_of_kept_layers(capsys):
    """Layers left out all have the error 1, and would fill the list."""
    report = with_left_out(13, 43)
    assert all(not x.is_left_out for x in worst_layers(report.layers, 20))
    show(report, every_layer=False)
    shown = capsys.readouterr().out
    assert "kept layers with the largest errors (--layers lists all)" in shown and "unet.gone." not in shown
    show(report, every_layer=True)
    assert capsys.readouterr().out.count("unet.gone.") == 43


def test_the_document_counts_the_layers_left_out_and_holds_them():
    document = as_document(with_left_out(2, 3))
    assert document["layers_left_out"] == 3 and len(document["layers"]) == 5 and not document["left_out"]
    assert document["energy_kept"] < 0.5


def test_a_terminal_of_80_columns_cuts_nothing(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")
    show(with_left_out(13, 43), every_layer=False)
    lines = re.sub("\x1b\\[[0-9;]*m", "", capsys.readouterr().out).splitlines()
    assert all(len(line) <= 80 for line in lines)
    words = " ".join(" ".join(lines).split())
    assert "56 layers (13 kept, 43 left out), kohya-lora → krona" in words and "left out" in words
