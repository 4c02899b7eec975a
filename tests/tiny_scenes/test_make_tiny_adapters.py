"""Adapters trained with peft and lycoris are read correctly with all key names."""

import pytest
import torch

import krona_hub
from krona_hub.formats.reading.describe import describe
from krona_hub.kron.norms import relative_difference
from scripts import make_tiny_adapters
from scripts.tiny_scenes import models, sampling, toy

ROUNDING = 2e-3  # the files are in half precision


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A base model with random weights, saved like the real one."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    words = models.tokenizer(folder / "words")
    models.save(models.pipeline(models.autoencoder(), models.unet(), models.text_encoder(), words), folder / "base")
    return folder


@pytest.fixture(scope="module")
def lora(folder):
    """The pipeline that peft trained for three steps; its files are in `folder`."""
    pipe = make_tiny_adapters.load_frozen(folder / "base")
    make_tiny_adapters.train_lora(pipe, folder, steps=3)
    return pipe


def first_pixels(pipe):
    return sampling.generate(pipe, [toy.captions()[0]], steps=2)[0].astype(int)


@pytest.mark.slow
def test_both_namings_of_the_lora_hold_one_adapter(folder, lora):
    one, two = (
        krona_hub.read(folder / make_tiny_adapters.FILES[f"lora {naming}"], base="tiny-scenes")
        for naming in ("diffusers", "kohya")
    )
    assert set(one.layers) == set(two.layers)
    assert {name.partition(".")[0] for name in one.layers} == {"unet", "text_encoder"}
    for name, delta in one.layers.items():
        assert relative_difference(delta.sums, two.layers[name].sums) < 1e-6, name


@pytest.mark.slow
def test_the_lora_is_what_peft_computes(folder, lora):
    """Alpha is half the rank: a reader that confused them would be wrong by a factor of two."""
    adapter = krona_hub.read(folder / make_tiny_adapters.FILES["lora kohya"], base="tiny-scenes")
    for component, model in (("unet", lora.unet), ("text_encoder", lora.text_encoder)):
        tuned = {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}
        assert tuned
        for name, module in tuned.items():
            ours = adapter[f"{component}.{name}"].dense()
            expected = module.get_delta_weight("default")
            assert torch.dist(ours.reshape(expected.shape), expected) <= ROUNDING * expected.norm(), name


@pytest.mark.slow
def test_diffusers_draws_the_same_from_the_file(folder, lora):
    fresh = make_tiny_adapters.load_frozen(folder / "base")
    plain = first_pixels(fresh)
    fresh.load_lora_weights(folder, weight_name=make_tiny_adapters.FILES["lora diffusers"])
    assert abs(first_pixels(fresh) - first_pixels(lora)).max() <= 2
    assert abs(first_pixels(lora) - plain).max() > 2


@pytest.mark.slow
def test_the_lokr_is_what_lycoris_computes(folder):
    pipe = make_tiny_adapters.load_frozen(folder / "base")
    make_tiny_adapters.train_lokr(pipe, folder, steps=3)
    adapter = krona_hub.read(folder / make_tiny_adapters.FILES["lokr"], base="tiny-scenes")
    fresh = make_tiny_adapters.load_frozen(folder / "base")
    plain = first_pixels(fresh)
    for name, delta in adapter.layers.items():
        component, _, path = name.partition(".")
        weight = getattr(fresh, component).get_submodule(path).weight
        weight.data += delta.dense().reshape(weight.shape)
    assert abs(first_pixels(fresh) - first_pixels(pipe)).max() <= 2
    assert abs(first_pixels(fresh) - plain).max() > 2
    assert all(module.alpha != module.rank for module in describe(folder / make_tiny_adapters.FILES["lokr"]).modules)
