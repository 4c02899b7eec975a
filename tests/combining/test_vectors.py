"""Vectors in a weighted sum: Σ weight · vector per parameter, exact up to float32; missing ones count as 0."""

from dataclasses import replace

import pytest
import torch

from krona_hub import merge
from krona_hub.cli.combine_command import as_document, show
from krona_hub.combining import combine, execute
from krona_hub.combining.weighted_sum import weighted_sum
from krona_hub.errors import BaseMismatchError
from tests.merging.test_vectors import LAYERS, PARAMETERS, SHAPES, adapter_of, base_of, tensors_of


@pytest.fixture
def written(monkeypatch):
    """The adapters that `combine` hands to the writer, and what it would write next to them."""
    found = []

    def keep(plan, *_, **__):
        found.append(plan.adapter)
        raise InterruptedError

    monkeypatch.setattr(execute, "write_planned", keep)
    return found


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.7, -1.3), (0.0, 2.0), (1e-3, 1e3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_sum_is_linear_over_the_union_of_the_parameters(weights, dtype):
    one, two = adapter_of(*PARAMETERS[:4], dtype=dtype), adapter_of(*PARAMETERS[2:], seed=3, dtype=dtype)
    found = weighted_sum([(one, weights[0]), (two, weights[1])]).vectors
    assert set(found) == set(PARAMETERS)
    for name, vector in found.items():
        zero = torch.zeros(SHAPES[name], dtype=torch.float64)
        wanted = sum(w * a.vectors.get(name, zero).double() for a, w in zip((one, two), weights, strict=True))
        assert vector.shape == SHAPES[name]
        assert torch.equal(vector, wanted.to(vector.dtype))
        assert vector.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) or torch.equal(
            vector.double(), wanted
        )


def test_a_single_vector_at_weight_one_keeps_its_numbers_and_dtype():
    adapter = adapter_of(*LAYERS, *PARAMETERS, dtype=torch.bfloat16)
    found = weighted_sum([(adapter, 1.0), (adapter_of(*LAYERS, seed=2), 0.5)])
    assert all(found.vectors[name] is vector for name, vector in adapter.vectors.items())


def test_vectors_that_cancel_stay_as_zeros():
    adapter = adapter_of(*PARAMETERS)
    found = weighted_sum([(adapter, 0.5), (adapter, -0.5)]).vectors
    assert set(found) == set(PARAMETERS) and not any(bool(v.any()) for v in found.values())


def test_vectors_of_different_shapes_cannot_be_added():
    name = PARAMETERS[1]
    short = replace(adapter_of(name), vectors={name: torch.ones(SHAPES[name][0] - 1)})
    with pytest.raises(BaseMismatchError, match=rf"{name}: The adapters have vectors of different shapes"):
        weighted_sum([(adapter_of(name), 1.0), (short, 1.0)])


@pytest.mark.parametrize("options", [{}, {"terms": 1}, {"max_error": 0.3}])
def test_recompression_leaves_vectors_alone(options, written, tmp_path):
    parts = [(adapter_of(*LAYERS, *PARAMETERS), 0.7), (adapter_of(*LAYERS, PARAMETERS[0], seed=9), -0.4)]
    with pytest.raises(InterruptedError):
        combine(parts, tmp_path / "c.safetensors", allow_loss=True, **options)
    exact = weighted_sum(parts).vectors
    assert written[0].vectors.keys() == exact.keys()
    assert all(torch.equal(vector, exact[name]) for name, vector in written[0].vectors.items())


def test_merging_the_sum_is_merging_its_parts(tmp_path):
    base = base_of(tmp_path / "base", torch.float32)
    parts = [(adapter_of(*PARAMETERS), 0.5), (adapter_of(*PARAMETERS, seed=4), -2.0)]
    merge(base, parts, tmp_path / "a", exact_rounding=True)
    merge(base, [(weighted_sum(parts), 1.0)], tmp_path / "b", exact_rounding=True)
    one, two = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    for name in PARAMETERS:
        torch.testing.assert_close(one[name], two[name], rtol=2e-7, atol=1e-7)


def test_the_report_counts_vectors(capsys):
    parts = [(adapter_of(*LAYERS, *PARAMETERS[:2]), 0.7), (adapter_of(*LAYERS, PARAMETERS[1]), 0.1)]
    report = combine(parts)
    assert [part.vectors for part in report.parts] == [2, 1] and set(report.vectors) == set(PARAMETERS[:2])
    numbers = sum(torch.Size(SHAPES[name]).numel() for name in PARAMETERS[:2])
    assert report.vector_parameters == numbers == as_document(report)["vector_parameters"]
    assert report.parts[0].parameters == parts[0][0].parameters - len(LAYERS)  # without the constant A of a LoRA
    show(report, every_layer=False)
    assert f"2, {numbers} parameters" in capsys.readouterr().out


def test_adapters_of_vectors_alone_can_be_combined():
    report = combine([(adapter_of(*PARAMETERS), 0.7), (adapter_of(*PARAMETERS, seed=1), 0.1)])
    assert not report.layers and len(report.vectors) == len(PARAMETERS) and report.relative_error == 0
