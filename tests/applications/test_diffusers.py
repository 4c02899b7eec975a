"""What krona says of diffusers, against the converters of the installed diffusers itself.

The files are those that people could not load (`wild/files`), and the files that krona writes of them with
`--for diffusers`. `scripts/measure_diffusers.py` made the table: it loads every layer of every base model.
"""

import json
import warnings

import pytest
from safetensors.torch import load_file

from krona_hub import read, write
from krona_hub.bases import catalog
from krona_hub.errors import KronaError
from krona_hub.formats.compatibility.applications import APPLICATIONS
from krona_hub.formats.compatibility.verdicts import verdict
from krona_hub.formats.reading.describe import describe
from scripts.measure_diffusers import loader_of
from tests.shared import SHARED, shared

EXPECTED = SHARED / "wild" / "files" / "expected.json"
LISTED = json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}
OPEN = {
    "wan21_i2v_lora_k_img": "wan21-i2v-14b", "ltx2_lora": "ltx-2", "ltxv_transformer_prefix": "ltx-video-2b",
    "ernie_onetrainer": "ernie-image", "kandinsky5_kohya": "kandinsky5-lite-video",
}  # fmt: skip
CASES = {case: facts["base"] or OPEN[case] for case, facts in LISTED.items() if facts["base"] or case in OPEN}
ENDINGS = (".lora_A.weight", ".lora_B.weight", ".lora.down.weight", ".lora.up.weight", ".lokr_w1", ".lokr_w1_a")
FUSED = {"to_qkv": ("to_q", "to_k", "to_v"), "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj")}
LOST = ("dora_scale", "magnitude", "alpha", "diff")  # parts that a converter drops while it keeps the layer
DIFFUSERS = APPLICATIONS["diffusers"]


def converted(tensors, base):
    """The layers of the base model under whose names diffusers returns tensors; none if its converter raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            state = loader_of(base.name).lora_state_dict(dict(tensors))
        except Exception:  # its converters raise ValueError, KeyError and others
            return set()
    state = state[0] if isinstance(state, tuple) else state
    names = {key[: -len(end)] for key in state for end in ENDINGS if key.endswith(end)}
    found = {name.replace("text_model.", "") for name in names}
    for name in names:
        stem, _, last = name.rpartition(".")
        found |= {f"{stem}.{part}" for part in FUSED.get(last, ())}
    return {layer for layer in found if base.module(layer) is not None}


def file_of(case):
    return shared("wild", "files", f"{case}.safetensors")


@pytest.mark.parametrize("case", CASES)
def test_the_answer_for_a_wild_file_is_what_the_converter_does(case):
    base = catalog.get(CASES[case])
    try:
        about = describe(file_of(case), base=CASES[case])
    except KronaError:
        pytest.skip("refused by krona")
    layers = {layer for module in about.modules for layer in module.layers}
    found = verdict(DIFFUSERS, about)
    tensors = load_file(file_of(case))
    whole = layers <= converted(tensors, base) and bool(layers)
    if found.ok:
        assert whole, found
    elif found.answer == "no" and whole:
        assert any(part in key for part in LOST for key in tensors) or about.unmatched, found


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case, base in CASES.items() if LISTED[case]["want"] == "read"])
def test_every_file_for_diffusers_is_converted_whole(case, tmp_path):
    base = catalog.get(CASES[case])
    adapter = read(file_of(case), base=CASES[case])
    try:
        report = write(adapter, tmp_path / "out.safetensors", tool="diffusers", base=CASES[case])
    except KronaError as error:
        assert error.code and error.fix
        return
    if report.format == "diffusers-lora":
        assert set(adapter.layers) <= converted(load_file(report.path), base)


def test_the_table_was_measured_with_the_installed_version():
    import diffusers

    assert DIFFUSERS.evidence.version == diffusers.__version__
