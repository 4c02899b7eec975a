"""Every reference file, sample and file from the wild, to every format and application: measured, or refused.

A file that is written is read back and compared with the source: each error that the report has is the true one, and
what the file does not have is in `left_out`. A conversion that is refused says why, and leaves no file.
"""

import json
from typing import NamedTuple

import pytest
import torch

from krona_hub import read
from krona_hub.adapters.unknown_base import UNKNOWN
from krona_hub.assets.shipped import folder_of
from krona_hub.bases.loading import base_weights
from krona_hub.conversion import convert
from krona_hub.errors import InexpressibleError, IntegrityError, KronaError
from krona_hub.formats.compatibility.applications import APPLICATIONS
from krona_hub.formats.known.registry import FORMATS, storage_of
from tests.conversion.true_error import agrees, true_errors
from tests.formats.test_wild_files import BASES
from tests.shared import ROOT, SHARED, shared

SAMPLES = ROOT / "tests" / "samples"
TARGETS = [{"to": f.name} for f in FORMATS if f.writes] + [{"tool": name} for name in APPLICATIONS]
OPTIONS = (
    {},
    {"exact": True},
    {"allow_missing": True},
    {"dtype": "float16"},
    {"exact": True, "dtype": "bfloat16"},
    {"dtype": "bfloat16", "allow_missing": True},
    {"exact": True, "dtype": "float16"},
)
assert len(TARGETS) % len(OPTIONS), "in turn, every target gets every option"


class Source(NamedTuple):
    """A file, and its base model: a folder with weights, a name of the catalog, or None if that has none."""

    name: str
    path: tuple[str, ...]
    base: str | None

    @property
    def has_weights(self):
        return self.path[0] != "wild"


def index(path):
    return json.loads(path.read_text()) if path.exists() else {}


GOLDEN = [
    Source(x["name"], ("golden", x["adapter"]), str(SHARED / "golden" / "base"))
    for x in index(SHARED / "golden" / "index.json").get("samples", ())
]
OWN = [
    Source(x["name"], ("samples", x["adapter"]), str(folder_of("tiny-scenes")))
    for x in index(SAMPLES / "index.json")["samples"]
]
WILD = [
    Source(case, ("wild", "files", f"{case}.safetensors"), expected["base"] or BASES.get(case))
    for case, expected in index(SHARED / "wild" / "files" / "expected.json").items()
]
SLOW = {"flux2_klein9b_aitoolkit_fused_lokr"}  # rows of a LoKr of real size: 40 s per conversion
SMALL = [pytest.param(i, source, id=source.name) for i, source in enumerate(GOLDEN + OWN)]
REAL = [pytest.param(i, source, id=source.name) for i, source in enumerate(WILD) if source.name not in SLOW]


def place_of(source):
    return SAMPLES / source.path[1] if source.path[0] == "samples" else shared(*source.path)


def check(source, target, options, folder):
    """Convert, and return whether the target holds the result; fail unless the report is true and complete."""
    label = " ".join(f"{key}={value}" for key, value in (target | options).items())
    folder = folder / label.replace(" ", "-")
    folder.mkdir()
    path, base = place_of(source), source.base
    try:
        report = convert(path, folder / "out", base=base, **target, **options)
    except KronaError as error:
        assert not isinstance(error, IntegrityError), f"{label}: {error}"
        assert error.code and error.fix, label
        assert not any(folder.iterdir()), f"{label}: a refused conversion leaves a file"
        if source.has_weights:  # these are read, so that only the target can be the cause
            assert isinstance(error, InexpressibleError) and error.exit_code == 3, f"{label}: {error}"
        assert not source.has_weights or target != {"to": "krona"}, f"{label}: the native format holds everything"
        return False
    before = read(path, base=base, allow_missing=options.get("allow_missing", False))
    after = read(folder / "out", base=base)
    if UNKNOWN in after.components and UNKNOWN not in before.components:  # PEFT does not state the component
        assert base is None and len(before.components) == 1, label
        after = read(folder / "out", component=before.components[0])
    unnamed = set(report.left_out.modules) - set(before.provenance.skipped)  # layers that an application does not find
    assert unnamed <= before.layers.keys() and (not unnamed or ("tool" in target and "allow_missing" in options)), label
    assert len(report.left_out.modules) == len(unnamed) + len(before.provenance.skipped), label
    before = before.with_layers({layer: delta for layer, delta in before.layers.items() if layer not in unnamed})
    assert_complete(report, before, after, options, label)
    assert_measured(report, before, after, base_weights(base) if source.has_weights else None, label)
    return True


