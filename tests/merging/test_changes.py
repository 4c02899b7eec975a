"""Patches as changes of a file: the numbers are those of the oracle, the memory stays small."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from krona_hub.adapter import LayerDelta
from krona_hub.bases.base import Placement
from krona_hub.checkpoints.header import read_header
from krona_hub.checkpoints.rewrite import rewrite
from krona_hub.checkpoints.writer import write_tensors
from krona_hub.kron.terms import KronTerms
from krona_hub.merging.changes import DTYPES, bytes_of, change_of, tensor_of
from krona_hub.merging.patches import Patch
from tests.merging.oracle import merged
from tests.merging.test_killed import write_large

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]


def random_patch(rows: int, columns: int) -> Patch:
    terms = KronTerms(torch.randn(2, 40, 33), torch.randn(2, rows // 40, columns // 33))
    return Patch(LayerDelta((terms,), (rows, columns)), -0.7, Placement("x"))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(6, 5), (7,), (), (0, 3), (2, 3, 1, 2)])
def test_bytes_of_a_file_are_its_tensors_without_a_copy_or_a_warning(tmp_path, dtype, shape):
    tensor = torch.randn(shape).to(dtype)
    write_tensors(tmp_path / "x", {"t": tensor})
    header, data = read_header(tmp_path / "x"), (tmp_path / "x").read_bytes()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = tensor_of(memoryview(data)[header.data_start :], header.tensors["t"])
    assert found.dtype == dtype and found.shape == tensor.shape
    assert bytes(bytes_of(found.reshape(-1))) == data[header.data_start :]


@pytest.mark.parametrize("out", ["F16", "F32", "BF16"])
def test_a_changed_tensor_of_a_file_is_what_the_kernel_makes_of_it(tmp_path, out):
    torch.manual_seed(3)
    base, patch, survivals = torch.randn(520, 1023).half(), random_patch(520, 1023), []
    write_tensors(tmp_path / "base", {"w": base, "other": torch.ones(3)})
    header = read_header(tmp_path / "base")
    change = change_of(header.tensors["w"], [patch], out_dtype=out, note=survivals.append, name="w")
    rewrite(header, tmp_path / "out", {"w": change}, metadata={})
    found = load_file(tmp_path / "out")
    expected, survival = merged(base, [patch], DTYPES[out])
    assert torch.equal(found["w"], expected) and torch.equal(found["other"], torch.ones(3))
    assert survivals == [survival]


MERGE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (400 << 20, 400 << 20))
from pathlib import Path
import torch
from krona_hub.checkpoints.header import read_header
from krona_hub.merging.changes import change_of
from krona_hub.merging.folders import MergedFile, Place, write_merged
from tests.merging.test_changes import random_patch
base, merged = map(Path, sys.argv[1:])
header = read_header(base)
note = [].append
changes = {n: change_of(i, [random_patch(*i.shape)], out_dtype="F16", note=note) for n, i in header.tensors.items()}
write_merged(Place(base, merged), [MergedFile(header, changes, {})], threads=2)
"""


@pytest.mark.slow
def test_a_merge_needs_400_mb_whatever_the_size_of_the_base(tmp_path):
    write_large(tmp_path / "base", 16, (6000, 5940))  # 1.1 GB
    subprocess.run(
        [sys.executable, "-c", MERGE, tmp_path / "base", tmp_path / "merged"], check=True, cwd=Path(__file__).parents[2]
    )
    assert read_header(tmp_path / "merged").tensors == read_header(tmp_path / "base").tensors
    for name in ("base", "merged"):
        (tmp_path / name).unlink()
