"""What others do with our repositories: the client's own commands, and diffusers."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from krona_hub.hub import pull, push
from krona_hub.sources import resolve
from krona_hub.verification import verify

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

    from krona_hub.adapters.adapter import Adapter, LayerDelta
    from krona_hub.formats.writing.writer import write
    from krona_hub.kron.terms import KronTerms
    from krona_hub.pipelines.load_adapter import base_of

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
def test_an_id_loads_and_merges_as_its_file_does(hub, tmp_path):
    import torch
    from safetensors.torch import load_file

    import krona_hub
    from tests import tiny

    pipe = tiny.sd15()
    base = tiny.save(pipe, tmp_path / "base")
    plain = picture(pipe)
    path = native(pipe, tmp_path / "krona_adapter.safetensors")
    krona_hub.load_into(pipe, path)
    meant = picture(pipe)
    assert (meant - plain).abs().max() > 1e-2
    push(path, "ana/tiny", base_model="ana/tiny-base")
    again = tiny.sd15()
    krona_hub.load_into(again, "ana/tiny")
    assert torch.equal(picture(again), meant)
    for source, out in ((path, "of-the-file"), ("ana/tiny@main", "of-the-hub")):
        krona_hub.merge(base, [(source, 1.0)], tmp_path / out)
    one, two, before = (
        load_file(Path(folder) / "unet/diffusion_pytorch_model.safetensors")
        for folder in (tmp_path / "of-the-file", tmp_path / "of-the-hub", base)
    )
    assert all(torch.equal(one[name], two[name]) for name in one) and one.keys() == two.keys()
    assert any(not torch.equal(one[name], before[name]) for name in one)


@pytest.mark.slow
def test_a_training_starts_from_an_id(hub, tmp_path):
    from krona_hub import train
    from tests.training.bases import save_base, save_photos

    quick = {
        "base": str(save_base("sd15", tmp_path / "base")), "data": str(save_photos(tmp_path / "photos")), "steps": 2,
        "prompt": "a photo", "resolution": 16, "device": "cpu", "output": str(tmp_path / "first"),
    }  # fmt: skip
    first = train(quick).adapter
    push(first, "ana/toy", base_model="ana/tiny-base")
    assert "images/run-01.png" not in hub.state.repos["ana/toy"].head().files, "it drew none"
    assert "plots/loss.png" in hub.state.repos["ana/toy"].head().files
    again = train(quick, init="ana/toy", learning_rate=0.0, weight_decay=0.0, output=str(tmp_path / "second")).adapter
    assert verify(first, again).same


@pytest.mark.slow
def test_push_pull_generate_draws_the_same_pixels(hub, tmp_path):
    """The trained LoKr of the package, from its file and from the pulled folder."""
    from importlib.resources import as_file, files

    import krona_hub

    def drawn(source):
        report = krona_hub.generate("tiny-scenes", ["a photo of a zorbi on a blue table"], adapters=[source], steps=2)
        return report.images[0].tobytes()

    with as_file(files("krona_hub.assets") / "zorbi_lokr.safetensors") as path:
        push(path, "ana/zorbi", base="tiny-scenes", base_model="ana/tiny-scenes")
        pulled = pull("ana/zorbi", tmp_path / "pulled")
        assert drawn(pulled.out / "krona_adapter.safetensors") == drawn(path)


SNIPPETS = """
import sys, torch
from pathlib import Path

for number, code in enumerate(sys.argv[2:]):
    names = {}
    exec(code, names)
    pipe = names["pipe"]
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    image = pipe("a photo of a zorbi", num_inference_steps=2, generator=seed).images[0]
    image.save(Path(sys.argv[1]) / f"{number}.png")
"""


@pytest.mark.slow
def test_the_snippets_of_the_card_run_and_the_lora_in_diffusers_draws_what_the_native_adapter_draws(hub, tmp_path):
    """Word for word, in a new process, all from the Hub: base, adapter, and the LoRA by `load_lora_weights(repo)`."""
    from importlib.resources import as_file, files

    import numpy as np
    from PIL import Image

    with as_file(files("krona_hub.assets")) as assets:
        base = {p.relative_to(assets / "tiny-scenes").as_posix(): p for p in (assets / "tiny-scenes").rglob("*.*")}
        hub.state.create("ana/tiny-scenes", files={n: p.read_bytes() for n, p in base.items() if p.is_file()})
        push(assets / "zorbi_lokr.safetensors", "ana/zorbi", base="tiny-scenes", base_model="ana/tiny-scenes",
             with_lora=True)  # fmt: skip
    card = hub.state.content("ana/zorbi", "README.md").decode()
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(code) == 2 and "load_into" in code[0] and "load_lora_weights" in code[1]
    plain = code[1].replace("pipe.load_lora_weights", "# ")
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_TELEMETRY": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SNIPPETS, str(tmp_path), *code, plain], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    native, lora, without = (np.asarray(Image.open(tmp_path / f"{n}.png")).astype(int) for n in range(3))
    assert np.abs(native - without).max() > 20, "the adapter is seen"
    assert np.abs(native - lora).max() <= 2, "of 255"
