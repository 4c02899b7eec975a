"""Every sample in `tests/samples`, loaded into its pipeline, changes what the library that made it changes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from krona_hub import fuse, load_into, unload
from krona_hub.accounting import account_file
from krona_hub.adapters.adapter import canonical_name
from krona_hub.pipelines.load_adapter import base_of
from tests.formats.test_samples import BASE, HERE, INDEX, SAMPLES, assert_close, reference


def pipeline() -> SimpleNamespace:
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextModel

    unet = UNet2DConditionModel.from_pretrained(BASE / "unet")
    text = CLIPTextModel.from_pretrained(BASE / "text_encoder")
    return SimpleNamespace(unet=unet.double(), text_encoder=text.double())


def parameters(pipe) -> dict[str, torch.Tensor]:
    return {
        canonical_name(f"{component}.{name}"): tensor.clone()
        for component, model in vars(pipe).items()
        for name, tensor in model.state_dict().items()
    }


@SAMPLES
def test_a_sample_loads_and_fuses_to_the_parameters_of_its_library(sample):
    pipe = pipeline()
    before = parameters(pipe)
    layers, vectors = reference(sample)
    report = load_into(pipe, HERE / sample["adapter"], 0.7, "toy")
    assert " matched " not in str(report), "the report counts by itself"
    assert set(vectors) <= set(report.vectors) and not report.missing and not report.missing_vectors
    fuse(pipe)
    after = parameters(pipe)
    changes = {f"{name}.weight": delta for name, delta in layers.items()} | vectors
    for name, tensor in before.items():
        if name in changes:
            assert_close(after[name] - tensor, 0.7 * changes[name].double(), name)
        else:
            assert torch.equal(after[name], tensor), name
    unload(pipe)
    assert all(torch.equal(tensor, before[name]) for name, tensor in parameters(pipe).items())


@pytest.mark.parametrize("sample", [s for s in INDEX["samples"] if reference(s)[1]], ids=lambda s: s["name"])
def test_whole_values_are_compared_with_the_base_and_not_with_attached_vectors(sample):
    """A second copy of the adapter reads the same deltas while the first one is attached."""
    pipe = pipeline()
    before = parameters(pipe)
    for name in ("one", "two"):
        load_into(pipe, HERE / sample["adapter"], 0.5, name)
    fuse(pipe)
    after = parameters(pipe)
    for name, vector in reference(sample)[1].items():
        assert_close(after[name] - before[name], vector.double(), name)


def test_a_pipeline_as_a_base_has_the_parameters_of_its_folder():
    from krona_hub.bases.loading import load_base

    own, folder = base_of(pipeline()), load_base(BASE)
    for component in folder.components:
        assert dict(own.components[component].norms) == dict(folder.components[component].norms)
    assert own.family == folder.family


@SAMPLES
def test_vectors_are_counted_in_a_row_of_their_own(sample):
    vectors = sum(vector.numel() for vector in reference(sample)[1].values())
    rows = account_file(HERE / sample["adapter"], base=str(BASE)).rows
    own = [row.parameters for row in rows if row.method == "this file, vectors"]
    assert own == ([vectors] if vectors else [])
