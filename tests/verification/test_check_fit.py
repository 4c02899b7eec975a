"""verify(A, base=BASE): does the base have every layer with its shape? From headers alone."""

import subprocess
import sys

import pytest
import torch

from krona_hub.adapters.adapter import Adapter, BaseModel, LayerDelta
from krona_hub.bases.loading import load_base
from krona_hub.conversion import convert
from krona_hub.errors import NotFoundError, UnknownBaseError
from krona_hub.formats.writing.writer import write
from krona_hub.kron.terms import as_lora
from krona_hub.verification import verify
from tests.shared import shared

WEAPONS = shared("real", "weapons_sd15_r4.safetensors")
LOKR = shared("golden", "lyc_f4_dim2_a1.safetensors")


def test_an_adapter_fits_the_base_it_was_made_for():
    report = verify(WEAPONS, base="sd15")
    assert report.same and report.exit_code == 0 and (report.matched, report.total) == (128, 128)
    assert report.coverage == {"unet": (128, len(load_base("sd15").components["unet"]))}
    small = verify(LOKR, base=shared("golden", "base"))
    assert small.same and small.matched == small.total == 10


def test_on_another_base_it_does_not_fit_and_its_own_is_named():
    for base in ("sdxl", "flux1-dev"):
        report = verify(WEAPONS, base=base)
        assert not report.same and report.exit_code == 5 and report.problems
        assert report.fits_instead == ("sd15",)


def test_other_sizes_are_told_module_by_module():
    report = verify(LOKR, base="sd15")
    assert report.matched == 0 and len(report.problems) == report.total == 10
    assert "The delta is 32x32, but the layer of sd15 is 320x320." in next(iter(report.problems.values()))


def test_a_native_file_is_checked_layer_by_layer(tmp_path):
    out = tmp_path / "x.safetensors"
    convert(LOKR, out, base=shared("golden", "base"))
    assert verify(out, base=shared("golden", "base")).same
    report = verify(out, base="sd15")
    assert report.exit_code == 5 and report.matched == 0 and report.fingerprint_agrees is False


def layer(out, in_):
    return LayerDelta((as_lora(torch.ones(out, 2), torch.ones(2, in_)),), (out, in_))


def test_one_missing_layer_and_one_wrong_size_are_two_problems(tmp_path):
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1"
    good = {f"{path}.to_q": layer(1280, 1280), f"{path}.to_k": layer(1280, 1280)}
    adapter = Adapter({**good, f"{path}.to_v": layer(1280, 640), f"{path}.to_w": layer(1280, 1280)})
    write(adapter, tmp_path / "x.safetensors")
    report = verify(tmp_path / "x.safetensors", base="sd15")
    assert (report.matched, report.total) == (2, 4) and report.exit_code == 5
    assert "1280x640" in report.problems[f"{path}.to_v"] and "no unet" in report.problems[f"{path}.to_w"]


def test_a_recorded_base_must_be_able_to_be_this_one(tmp_path):
    """By the rule of a merge: names count before fingerprints, and what is unknown agrees."""
    path = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    for name, model, agrees in (
        ("same", load_base("sd15").model, True),
        ("named", BaseModel("sd15", fingerprint="0" * 64), True),
        ("other", BaseModel("sd21"), False),
        ("changed", BaseModel(fingerprint="0" * 64), False),
    ):
        write(Adapter({path: layer(1280, 1280)}, model), tmp_path / name)
        report = verify(tmp_path / name, base="sd15")
        assert report.fingerprint_agrees is agrees and report.recorded == model.words
        assert report.exit_code == (0 if agrees else 5)


def test_the_question_is_answered_without_torch():
    code = (
        "import sys\nfrom krona_hub.verification import verify\n"
        f"print(verify({str(WEAPONS)!r}, base='sd15').same, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_what_is_not_there_is_an_error(tmp_path):
    with pytest.raises(NotFoundError):
        verify(tmp_path / "none.safetensors", base="sd15")
    with pytest.raises(UnknownBaseError):
        verify(WEAPONS, base="sd99")
