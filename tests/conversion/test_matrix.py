"""Every real file to every target: a checked file whose table is true, or a coded refusal; REFUSED says which."""

import pytest
import torch

from krona_hub.conversion import convert
from krona_hub.errors import KronaError
from krona_hub.formats.compatibility.applications import APPLICATIONS
from krona_hub.formats.reading.reader import read
from tests.conversion.true_error import true_errors
from tests.shared import shared

FILES = ("weapons_sd15_r4.safetensors", "lora_disney.safetensors")
TO = (
    "krona", "lycoris-lokr", "lycoris-locon", "peft-lokr", "peft-lora", "diffusers-lora", "diffusers-lokr",
    "kohya-lora", "diffusekrona", "cloneofsimo",
)  # fmt: skip
FOR = tuple(APPLICATIONS)
REFUSED = {  # (target, file or None for every file) -> code
    ("diffusekrona", None): "KH141",  # its rows are interleaved: no plain LoRA is one
    ("cloneofsimo", None): "KH101",  # read only
    ("diffusers-lokr", FILES[1]): "KH141",  # no component in its names, and the file has two
    ("lycoris", FILES[1]): "KH141",  # likewise: create_lycoris writes one model a file
    ("nunchaku", None): "KH141",  # it does not run SD 1.5
    ("musubi", None): "KH141",  # likewise
    ("onetrainer", FILES[1]): "KH141",  # it needs every layer of the text encoder
}
DENOISER_ONLY = ("diffsynth", "simpletuner")  # they find no module of a text encoder of SD 1.5


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("option", [("to", t) for t in TO] + [("tool", t) for t in FOR], ids="-".join)
def test_every_real_file_becomes_a_checked_file_or_a_coded_refusal(file, option, tmp_path):
    torch.set_num_threads(1)
    kind, name = option
    source, out = shared("real", file), tmp_path / "out.safetensors"
    refused = REFUSED.get((name, None)) or REFUSED.get((name, file))
    if refused:
        with pytest.raises(KronaError) as refusal:
            convert(source, out, **{kind: name}, base="sd15")
        assert refusal.value.code == refused
        assert refusal.value.fix
        assert not out.exists()
        return
    before = read(source, base="sd15")
    lost = {layer for layer in before if layer.startswith("text_encoder.")} if name in DENOISER_ONLY else set()
    if lost:
        with pytest.raises(KronaError, match=rf"finds no module of sd15 for {len(lost)} of.*--allow-missing"):
            convert(source, out, **{kind: name}, base="sd15")
        assert not out.exists()
    report = convert(source, out, **{kind: name}, base="sd15", allow_missing=True)
    assert report.written and {*report.left_out.modules} == lost
    kept = {*report.left_out.embeddings, *read(out, base="sd15").extras}
    assert kept == set(before.extras), "its embeddings are in the file, or counted as left out"
    assert f"{len(report.layers)}/{len(before) - len(lost)} modules rebuilt" in report.checked
    rest = before.with_layers({layer: before[layer] for layer in before if layer not in lost})
    per_layer, total = true_errors(rest, read(out, base="sd15"))
    assert {row.layer for row in report.layers} == set(rest)
    assert report.relative_error == pytest.approx(total, rel=1e-3, abs=1e-6)
    for row in report.layers:
        assert row.relative_error == pytest.approx(per_layer[row.layer], rel=1e-3, abs=1e-6)
        if name not in ("krona", "lycoris-lokr", "peft-lokr", "diffusers-lokr"):
            assert row.relative_error == 0.0  # nothing but names changed


@pytest.mark.slow
def test_one_64x4_term_of_a_trained_lora_is_refused_with_the_alternatives_measured(tmp_path):
    """On a trained LoRA one 64x4 term keeps a few percent of the energy; a tool that hides it destroys the file."""
    out = tmp_path / "out.safetensors"
    with pytest.raises(KronaError, match="--allow-loss") as refusal:
        convert(shared("real", FILES[0]), out, shape="64x4", base="sd15")
    assert (refusal.value.code, refusal.value.exit_code) == ("KH140", 3)
    assert not out.exists()
    report = convert(shared("real", FILES[0]), out, shape="64x4", base="sd15", allow_loss=True)
    assert 0.9 < report.relative_error < 1
    assert report.verdict.startswith("Destroyed")
