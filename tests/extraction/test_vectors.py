"""--also-vectors: the differences of biases, norms and bare parameters become vectors of the adapter."""

import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from krona_hub import merge
from krona_hub.cli.extract_command import show
from krona_hub.errors import NoDifferenceError
from krona_hub.extraction import execute, extract
from krona_hub.formats.writing.writer import write_planned
from tests.extraction.test_layouts import as_ldm, folders
from tests.merging.test_vectors import FILES, LAYERS, PARAMETERS, adapter_of, base_of, tensors_of

__all__ = ["folders"]

KINDS = {"to_q.bias": "bias", "norm1.bias": "norm", "norm1.weight": "norm", "table": "other"}


@pytest.fixture
def written(monkeypatch):
    """The adapters that `extract` hands to the writer."""
    found = []

    def keep(plan, *arguments, **options):
        found.append(plan.adapter)
        return write_planned(plan, *arguments, **options)

    monkeypatch.setattr(execute, "write_planned", keep)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merge_with_vectors_is_extracted_and_merges_to_the_same_parameters(dtype, written, tmp_path):
    base, adapter = base_of(tmp_path / "base", dtype), adapter_of(*LAYERS, *PARAMETERS)
    merge(base, [(adapter, 0.8)], tmp_path / "tuned")
    report = extract(base, tmp_path / "tuned", tmp_path / "x.safetensors", also_vectors=True)
    before, tuned, vectors = tensors_of(base), tensors_of(tmp_path / "tuned"), written[0].vectors
    assert set(vectors) == set(PARAMETERS)
    for name, vector in vectors.items():
        assert torch.equal(vector, tuned[name].float() - before[name].float())
        unit = torch.finfo(dtype).eps * tuned[name].float().abs().max()
        assert float((vector - 0.8 * adapter.vectors[name]).abs().max()) <= unit
    merge(base, [(written[0], 1.0)], tmp_path / "again")
    after = tensors_of(tmp_path / "again")
    if dtype == torch.bfloat16:
        assert all(torch.equal(after[name], tuned[name]) for name in PARAMETERS)
    for name in PARAMETERS:
        torch.testing.assert_close(after[name], tuned[name])
    kinds = {x.name: x.kind for x in report.captured}
    assert kinds == {name: next(kind for end, kind in KINDS.items() if name.endswith(end)) for name in PARAMETERS}
    assert not report.not_captured and not written[0].extras


def test_plain_extractions_store_no_vectors_and_list_what_changed(written, tmp_path):
    base, adapter = base_of(tmp_path / "base", torch.float32), adapter_of(*LAYERS, *PARAMETERS)
    merge(base, [(adapter, 0.8)], tmp_path / "tuned")
    report = extract(base, tmp_path / "tuned", tmp_path / "x.safetensors")
    assert not written[0].vectors and not written[0].extras and not report.captured
    assert {x.name for x in report.not_captured} == set(PARAMETERS)
    assert {x.layer for x in report.layers} == set(LAYERS)


def test_a_model_that_differs_in_vectors_alone_needs_the_option(written, tmp_path):
    base = base_of(tmp_path / "base", torch.float32)
    merge(base, [(adapter_of(*PARAMETERS[:2]), 0.8)], tmp_path / "tuned")
    with pytest.raises(NoDifferenceError, match="--also-vectors to keep the 2"):
        extract(base, tmp_path / "tuned", tmp_path / "x.safetensors")
    report = extract(base, tmp_path / "tuned", tmp_path / "x.safetensors", also_vectors=True, dry_run=True)
    assert not report.layers and [x.name for x in report.captured] == sorted(PARAMETERS[:2])


def test_a_pipeline_gives_vectors_and_keeps_embeddings_in_the_extras(folders, written, tmp_path):
    report = extract(folders / "base", folders / "tuned", tmp_path / "x.safetensors", also_vectors=True)
    adapter = written[0]
    assert set(adapter.vectors) == {"unet.conv_norm_out.weight", "unet.conv_in.bias"}
    torch.testing.assert_close(adapter.vectors["unet.conv_norm_out.weight"], torch.full((32,), 0.5))
    torch.testing.assert_close(adapter.vectors["unet.conv_in.bias"], torch.full((32,), 0.25))
    (name,) = adapter.extras
    assert name == "text_encoder.embeddings.token_embedding.diff"
    assert adapter.extras[name][3].round().unique().tolist() == [1.0]
    assert not report.not_captured and len(report.captured) == 3


def test_checkpoints_in_ldm_names_give_the_same_vectors(folders, written, tmp_path):
    old, new = (as_ldm(folders / n, tmp_path / f"{n}.safetensors") for n in ("base", "tuned"))
    for base, tuned in ((folders / "base", new), (old, folders / "tuned"), (old, new)):
        written.clear()
        report = extract(
            base, tuned, tmp_path / "x.safetensors", also_vectors=True, base_name=folders / "base", overwrite=True,
            terms=1, allow_loss=True,
        )  # fmt: skip
        assert set(written[0].vectors) == {"unet.conv_norm_out.weight", "unet.conv_in.bias"}
        assert not [x for x in report.not_captured if x.storable]


def test_buffers_of_integers_are_listed_and_not_stored(written, tmp_path, capsys):
    base = base_of(tmp_path / "base", torch.float32)
    merge(base, [(adapter_of(*LAYERS), 0.8)], tmp_path / "tuned")
    for folder, first in ((base, 0), (tmp_path / "tuned", 1)):
        file = folder / FILES["text_encoder"]
        save_file(load_file(file) | {"text_model.embeddings.position_ids": torch.arange(first, first + 9)}, file)
    report = extract(base, tmp_path / "tuned", tmp_path / "x.safetensors", also_vectors=True)
    assert not written[0].vectors and not written[0].extras
    assert [(x.name, x.storable) for x in report.not_captured] == [("text_encoder.embeddings.position_ids", False)]
    show(report, every_layer=False)
    shown = " ".join(capsys.readouterr().out.split())
    assert "changes to 1 other" in shown and "--also-vectors" not in shown


def test_the_command_counts_stored_vectors(tmp_path, capsys):
    base, adapter = base_of(tmp_path / "base", torch.float32), adapter_of(*LAYERS, *PARAMETERS)
    merge(base, [(adapter, 0.8)], tmp_path / "tuned")
    report = extract(base, tmp_path / "tuned", tmp_path / "x.safetensors", also_vectors=True, dry_run=True)
    show(report, every_layer=False)
    count = sum(math.prod(v.shape) for v in adapter.vectors.values())
    shown = " ".join(capsys.readouterr().out.split())
    assert f"stored, {count} parameters" in shown and "not captured" not in shown
    show(replace(report, others=tuple(replace(x, kept=False) for x in report.others)), every_layer=False)
    assert "--also-vectors stores those" in " ".join(capsys.readouterr().out.split())
