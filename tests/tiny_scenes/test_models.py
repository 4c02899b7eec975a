"""The components of the pipeline: a real CLIP tokenizer, real module names, and a small size."""

import pytest
import torch

from krona_hub.bases import catalog
from scripts.tiny_scenes import denoiser, models, scene, tokens
from tests.tiny_scenes.test_images import OF_EVERY_KIND


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return models.tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_every_word_of_the_captions_is_one_token(tokenizer):
    assert {word: len(tokenizer(word)["input_ids"]) - 2 for word in scene.vocabulary()} == dict.fromkeys(
        scene.vocabulary(), 1
    )


def test_any_other_word_is_spelled_in_pieces(tokenizer):
    pieces = tokenizer.tokenize("zorbi naïve 🙂")
    assert tokens.END not in pieces
    assert len(tokenizer(" ".join(["zorbi"] * 40), truncation=True)["input_ids"]) == tokens.LENGTH


def test_training_uses_the_ids_that_the_tokenizer_gives(tokenizer):
    captions = denoiser.sample_captions(OF_EVERY_KIND, torch.Generator().manual_seed(0))
    captions += [scene.caption(s) for s in OF_EVERY_KIND]
    assert "" in captions
    expected = tokenizer(captions, padding="max_length", max_length=tokens.LENGTH, return_tensors="pt")["input_ids"]
    assert torch.equal(denoiser.Ids().of(captions), expected)


@pytest.mark.parametrize(("component", "make"), [("unet", models.unet), ("text_encoder", models.text_encoder)])
def test_the_catalog_knows_the_modules(component, make):
    built = {name.removeprefix("text_model."): m for name, m in make().named_modules()}
    known = catalog.get("tiny-scenes").components[component]
    weighted = {n for n, m in built.items() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    assert {name: tuple(built[name].weight.shape) for name in weighted} == {n: m.shape for n, m in known.items()}


def test_all_parts_fit_twelve_megabytes_in_half_precision():
    parts = models.autoencoder(), models.unet(), models.text_encoder()
    assert sum(p.numel() for part in parts for p in part.parameters()) * 2 < 11_700_000
