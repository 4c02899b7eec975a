"""Training on a GPU against the CPU: the same losses in float32, resumed runs, bfloat16, and a merge of the result."""

from pathlib import Path

import pytest
import torch

from krona_hub import merge, read, verify
from krona_hub.errors import StoppedError
from krona_hub.training.api import train
from krona_hub.training.progress.metrics import read_metrics, series
from tests.training.conftest import bases, photos, quick  # noqa: F401  fixtures
from tests.training.test_runs import stop_after

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
EXACT = {"base_dtype": "float32", "mixed_precision": "no", "steps": 20, "gradient_checkpointing": False}


@pytest.fixture
def on_gpu(quick):  # noqa: F811
    """Settings of a short training on the GPU, in float32."""
    return quick | EXACT | {"device": "cuda"}


def losses(run):
    return torch.tensor([loss for _, loss in series(read_metrics(Path(run)), "loss")])


def test_the_losses_in_float32_are_those_of_the_cpu(on_gpu, tmp_path):
    there = train(on_gpu)
    here = train(on_gpu, device="cpu", output=str(tmp_path / "cpu"))
    assert torch.allclose(losses(there.run), losses(here.run), rtol=1e-3)


def test_a_stopped_run_goes_on(on_gpu, tmp_path):
    whole = train(on_gpu, output=str(tmp_path / "whole"))
    with pytest.raises(StoppedError):
        train(on_gpu, progress=stop_after(7))
    again = train(resume_from=on_gpu["output"])
    assert torch.allclose(losses(again.run), losses(whole.run), rtol=1e-3)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_in_half_precision_trains_with_checkpointing_and_draws(dtype, on_gpu):
    half = {"base_dtype": dtype, "mixed_precision": "auto", "gradient_checkpointing": True, "sample_every": 10}
    report = train(on_gpu | half | {"sample_steps": 2})
    adapter = read(report.adapter, base=on_gpu["base"])
    assert all(t.isfinite().all() and t.dtype == torch.float32 for d in adapter.layers.values() for t in d.tensors)
    assert len(list((report.run / "samples").glob("step-*.png"))) == 3


def test_what_was_trained_there_merges_exactly(on_gpu, tmp_path):
    report, merged = train(on_gpu), tmp_path / "merged"
    merge(on_gpu["base"], [(report.adapter, 0.8)], merged)
    assert verify(merged, base=on_gpu["base"], adapters=[(report.adapter, 0.8)]).same
