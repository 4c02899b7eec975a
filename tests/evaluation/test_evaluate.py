"""Scores of images against references and prompts: columns, skipped measures, and embeddings of the models."""

import json
import math

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from krona_hub import generate
from krona_hub.assets.shipped import folder_of
from krona_hub.cli.main import main
from krona_hub.errors import DataError, NotFoundError
from krona_hub.evaluation import evaluate
from krona_hub.evaluation.embedders import Embedder
from tests.training.bases import clip_tokenizer, save_photos

FILES = folder_of("tiny-scenes").parent


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Folder `drawn` with a red image of column base and a blue one of column toy; folder `toy` with a blue image."""
    root = tmp_path_factory.mktemp("pictures")
    for folder, column, color in (("drawn", "base", "red"), ("drawn", "toy", "blue"), ("toy", "", "blue")):
        (root / folder).mkdir(exist_ok=True)
        about = PngInfo()
        record = {"krona_generate": 1, "pictures": [{"prompt": f"a {color} toy", "column": column}]}
        about.add_text("krona", json.dumps(record))
        image = Image.new("RGB", (32, 32), color)
        image.save(root / folder / f"{column or 'own'}.png", pnginfo=about if column else None)
    Image.new("RGB", (64, 32), "white").save(root / "drawn" / "grid.png")
    return root


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    folder = tmp_path_factory.mktemp("clip")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(3)
    config = CLIPConfig(
        text_config={**small, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 63},
        vision_config={**small, "image_size": 32, "patch_size": 16}, projection_dim=8,
    )  # fmt: skip
    CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    CLIPProcessor(CLIPImageProcessor(**size), clip_tokenizer(folder / "words")).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    from transformers import ViTConfig, ViTImageProcessor, ViTModel

    folder = tmp_path_factory.mktemp("dino")
    torch.manual_seed(4)
    config = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
def test_what_generate_drew_is_told_apart_by_column_and_prompt(tmp_path):
    lokr, prompt = FILES / "zorbi_lokr.safetensors", "a photo of a zorbi on a blue table, in the middle"
    generate("tiny-scenes", [prompt], adapters=[lokr], compare=True, out=tmp_path / "drawn", device="cpu")
    report = evaluate(tmp_path / "drawn", FILES / "zorbi")
    assert {origin.prompt for origin in report.told} == {prompt}
    assert list(report.columns) == ["base", "zorbi_lokr"]
    assert report.columns["zorbi_lokr"]["identity"] > 0.5 > 0.3 > report.columns["base"]["identity"]


def test_columns_of_a_comparison_are_told_apart(folders):
    report = evaluate(folders / "drawn", folders / "toy")
    assert report.columns == {"base": {"identity": 0.0}, "toy": {"identity": 1.0}}
    assert [origin.prompt for origin in report.told] == ["a red toy", "a blue toy"]
    assert len(report.left_out) == 2  # neither CLIP nor DINO is here


def test_models_score_by_the_cosine_of_their_embeddings(folders, clip, dino):
    report = evaluate(folders / "drawn", folders / "toy", clip=clip, dino=dino)
    assert [m.name for m in report.measures] == ["identity", "CLIP-I", "CLIP-T", "DINO"]
    columns = report.columns
    assert columns["toy"]["CLIP-I"] == pytest.approx(1) and columns["toy"]["DINO"] == pytest.approx(1)
    assert columns["base"]["CLIP-I"] < 0.9999
    model = Embedder(clip)
    (image,), (prompt,) = model.embed_images([Image.new("RGB", (32, 32), "red")]), model.embed_prompts(["a red toy"])
    assert math.isclose(columns["base"]["CLIP-T"], float(image @ prompt), abs_tol=1e-5)


def test_a_prompt_for_all_and_pictures_without_one(folders, clip):
    assert "CLIP-T" not in {m.name for m in evaluate(folders / "toy", folders / "toy", clip=clip).measures}
    report = evaluate(folders / "toy", folders / "toy", clip=clip, prompt="a toy")
    assert report.told[0].prompt == "a toy" and report.measures[-1].name == "CLIP-T"


def test_what_is_not_there_is_told(folders, tmp_path):
    with pytest.raises(NotFoundError, match="hf download"):
        evaluate(folders / "drawn", folders / "toy", dino=str(tmp_path / "none"))
    with pytest.raises(NotFoundError, match="No such folder"):
        evaluate(folders / "drawn", folders / "nothing")
    with pytest.raises(DataError, match="No images found"):
        evaluate(tmp_path, folders / "toy")


def test_the_command_prints_a_row_for_each_column(folders, capsys):
    assert main(["evaluate", str(folders / "drawn"), "--like", str(folders / "toy")]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["base", "0.000"] in lines and ["toy", "1.000"] in lines


def test_photographs_need_no_record(tmp_path):
    photos = save_photos(tmp_path / "photos")
    assert set(evaluate(photos, photos).columns) == {""}
