"""Bases on disk as they come: which files hold which weights, in real names and shapes, and what is missing."""

import json

import pytest

from krona_hub.bases import catalog
from krona_hub.bases.loading import load_base
from krona_hub.errors import IncompleteError
from krona_hub.merging.base_weights import open_tree
from tests.merging import real_shapes

FILES = {
    "sd15": lambda path: real_shapes.ldm_file(path, "sd15"),
    "sdxl": lambda path: real_shapes.ldm_file(path, "sdxl"),
    "flux1-dev": real_shapes.bfl_file,
}


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_in_the_names_of_its_authors_holds_every_layer(name, tmp_path):
    tree = open_tree(FILES[name](tmp_path / "base.safetensors"))
    assert tree.base.family == name
    base = catalog.get(name)
    parts = [c for c in base.components if c in tree.base.components]
    wanted = {layer for part in parts for layer, _ in base.layers(part)}
    assert set(tree.places) == wanted and len(parts) == {"sd15": 2, "sdxl": 3, "flux1-dev": 1}[name]
    for layer in wanted:
        ((place,),) = tree.places[layer]
        info = tree.headers[place.path].tensors[place.tensor]
        rows = place.placement.rows or (0, info.shape[0])
        held = (rows[1] - rows[0], *info.shape[1:])
        assert (held[::-1] if place.placement.transpose else held) == base.module(layer).shape, layer


def test_a_folder_holds_the_layers_of_its_components(tmp_path):
    tree = open_tree(real_shapes.folder(tmp_path / "base", "sdxl", "unet", "text_encoder_2"))
    assert tree.base.family == "sdxl" and set(tree.base.components) == {"unet", "text_encoder_2"}
    assert set(tree.places) == {layer for layer, _ in tree.base.layers()}


def sharded(folder, index, *, left_out=""):
    """The text encoder of SD 1.5 in two shards, and an index of that name."""
    modules = catalog.get("sd15").components["text_encoder"]
    tensors = [f"{path}.weight" for path in modules]
    stem, variant = index.split(".safetensors")[0], ".fp16" if "fp16" in index else ""
    places = {}
    for i in (0, 1):
        name = f"{stem}{variant}-0000{i + 1}-of-00002.safetensors"
        mine = {t: modules[t.removesuffix(".weight")].shape for t in tensors[i::2]}
        if name != left_out:
            real_shapes.write(folder / name, mine)
        places |= dict.fromkeys(mine, name)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))


def test_the_shards_of_a_variant_have_an_index_of_its_own(tmp_path):
    folder = tmp_path / "text_encoder"
    sharded(folder, "model.safetensors.index.fp16.json")
    assert len(load_base(folder).components["text_encoder"]) == 72, "both shards are the model"
    sharded(folder, "model.safetensors.index.json")
    tree = open_tree(folder)
    assert len(tree.headers) == 4 and all(len(places) == 2 for places in tree.places.values())
    (folder / "model.fp16-00002-of-00002.safetensors").unlink()
    with pytest.raises(IncompleteError, match=r"lacks 1 of 2 shards, e\.g\. model.fp16-00002"):
        open_tree(folder)
    assert len(load_base(folder).components["text_encoder"]) == 72, "the plain shards are all there"


def test_shards_without_their_index_are_told(tmp_path):
    folder = tmp_path / "text_encoder"
    sharded(folder, "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").unlink()
    for read in (load_base, open_tree):
        with pytest.raises(IncompleteError, match=r"No index lists the shard .*model-00001-of-00002.safetensors"):
            read(folder)


def test_shards_may_have_any_names(tmp_path):
    folder = tmp_path / "text_encoder"
    sharded(folder, "model.safetensors.index.json")
    index = folder / "model.safetensors.index.json"
    text = index.read_text()
    for i in (1, 2):
        (folder / f"model-0000{i}-of-00002.safetensors").rename(folder / f"m{i}.safetensors")
        text = text.replace(f"model-0000{i}-of-00002", f"m{i}")
    index.write_text(text)
    tree = open_tree(folder)
    assert len(tree.headers) == 2 and all(len(places) == 1 for places in tree.places.values())
