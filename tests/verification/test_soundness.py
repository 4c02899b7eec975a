"""validate() on adapters of every format: sound ones pass, and each kind of damage is named."""

import json
import shutil
from types import MappingProxyType

import pytest
import torch
from safetensors.torch import load_file, save_file

from krona_hub.errors import KronaError, NotFoundError, UnknownBaseError
from krona_hub.formats.reading.reader import read
from krona_hub.verification import validate
from tests.shared import shared

MODULE = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def codes(path, base=None):
    return [(f.code, f.severity) for f in validate(path, base).findings]


def adapters():
    """The reference adapters."""
    samples = json.loads(shared("golden", "index.json").read_text())["samples"]
    return [shared("golden", sample["adapter"]) for sample in samples]


def kohya(path, changes=MappingProxyType({})):
    """An SD 1.5 LoRA of one module, with tensors changed, or left out where None."""
    parts = {
        "lora_down.weight": torch.randn(4, 1280),
        "lora_up.weight": torch.randn(1280, 4),
        "alpha": torch.tensor(2.0),
        **changes,
    }
    save_file({f"{MODULE}.{name}": tensor for name, tensor in parts.items() if tensor is not None}, path)
    return path


def test_every_reference_adapter_is_sound_on_its_base():
    base = shared("golden", "base")
    found = {str(path): validate(path, base).findings for path in adapters()}
    assert len(found) > 30 and {path: findings for path, findings in found.items() if findings} == {}


def test_the_real_files_are_sound_and_known():
    formats = {"lora_disney.safetensors": "cloneofsimo", "weapons_sd15_r4.safetensors": "diffusers-lora"}
    for name, form in formats.items():
        report = validate(shared("real", name), "sd15")
        assert report.valid and report.format == form and report.exit_code == 0


def test_without_a_base_names_that_fit_none_are_valid(tmp_path):
    save_file({"lora_unet_my_own_net.lora_down.weight": torch.ones(2, 6)} |
              {"lora_unet_my_own_net.lora_up.weight": torch.ones(8, 2)}, tmp_path / "x.safetensors")  # fmt: skip
    assert codes(tmp_path / "x.safetensors") == []
    save_file({"lora_unet_my_own_net.lora_down.weight": torch.ones(2, 6)}, tmp_path / "x.safetensors")
    assert ("KH129", "error") in codes(tmp_path / "x.safetensors")


DAMAGE = {
    "a missing half": ({"lora_up.weight": None}, "KH129"),
    "a rank that differs": ({"lora_up.weight": torch.ones(1280, 3)}, "KH110"),
    "integers": ({"lora_up.weight": torch.ones(1280, 4, dtype=torch.int8)}, "KH150"),
    "infinity": ({"lora_up.weight": torch.full((1280, 4), float("inf"))}, "KH151"),
    "an alpha without end": ({"alpha": torch.tensor(float("inf"))}, "KH152"),
    "an alpha beyond reason": ({"alpha": torch.tensor(1e10)}, "KH152"),
    "an alpha of two numbers": ({"alpha": torch.ones(2)}, "KH110"),
    "an unknown key": ({"secret": torch.ones(2)}, "KH129"),
    "an OFT": ({"oft_blocks": torch.ones(2, 2)}, "KH128"),
    "a LoHa beside the LoRA": ({"hada_w1_a": torch.ones(2, 2)}, "KH129"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_each_damage_is_an_error_with_its_code(tmp_path, name):
    changes, code = DAMAGE[name]
    report = validate(kohya(tmp_path / "x.safetensors", changes), "sd15")
    assert code in [f.code for f in report.errors] and report.exit_code == 2
    assert all(f.fix for f in report.findings)


@pytest.mark.parametrize("name", DAMAGE)
def test_what_validate_calls_an_error_is_not_read_and_the_input_stays(tmp_path, name):
    path = kohya(tmp_path / "x.safetensors", DAMAGE[name][0])
    before = path.read_bytes()
    with pytest.raises(KronaError) as caught:
        adapter = read(path, base="sd15")
        assert not adapter.layers
    assert caught.value.fix and path.read_bytes() == before


def test_a_sound_lora_is_sound_and_on_another_base_it_does_not_fit(tmp_path):
    path = kohya(tmp_path / "x.safetensors")
    assert codes(path) == codes(path, "sd15") == []
    report = validate(path, "flux1-dev")
    assert report.exit_code == 5 and {f.code for f in report.errors} == {"KH160"}


def test_a_checkpoint_is_no_adapter_and_a_folder_of_pickles_is_said(tmp_path):
    save_file({"model.diffusion_model.out.2.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    assert codes(tmp_path / "model.safetensors") == [("KH126", "error")]
    (tmp_path / "old").mkdir()
    (tmp_path / "old/adapter_model.bin").write_bytes(b"PK\x03\x04")
    assert codes(tmp_path / "old") == [("KH121", "error")]


def test_a_peft_folder_is_checked_part_by_part(tmp_path):
    source = next(path for path in adapters() if path.is_dir())
    for part in ("unet", "text_encoder"):
        shutil.copytree(source, tmp_path / "both" / part)
    broken = tmp_path / "both/unet/adapter_model.safetensors"
    tensors = load_file(broken)
    first = min(tensors)
    save_file(tensors | {first: torch.full_like(tensors[first], float("nan"))}, broken)
    found = [f for f in validate(tmp_path / "both").findings if f.code == "KH151"]
    assert [f.where for f in found] == [f"unet/adapter_model.safetensors: {first!r}"]


def test_all_structural_problems_of_a_file_are_told_at_once(tmp_path):
    from tests.attacks.forge import entry, forged, put

    path = put(tmp_path, forged({"a": entry(0, 8, [9]), "b": None}, b"\0" * 8))
    assert codes(path) == [("KH125", "error"), ("KH125", "error")]


def test_a_source_or_a_base_that_is_not_there_is_an_error_of_the_question(tmp_path):
    with pytest.raises(NotFoundError):
        validate(tmp_path / "none.safetensors")
    with pytest.raises(UnknownBaseError):
        validate(kohya(tmp_path / "x.safetensors"), "sd99")