def assert_complete(report, before, after, options, label):
    """What the source has is in the result or in `left_out`, and the latter is empty unless that is allowed."""
    lost = report.left_out
    assert options.get("allow_missing") or not lost, label
    assert not options.get("exact") or not (lost.vectors or lost.embeddings), label
    assert not lost or (" left out." in report.verdict and "Exact:" not in report.verdict), f"{label}: {report.verdict}"
    added = after.layers.keys() - before.layers.keys()
    assert before.layers.keys() <= after.layers.keys(), label
    assert not any(after[layer].dense().any() for layer in added), label  # parts of fused modules
    wanted = {name: v for name, v in before.vectors.items() if v.any()}
    found = {name: v for name, v in after.vectors.items() if v.any() or name in wanted}
    dropped = set(lost.vectors) - set(before.provenance.skipped_vectors)
    assert len(lost.vectors) == len(dropped) + len(before.provenance.skipped_vectors), label
    assert found.keys() == wanted.keys() - dropped and dropped <= wanted.keys(), label
    dtype = getattr(torch, options.get("dtype", ""), None)
    for name, vector in found.items():
        assert vector.shape == wanted[name].shape, f"{label}: {name}"
        assert torch.equal(vector.double(), wanted[name].to(dtype or wanted[name].dtype).double()), f"{label}: {name}"
    assert after.extras.keys() == before.extras.keys() - set(lost.embeddings), label
    assert all(torch.equal(tensor, before.extras[key]) for key, tensor in after.extras.items()), label


def assert_measured(report, before, after, weights, label):
    """The reported errors are those of the definition, per layer and in total."""
    rows = {row.layer: row.relative_error for row in report.layers}
    assert rows.keys() == before.layers.keys(), label
    errors, total = true_errors(before, after, weights)
    for layer, error in errors.items():
        assert agrees(rows[layer], error), f"{label}: {layer}: reported {rows[layer]:.3e}, true {error:.3e}"
    beside = error_of_vectors(before.vectors, after.vectors)
    assert agrees(report.vector_error, beside), label
    if total is not None:
        assert agrees(report.relative_error, max(total, beside)), f"{label}: {report.relative_error:.3e}, {total:.3e}"
    exact = report.verdict.startswith("Exact")
    assert exact == (report.relative_error <= 1e-6), f"{label}: {report.verdict}"


def error_of_vectors(before, after):
    """Relative, over all vectors that the result has."""
    pairs = [(before[name].double().flatten(), after[name].double().flatten()) for name in before if name in after]
    if not pairs:
        return 0.0
    old, new = (torch.cat(vectors) for vectors in zip(*pairs, strict=True))
    return float((new - old).norm() / old.norm()) if old.any() else 0.0


def real_method(source, target):
    """A method for weights of real size, None for a LoRA near a LoKr: that, or a search of shapes, takes minutes."""
    low_rank = "to" in target and storage_of(target["to"]).kind == "low-rank"
    if low_rank and "lokr" in source.name:
        return None
    loads_lora_only = "tool" in target and APPLICATIONS[target["tool"]].lokr is None
    return {} if low_rank or loads_lora_only else {"exact": True}


@pytest.mark.parametrize(("number", "source"), SMALL)
def test_a_small_file_to_a_target_in_turn(number, source, tmp_path):
    torch.set_num_threads(1)
    goal = TARGETS[number * 3 % len(TARGETS)]
    check(source, goal, OPTIONS[number % len(OPTIONS)], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "source"), SMALL)
def test_a_small_file_to_every_target(number, source, tmp_path):
    torch.set_num_threads(1)
    written = [check(source, t, OPTIONS[(number + i) % len(OPTIONS)], tmp_path) for i, t in enumerate(TARGETS)]
    assert sum(written) >= 3


@pytest.mark.slow
@pytest.mark.parametrize(("number", "source"), REAL)
def test_a_file_from_the_wild_to_every_target(number, source, tmp_path):
    """Without other dtypes, for which every layer would have to be multiplied out."""
    torch.set_num_threads(1)
    written = 0
    for i, target in enumerate(TARGETS):
        method = real_method(source, target)
        if method is not None:  # --exact leaves nothing out
            written += check(source, target, method or {"allow_missing": (number + i) % 2 == 0}, tmp_path)
    wanted = index(SHARED / "wild" / "files" / "expected.json")[source.name]["want"]
    assert written >= 5 or wanted != "read", "what is read is written for most targets"
