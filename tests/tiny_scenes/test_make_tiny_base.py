"""The command that trains the base model: every stage runs and resumes, and the result is a base model."""

import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline

from krona_hub.bases.loading import load_base, weight_files
from scripts import make_tiny_base
from scripts.tiny_scenes import check, sampling


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Run the command with two steps per stage on four images; return the work folder and the output folder."""
    work = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_tiny_base, "CHECK_EVERY", 2)
        patch.setattr(make_tiny_base, "CHECKED", 2)
        patch.setattr(make_tiny_base, "GRID", 2)
        patch.setattr(make_tiny_base.sampling, "measure", lambda pipe, count=2: check.Score(0.1, 0.2, 0.3, count))
        run(patch, work)
    return work, work / "out"


def run(patch, work):
    arguments = ["--work", str(work), "--out", str(work / "out"), "--threads", "1", "--pictures", "4"]
    steps = ["--autoencoder-steps", "2", "--decoder-steps", "2", "--denoiser-steps", "2"]
    patch.setattr(sys, "argv", ["make_tiny_base.py", *arguments, *steps])
    threads = torch.get_num_threads()
    make_tiny_base.main()
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_the_folder_is_the_base_that_the_catalog_knows(made):
    _, out = made
    base = load_base(out)
    assert base.family == "tiny-scenes"
    assert set(weight_files(out)) == {layer for layer, _ in base.layers()}
    assert sum(file.stat().st_size for file in out.rglob("*")) < 12_000_000


@pytest.mark.slow
def test_the_folder_draws_in_one_dtype_and_in_half_precision_on_disk(made):
    _, out = made
    pipe = StableDiffusionPipeline.from_pretrained(out)
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert [picture.shape for picture in sampling.generate(pipe, ["a red cube"], steps=2)] == [(64, 64, 3)]
    assert (out / "unet/diffusion_pytorch_model.safetensors").stat().st_size < 2.1 * pipe.unet.num_parameters()


@pytest.mark.slow
def test_the_latents_that_the_denoiser_learned_from_have_unit_deviation(made):
    work, out = made
    latents = torch.load(work / "latents-4.pt", weights_only=True)
    scale = StableDiffusionPipeline.from_pretrained(out).vae.config.scaling_factor
    assert float((latents * scale).std()) == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_the_card_says_what_was_measured(made):
    _, out = made
    assert "| 10.0% | 20.0% | 30.0% |" in (out / "README.md").read_text()
    assert "license: apache-2.0" in (out / "README.md").read_text()
