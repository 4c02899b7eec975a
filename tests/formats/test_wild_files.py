"""Files that people could not load: each is read to the right delta or refused with a code, as `expected.json` says.

Names and shapes are those of the public reports, the values are random; README.md beside the files explains the fields.
"""

import json

import pytest
import torch
from safetensors import safe_open

from krona_hub import read, write
from krona_hub.adapters.unknown_base import KEPT_NAMES, UNKNOWN
from krona_hub.errors import InexpressibleError, KronaError
from krona_hub.formats.compatibility.verdicts import loads_in
from krona_hub.formats.reading.describe import describe
from tests.shared import SHARED, shared

EXPECTED = SHARED / "wild" / "files" / "expected.json"
BASES = {  # base models that the list leaves open
    "wan21_i2v_lora_k_img": "wan21-i2v-14b",
    "wan21_converter_dots": "wan21-i2v-14b",
    "anima_diffusion_pipe_llm_adapter": "anima",
    "ltx2_lora": "ltx-2",
    "ltxv_transformer_prefix": "ltx-video-2b",
    "ernie_onetrainer": "ernie-image",
    "kandinsky5_kohya": "kandinsky5-lite-video",
    "cascade_onetrainer": "stable-cascade-lite",
}
CASES = {
    case: facts | {"base": facts["base"] or BASES.get(case)}
    for case, facts in (json.loads(EXPECTED.read_text()) if EXPECTED.exists() else {}).items()
}
BESIDE = {"anima_diffusion_pipe_llm_adapter": 1, "cascade_onetrainer": 2}  # layers that the list does not measure
MAGNITUDES = (".magnitude", ".lora_magnitude_vector", ".dora_scale")
CHANGES = (".diff_b", ".set_weight")  # of parameters that are not weights of layers
NORM_LIMIT, ENTRY_LIMIT = 1e-4, 1e-5  # of the norm itself; of the largest entry that is listed


def file_of(case):
    return shared("wild", "files", f"{case}.safetensors")


def keys_of(path, endings):
    with safe_open(path, "pt") as file:
        return [key for key in file.keys() if key.endswith(endings)]  # noqa: SIM118 (safe_open is not a mapping)


def norm(delta):
    """The Frobenius norm, row by row: a single float32 sum over 10⁸ entries is not accurate enough."""
    return float(torch.linalg.vector_norm(torch.linalg.vector_norm(delta.flatten(1), dim=1)))


def assert_contains(adapter, expected, others=0):
    """The adapter has these layers, and a number of others."""
    assert set(adapter) >= set(expected) and len(adapter) == len(expected) + others
    for layer, wanted in expected.items():
        found = adapter[layer].dense()
        assert list(found.shape) == wanted["shape"], layer
        assert norm(found) == pytest.approx(wanted["norm"], rel=NORM_LIMIT), layer
        rows, columns, values = zip(*wanted["samples"], strict=True)
        entries = found.flatten(1)[list(rows), list(columns)].double()
        values = torch.tensor(values, dtype=torch.float64)
        assert (entries - values).abs().max() <= ENTRY_LIMIT * values.abs().max(), layer


def test_every_case_has_its_file():
    files = {path.stem for path in shared("wild", "files").glob("*.safetensors")}
    assert files == set(CASES)
    assert {case["want"] for case in CASES.values()} <= {"read", "refuse", "read-or-refuse"}


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c, e in CASES.items() if e["want"] == "read"])
@pytest.mark.parametrize("stated", [True, False], ids=["with-base", "detected"])
def test_a_file_is_read_to_its_deltas(case, stated):
    expected = CASES[case]
    assert expected["layers"]
    assert_contains(read(file_of(case), base=expected["base"] if stated else None), expected["layers"])


@pytest.mark.parametrize("case", [c for c, e in CASES.items() if e["want"] == "read-or-refuse"])
@pytest.mark.parametrize("stated", [True, False], ids=["with-base", "detected"])
def test_an_unclear_file_is_read_rightly_or_refused(case, stated):
    """Read where its base model is in the catalog, which has since learned those that the list leaves open."""
    expected = CASES[case]
    try:
        adapter = read(file_of(case), base=expected["base"] if stated else None)
    except KronaError as error:
        assert error.code and error.fix and case not in BASES
    else:
        if UNKNOWN in adapter.components:  # no known base model: the modules keep their names
            assert adapter.base is None and KEPT_NAMES in adapter.provenance.warnings
            return
        loha = len(keys_of(file_of(case), (".hada_w1_a",)))  # tests/formats/test_loha.py measures their deltas
        assert_contains(adapter, expected["layers"], others=loha + BESIDE.get(case, 0))


@pytest.mark.parametrize("case", [c for c, e in CASES.items() if e["want"] == "refuse"])
def test_a_file_that_is_not_understood_is_refused_or_loses_nothing(case):
    """Files may be read once their magnitudes and biases are applied; reading them without those is the failure."""
    path, expected = file_of(case), CASES[case]
    try:
        adapter = read(path, base=expected["base"])
    except KronaError as error:
        assert error.code and error.fix
        return
    magnitudes, changes = keys_of(path, MAGNITUDES), keys_of(path, CHANGES)
    assert magnitudes or changes, "nothing in this file has become readable"
    assert not keys_of(path, (".reshape_weight",)), "the weight would have to grow"
    assert sum(delta.magnitude is not None for delta in adapter.values()) == len(magnitudes)
    assert len(adapter.vectors) == len(changes)
    if not expected.get("dora"):
        assert_contains(adapter, expected["layers"])


@pytest.mark.parametrize(("case", "tool"), [(c, t) for c, e in CASES.items() for t in e["not_loaded_by"]])
def test_a_program_that_does_not_load_the_file_is_not_named(case, tool):
    verdict = loads_in(describe(file_of(case), base=CASES[case]["base"]))[tool]
    assert not verdict.ok and verdict.answer in ("no", "not known") and verdict.why


@pytest.mark.parametrize(("case", "tool"), [(c, t) for c, e in CASES.items() for t in e.get("names_for", {})])
def test_a_program_gets_its_own_names(case, tool, tmp_path):
    expected = CASES[case]
    adapter = read(file_of(case), base=expected["base"])
    report = write(adapter, tmp_path / "out.safetensors", tool=tool, base=expected["base"])
    with safe_open(report.path, "pt") as file:
        modules = {key.split(".")[0] for key in file.keys()}  # noqa: SIM118 (safe_open is not a mapping)
    assert modules == set(expected["names_for"][tool])
    verdict = loads_in(describe(report.path, base=expected["base"]))[tool]
    assert verdict.ok and verdict.loaded == len(adapter)


def test_no_file_is_written_for_a_program_that_does_not_run_the_base(tmp_path):
    adapter = read(file_of("for_nunchaku_sd15"), base="sd15")
    with pytest.raises(InexpressibleError, match="Nunchaku does not run sd15; nothing was written"):
        write(adapter, tmp_path / "out.safetensors", tool="nunchaku", base="sd15")
    assert not (tmp_path / "out.safetensors").exists()
