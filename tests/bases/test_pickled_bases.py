"""A base model stored as a pickle is called one wherever it is opened, is never loaded, and can be converted."""

import pickle
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from krona_hub.bases.loading import load_base, read, weight_files
from krona_hub.cli.main import main
from krona_hub.conversion.bake_dora import plain_deltas
from krona_hub.errors import PickleError
from krona_hub.formats.writing.writer import write
from krona_hub.merging.base_weights import open_tree
from krona_hub.merging.plan import plan_merge
from tests import single_file, tiny
from tests.formats import made


class Bomb:
    """Raises when unpickled."""

    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A pipeline, an adapter of it, images, and copies of the pipeline with pickles that raise when loaded."""
    home, pipe = tmp_path_factory.mktemp("pickled"), tiny.sd15()
    pipe.save_pretrained(home / "base")
    shapes = {name: shape for name, shape in tiny.layers(pipe, "to_q", "to_v").items() if name.startswith("unet.")}
    write(made.lora(shapes), home / "lora.safetensors", format="kohya-lora", base=home / "base")
    for i in range(2):
        (home / "images").mkdir(exist_ok=True)
        Image.new("RGB", (64, 64), (90 * i, 40, 20)).save(home / f"images/{i}.png")
    for name in ("folder", "bare"):
        shutil.copytree(home / "base", home / name)
        for weights in (home / name).glob("*/*.safetensors"):
            weights.with_suffix(".bin").write_bytes(pickle.dumps(Bomb()))
            weights.unlink()
    for config in (home / "bare").glob("*/config.json"):
        config.unlink()
    torch.save({"state_dict": Bomb()}, home / "model.ckpt")
    (home / "old.pt").write_bytes(pickle.dumps(Bomb()))
    return home


FILES, FOLDERS = ("model.ckpt", "old.pt"), ("folder", "folder/unet", "bare")
COMMANDS = {
    "merge": "merge {base} {home}/lora.safetensors -o {out}",
    "extract from": "extract {base} {home}/base -o {out}",
    "extract to": "extract {home}/base {base} -o {out}",
    "verify a merge": "verify {home}/base --base {base} --adapter {home}/lora.safetensors",
    "generate": "generate {base} --prompt x -o {out}",
    "train": "train --base {base} --data {home}/images --prompt zorbi --check --device cpu -o {out}",
}
BY_NAME = {  # need the names and shapes of a base only, which the configurations of a folder tell
    "convert": "convert {home}/lora.safetensors --to peft-lora --base {base} -o {out}",
    "verify a fit": "verify {home}/lora.safetensors --base {base}",
    "inspect": "inspect {home}/lora.safetensors --base {base}",
}


def ran(command, home, base, tmp_path, capsys):
    """The exit status and the messages of a command."""
    arguments = [part.format(home=home, base=home / base, out=tmp_path / "out") for part in command.split()]
    return main(arguments), capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS | BY_NAME)
@pytest.mark.parametrize("base", FILES)
def test_a_file_is_called_a_pickle(command, base, home, tmp_path, capsys):
    status, message = ran((COMMANDS | BY_NAME)[command], home, base, tmp_path, capsys)
    assert status == PickleError.exit_code and "KH121" in message and f"{base} is a pickle" in message
    assert "from_single_file" in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("base", FOLDERS)
def test_a_folder_with_pickles_only_is_called_that(command, base, home, tmp_path, capsys):
    if command in ("generate", "train") and base == "folder/unet":
        pytest.skip("a component is not a pipeline")
    status, message = ran(COMMANDS[command], home, base, tmp_path, capsys)
    assert status == PickleError.exit_code and "KH121" in message and "weights only as pickles, such as" in message
    assert "save_pretrained(NEW_FOLDER)" in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", BY_NAME)
def test_where_names_and_shapes_are_enough_the_configuration_is_read(command, home, tmp_path, capsys):
    assert ran(BY_NAME[command], home, "folder", tmp_path, capsys)[0] == 0


def test_the_weights_that_a_dora_needs_are_called_pickles(home):
    layers = {name: shape for name, shape in tiny.layers(tiny.sd15(), "to_q").items() if name.startswith("unet.")}
    weights = weight_files(home / "base")
    dora = made.as_dora(made.lora(layers), lambda name: read(weights[name]))
    with pytest.raises(PickleError):
        plain_deltas(dora.layers, home / "folder")


def test_a_pickled_text_encoder_does_not_hide_the_denoiser(home, tmp_path):
    shutil.copytree(home / "base", tmp_path / "mixed")
    (weights,) = (tmp_path / "mixed/text_encoder").glob("*.safetensors")
    weights.rename(weights.with_suffix(".bin"))
    assert weight_files(tmp_path / "mixed").keys() == {
        name for name in weight_files(home / "base") if name.startswith("unet.")
    }
    text = {name: shape for name, shape in tiny.layers(tiny.sd15(), "q_proj").items() if name.startswith("text_")}
    unet = {name: shape for name, shape in tiny.layers(tiny.sd15(), "to_q").items() if name.startswith("unet.")}
    plan = plan_merge(tmp_path / "mixed", [(made.lora(text | unet), 1.0)], allow_missing=True)
    assert {name.partition(".")[0] for name in plan.adapters[0].missing} == {"text_encoder"}


def test_a_safetensors_file_with_the_name_of_a_pickle_is_read(home, tmp_path):
    whole = single_file.save(tiny.sd15(), tmp_path / "model.ckpt")
    with single_file.known("tiny-sd", str(home / "base")):
        assert load_base(whole).family == "tiny-sd" and open_tree(whole).places


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("zipped", [True, False])
def test_the_advice_for_a_file_works(zipped, home, tmp_path):
    from diffusers import StableDiffusionPipeline

    pipe, path = tiny.sd15(), tmp_path / "model.ckpt"
    tensors = load_file(single_file.save(pipe, tmp_path / "model.safetensors"))
    torch.save({"state_dict": tensors}, path, _use_new_zipfile_serialization=zipped)
    parts = {"vae": pipe.vae, "tokenizer": None, "safety_checker": None, "feature_extractor": None}
    converted = StableDiffusionPipeline.from_single_file(
        str(path), config=str(home / "base"), local_files_only=True, **parts
    )
    converted.save_pretrained(tmp_path / "converted")
    assert same_weights(tmp_path / "converted", home / "base")


@pytest.mark.filterwarnings("ignore")
def test_the_advice_for_a_folder_works(home, tmp_path):
    from diffusers import DiffusionPipeline

    tiny.sd15().save_pretrained(tmp_path / "pickled", safe_serialization=False)
    with pytest.raises(PickleError):
        open_tree(tmp_path / "pickled")
    parts = dict.fromkeys(("tokenizer", "safety_checker", "feature_extractor"))
    DiffusionPipeline.from_pretrained(tmp_path / "pickled", **parts).save_pretrained(tmp_path / "converted")
    assert same_weights(tmp_path / "converted", home / "base")


def same_weights(one, two) -> bool:
    name = "unet/diffusion_pytorch_model.safetensors"
    first, second = load_file(one / name), load_file(two / name)
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
