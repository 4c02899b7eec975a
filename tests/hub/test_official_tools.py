"""What others do with our repositories: the client's own commands, and diffusers."""

import os
import subprocess
import sys

import pytest

from krona_hub.hub import pull, push
from krona_hub.sources import resolve

REPO = "ana/style"


def hf(hub, *arguments):
    code = "from huggingface_hub.cli.hf import main; main()"
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_UPDATE_CHECK": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_hf_download_and_hf_cache_verify_accept_the_repository(hub, style):
    push(style, REPO, with_lora=True)
    done = hf(hub, "download", REPO)
    assert done.returncode == 0, done.stderr
    assert resolve(REPO).read_bytes() == style.read_bytes()
    done = hf(hub, "cache", "verify", REPO)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_hf_cache_verify_accepts_what_krona_pulled(hub, style, tmp_path):
    push(style, REPO)
    pull(REPO, tmp_path / "out")
    done = hf(hub, "cache", "verify", REPO, "--local-dir", str(tmp_path / "out"))
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def tiny(tmp_path):
    """A pipeline of tiny models, an adapter for it, and what makes a picture of both."""
    import torch

    from tests import tiny

    return tiny, torch


def picture(pipe):
    """A picture of a prompt that is numbers already: the tiny pipeline has no tokenizer."""
    import torch

    width = pipe.unet.config.cross_attention_dim
    words = torch.randn(1, 16, width, generator=torch.Generator().manual_seed(1))
    made = pipe(
        prompt_embeds=words, negative_prompt_embeds=torch.zeros_like(words), num_inference_steps=2, height=32, width=32,
        generator=torch.Generator().manual_seed(2), output_type="pt",
    )  # fmt: skip
    return made.images


def native(pipe, path):
    """A random Kronecker adapter for the attention of the pipeline, its change large enough to be seen."""
    import torch

    from krona_hub.adapter import Adapter, LayerDelta
    from krona_hub.formats.writing import write
    from krona_hub.kron.terms import KronTerms
    from krona_hub.runtime import base_of

    random = torch.Generator().manual_seed(3)
    layers = {}
    for name, module in base_of(pipe).layers("unet"):
        if name.endswith(("to_q", "to_v")) and "attn" in name:
            out, in_ = module.matrix
            a, b = torch.randn(1, 4, 2, generator=random), torch.randn(1, out // 4, in_ // 2, generator=random)
            layers[name] = LayerDelta((KronTerms(0.3 * a, 0.3 * b),), module.shape)
    write(Adapter(layers), path, base=base_of(pipe))
    return path


@pytest.mark.slow
def test_push_pull_load_gives_the_same_picture_and_so_does_the_lora_export_in_diffusers(hub, tmp_path):
    import torch

    import krona_hub
    from tests import tiny

    pipe = tiny.sd15()
    plain = picture(pipe)
    path = native(pipe, tmp_path / "native.safetensors")
    krona_hub.load_into(pipe, path)
    meant = picture(pipe)
    assert (meant - plain).abs().max() > 1e-2
    push(path, "ana/tiny", with_lora=True, base_model="ana/tiny-base")
    pull("ana/tiny", tmp_path / "pulled")

    for source in (tmp_path / "pulled" / "krona_adapter.safetensors", "ana/tiny"):
        again = tiny.sd15()
        krona_hub.load_into(again, source)
        assert torch.equal(picture(again), meant)

    other = tiny.sd15()
    os.environ["HF_ENDPOINT"] = hub.url
    other.load_lora_weights(str(resolve("ana/tiny/pytorch_lora_weights.safetensors")))
    assert torch.allclose(picture(other), meant, atol=1e-4)


@pytest.mark.slow
def test_push_pull_generate_draws_the_same_pixels(hub, tmp_path):
    """The trained LoKr of the package, from its file, from the pulled folder, and straight from the Hub."""
    from importlib.resources import as_file, files

    import krona_hub

    def drawn(source):
        report = krona_hub.generate("tiny-scenes", ["a photo of a zorbi on a blue table"], adapters=[source], steps=4)
        return report.images[0].tobytes()

    with as_file(files("krona_hub.assets") / "zorbi_lokr.safetensors") as path:
        push(path, "ana/zorbi", base="tiny-scenes", base_model="ana/tiny-scenes", with_lora=True)
        pulled = pull("ana/zorbi", tmp_path / "pulled")
        meant = drawn(path)
    assert drawn(pulled.out / "krona_adapter.safetensors") == meant
    assert drawn("ana/zorbi") == meant
