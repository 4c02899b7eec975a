"""A base from folders and files equals the base that the configuration promises."""

import json
import shutil
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from krona_hub.bases import catalog, loading
from krona_hub.bases.name_table import table
from krona_hub.errors import IncompleteError, KronaError, NotFoundError, UnknownBaseError
from tests.bases.fakes import sparse_checkpoint
from tests.shared import shared

CHECKPOINT_PREFIX = {  # component -> prefix and name of each weight in a single file
    ("sd15", "unet"): "model.diffusion_model.{}.weight",
    ("sd15", "text_encoder"): "cond_stage_model.transformer.text_model.{}.weight",
    ("sd21", "unet"): "model.diffusion_model.{}.weight",
    ("sdxl", "unet"): "model.diffusion_model.{}.weight",
    ("sdxl", "text_encoder"): "conditioner.embedders.0.transformer.text_model.{}.weight",
    ("sdxl", "text_encoder_2"): "conditioner.embedders.1.model.{}.weight",
    ("flux1-dev", "transformer"): "{}.weight",
    ("flux1-schnell", "transformer"): "model.diffusion_model.{}.weight",
    ("sd3-medium", "transformer"): "model.diffusion_model.{}.weight",
    ("sd3-medium", "text_encoder"): "text_encoders.clip_l.transformer.text_model.{}.weight",
}


def single_file_names(base: str, component: str, prefix: str) -> dict[str, tuple[int, ...]]:
    """Tensor names of the original release, from the table of originals."""
    modules = catalog.get(base).components[component]
    own_names = component in ("unet", "transformer") or "embedders.1" in prefix
    originals = table(catalog.get(base)).parts[component].originals if own_names else {}
    shapes = {}
    for name, places in originals.items():
        sizes = [modules[p.layer.partition(".")[2]].shape for p in places]
        full = (sum(s[0] for s in sizes), *sizes[0][1:])
        tensor = prefix.format(name.removeprefix("openclip."))
        if tensor.endswith("in_proj.weight"):
            tensor = tensor.replace(".weight", "_weight")
        if tensor.endswith("text_projection.weight"):
            tensor = tensor.removesuffix(".weight")
        shapes[tensor] = full
    covered = {p.layer.partition(".")[2] for places in originals.values() for p in places}
    return shapes | {prefix.format(p): m.shape for p, m in modules.items() if p not in covered}


