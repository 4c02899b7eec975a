"""A merge needs little memory, whatever the size of the base."""

import subprocess
import sys

import pytest
import torch

from krona_hub import Adapter, LayerDelta, write
from krona_hub.checkpoints.header import read_header
from krona_hub.kron.terms import KronTerms
from krona_hub.merging.undo import unmerge
from tests.merging.test_killed import write_large

MERGE = """
import resource, sys
resource.setrlimit(resource.RLIMIT_DATA, (400 << 20, 400 << 20))
from krona_hub import merge
base, adapter, out, undo = sys.argv[1:]
print(merge(base, [(adapter, 0.5)], out, undo=undo, threads=2).bytes_touched)
"""


@pytest.mark.slow
def test_a_merge_needs_400_mb_whatever_the_size_of_the_base(tmp_path):
    base, shape = tmp_path / "unet" / "model.safetensors", (6000, 6000)
    base.parent.mkdir()
    write_large(base, 18, shape, "mid_block.attentions.{}.to_q.weight")  # 1.3 GB
    terms = KronTerms(torch.randn(1, 60, 50), torch.randn(1, 100, 120))
    layers = {f"unet.mid_block.attentions.{i:02}.to_q": LayerDelta((terms,), shape) for i in range(0, 18, 2)}
    write(Adapter(layers), tmp_path / "adapter.safetensors")
    paths = [base.parent, tmp_path / "adapter.safetensors", tmp_path / "merged", tmp_path / "undo"]
    done = subprocess.run([sys.executable, "-c", MERGE, *paths], check=True, capture_output=True, text=True)
    assert int(done.stdout) == 9 * 2 * 6000**2
    merged = tmp_path / "merged" / base.name
    assert read_header(merged).tensors == read_header(base).tensors
    unmerge(tmp_path / "merged", tmp_path / "undo", in_place=True)
    assert merged.stat().st_size == base.stat().st_size
    for path in (base, merged, tmp_path / "undo"):
        path.unlink()
