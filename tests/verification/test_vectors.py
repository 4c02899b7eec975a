"""Vectors in `verify`: a merge is checked parameter by parameter; those of two adapters are compared like layers."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from krona_hub import merge
from krona_hub.cli.verify_command import show
from krona_hub.verification import verify
from krona_hub.verification.compare_adapters import compare_deltas
from tests.merging.test_vectors import FILES, LAYERS, PARAMETERS, STORED, adapter_of, base_of

NORM = "transformer.blocks.0.norm1.weight"


@pytest.fixture(params=STORED)
def merged(request, tmp_path):
    base, parts = base_of(tmp_path / "base", STORED[request.param]), [(adapter_of(*LAYERS, *PARAMETERS), 0.8)]
    merge(base, parts, tmp_path / "merged")
    return base, tmp_path / "merged", parts


def edit(folder, parameter, change):
    component, _, name = parameter.partition(".")
    tensors = load_file(folder / FILES[component])
    tensors[name] = change(tensors[name].float()).to(tensors[name].dtype)
    save_file(tensors, folder / FILES[component])


def test_a_merge_of_vectors_is_verified(merged):
    base, out, parts = merged
    report = verify(out, base=base, adapters=parts)
    assert report.same, report.different
    assert sum(t.touched for t in report.tensors) == len(LAYERS) + len(PARAMETERS)
    count = len(PARAMETERS)
    assert report.matched == (f"2 of 2 modules and {count} of {count} vectors matched",)


def test_a_changed_norm_is_found_whether_a_vector_touches_it_or_not(merged):
    base, out, parts = merged
    edit(out, NORM, lambda t: t + t.abs().max() * (torch.arange(16) == 5))
    (found,) = verify(out, base=base, adapters=parts).different
    assert (found.tensor, found.touched) == ("blocks.0.norm1.weight", True)
    plain = [(replace(a, vectors={}), w) for a, w in parts]
    touched = {t.tensor for t in verify(out, base=base, adapters=plain).different if t.state == "touched"}
    assert len(touched) == len(PARAMETERS) and "blocks.0.norm1.weight" in touched


def test_another_strength_of_the_vectors_is_measured(tmp_path):
    base, adapter = base_of(tmp_path / "base", torch.float32), adapter_of(*PARAMETERS)
    merge(base, [(adapter, 0.5)], tmp_path / "merged")
    report = verify(tmp_path / "merged", base=base, adapters=[(adapter, 0.8)])
    assert {t.state for t in report.different} == {"other strength"} and len(report.different) == len(PARAMETERS)
    assert report.strengths == (pytest.approx(0.5, rel=1e-5),)


def test_vectors_that_were_not_merged_are_found(tmp_path):
    base, adapter = base_of(tmp_path / "base", torch.bfloat16), adapter_of(*LAYERS, *PARAMETERS)
    merge(base, [(replace(adapter, vectors={}), 1.0)], tmp_path / "merged")
    report = verify(tmp_path / "merged", base=base, adapters=[(adapter, 1.0)])
    assert {t.state for t in report.different} == {"not merged"} and len(report.different) == len(PARAMETERS)


# --- two adapters ----------------------------------------------------------------------------------------------------


def vectors_of(**tensors):
    return replace(adapter_of(*LAYERS), vectors={f"unet.{name}.bias": t for name, t in tensors.items()})


def test_equal_vectors_are_the_same_in_any_dtype_that_stores_them():
    one = adapter_of(*LAYERS, *PARAMETERS, dtype=torch.bfloat16)
    wide = replace(one, vectors={name: v.double() for name, v in one.vectors.items()})
    report = compare_deltas(one, wide)
    assert report.same and len(report.layers) == len(LAYERS) and len(report.vectors) == len(PARAMETERS)


def test_the_difference_of_vectors_is_relative_and_part_of_the_whole():
    a, b = torch.randn(15), torch.randn(15)
    report = compare_deltas(vectors_of(x=a, y=a), vectors_of(x=a + 0.01 * b, y=a))
    x, y = report.vectors
    assert x.relative_difference == pytest.approx(0.01 * float(b.norm() / a.norm()), rel=1e-3)
    assert report.different == (x,) and y.same and report.exit_code == 6
    whole = sum(check.norm**2 for check in report.compared) ** 0.5
    assert report.relative_difference == pytest.approx(0.01 * float(b.norm()) / whole, rel=1e-3)
    assert compare_deltas(vectors_of(x=a), vectors_of(x=a + 0.01 * b), tolerance=0.5).same


def test_a_vector_that_only_one_has_must_be_zero():
    a = torch.randn(15)
    report = compare_deltas(vectors_of(x=a), vectors_of(y=a))
    assert report.only_first == ("unet.x.bias",) and report.only_second == ("unet.y.bias",) and not report.same
    assert compare_deltas(vectors_of(x=torch.zeros(15)), vectors_of()).same


def test_vectors_of_different_sizes_are_never_the_same():
    report = compare_deltas(vectors_of(x=torch.ones(16)), vectors_of(x=torch.ones(15)))
    assert not report.same and "unet.x.bias: different sizes" in report.notes[0]


def test_the_scale_between_two_adapters_counts_vectors():
    a = torch.randn(15)
    one = replace(vectors_of(x=a), layers={})
    report = compare_deltas(one, replace(vectors_of(x=0.7 * a), layers={}))
    assert report.scale == pytest.approx(0.7) and report.cosine == pytest.approx(1)


def test_the_command_counts_vectors(capsys):
    a = torch.randn(15)
    show(compare_deltas(vectors_of(x=a), vectors_of(x=2 * a)), every=False)
    shown = capsys.readouterr().out
    assert "unet.x.bias" in shown and "1 of the 2 layers and 1 vector differ" in " ".join(shown.split())
    show(compare_deltas(vectors_of(), vectors_of()), every=False)
    assert "in each of 2 layers." in " ".join(capsys.readouterr().out.split())