@pytest.mark.parametrize("name", sorted({base for base, _ in CHECKPOINT_PREFIX}))
def test_a_single_file_in_original_names_is_recognised_whole(name, tmp_path):
    shapes = {"first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3)}
    parts = [component for base, component in CHECKPOINT_PREFIX if base == name]
    for component in parts:
        shapes |= single_file_names(name, component, CHECKPOINT_PREFIX[name, component])
    path = sparse_checkpoint(tmp_path / "model.safetensors", shapes)
    base = loading.load_base(path)
    assert set(base.components) == set(parts)
    assert base.fingerprint == catalog.get(name).fingerprint
    assert base.family == name or (name == "sd21" and base.candidates == ("sd21-base", "sd21"))
    weights = loading.weight_files(path)
    assert {f"{c}.{p}" for c, m in base.components.items() for p in m} == set(weights)


def test_an_inpainting_unet_keeps_its_own_conv_in(tmp_path):
    shapes = single_file_names("sd15", "unet", "model.diffusion_model.{}.weight")
    shapes["model.diffusion_model.input_blocks.0.0.weight"] = (320, 9, 3, 3)
    base = loading.load_base(sparse_checkpoint(tmp_path / "inpainting.safetensors", shapes))
    assert base.components["unet"]["conv_in"].shape == (320, 9, 3, 3)


@pytest.mark.slow
def test_headers_and_configs_describe_the_same_base(tmp_path):
    folder = shared("golden", "base")
    from_weights = loading.load_base(folder)
    for component in from_weights.components:
        (tmp_path / component).mkdir()
        shutil.copy(folder / component / "config.json", tmp_path / component)
    from_configs = loading.load_base(tmp_path)
    assert dict(from_configs.components) == dict(from_weights.components)
    assert loading.weight_files(tmp_path) == {}


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_a_component_folder_under_any_name_is_the_component_of_the_pipeline(part, tmp_path):
    folder = tmp_path / "downloaded"
    shutil.copytree(shared("golden", "base", part), folder)
    whole = loading.load_base(shared("golden", "base"))
    assert loading.load_base(folder).components == {part: whole.components[part]}
    (folder / "config.json").unlink()
    assert loading.load_base(folder).components == {part: whole.components[part]}


def test_shards_are_one_model_and_a_missing_shard_is_named(tmp_path):
    source = next(shared("golden", "base", "unet").glob("*.safetensors"))
    tensors = load_file(source)
    halves = {f"part-{i}.safetensors": dict(list(tensors.items())[i::2]) for i in (0, 1)}
    for name, half in halves.items():
        save_file(half, tmp_path / name)
    index = {"weight_map": {key: name for name, half in halves.items() for key in half}}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    assert loading.load_base(tmp_path).components == {"unet": loading.load_base(source).components["unet"]}
    (tmp_path / "part-1.safetensors").unlink()
    with pytest.raises(IncompleteError, match=r"lacks 1 of 2 shards, e\.g\. part-1"):
        loading.load_base(tmp_path)


def test_base_weights_are_those_of_the_named_layers():
    places = loading.weight_files(shared("golden", "base"))
    expected = load_file(shared("golden", "_base_weights.safetensors"))
    for name, weight in expected.items():
        assert torch.equal(loading.read(places[name.removesuffix(".weight")]), weight)


def test_rows_halves_and_axes_are_put_right_on_reading(tmp_path):
    stacked = torch.arange(48.0).reshape(12, 4)
    save_file({"qkv.weight": stacked}, tmp_path / "w.safetensors")

    def read(**how):
        place = loading.WeightPlace(tmp_path / "w.safetensors", "qkv.weight", loading.Placement("x", **how))
        return loading.read((place,))

    assert torch.equal(read(rows=(4, 8)), stacked[4:8])
    assert torch.equal(read(swap_halves=True), torch.cat([stacked[6:], stacked[:6]]))
    assert torch.equal(read(transpose=True), stacked.T)


def test_what_is_no_base_says_what_to_give(tmp_path):
    with pytest.raises(UnknownBaseError, match="No base model found"):
        loading.load_base(tmp_path)
    with pytest.raises(UnknownBaseError, match="Did you mean 'sdxl'"):
        loading.load_base("sdlx")
    with pytest.raises(NotFoundError):
        loading.load_base(tmp_path / "gone.safetensors")
    vae = tmp_path / "vae"
    vae.mkdir()
    (vae / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    with pytest.raises(UnknownBaseError, match="AutoencoderKL"):
        loading.load_base(vae)
    save_file({"something.weight": torch.ones(2, 2)}, tmp_path / "odd.safetensors")
    assert list(loading.load_base(tmp_path / "odd.safetensors").layers()) == [
        ("transformer.something", ((2, 2), False, 1))
    ]
    save_file({"something.bias": torch.ones(2)}, tmp_path / "odd.safetensors")
    with pytest.raises(UnknownBaseError, match=r"not a checkpoint of a base model.*a catalog name, a Hub id"):
        loading.load_base(tmp_path / "odd.safetensors")
    (vae / "config.json").write_text("not json")
    with pytest.raises(KronaError, match="not valid JSON"):
        loading.load_base(vae)


def test_names_and_folders_with_weights_never_import_torch():
    import subprocess

    code = (
        "import sys; from krona_hub.bases import detection, loading; from krona_hub.bases.name_table import table;"
        f"table(loading.load_base('sdxl')).find('x'); loading.load_base({str(shared('golden', 'base'))!r});"
        "detection.candidates({'lora_unet_conv_in': None}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
