"""Merged tensors, against W + w·ΔW in float64 rounded once."""

import torch

from krona_hub.adapter import LayerDelta
from krona_hub.bases.base import Placement
from krona_hub.kron.terms import KronTerms
from krona_hub.merging.patches import Patch
from krona_hub.merging.tiles import merge_tensor


def test_a_merged_tensor_is_the_sum_rounded_once():
    weight = torch.randn(12, 10).half()
    delta = LayerDelta((KronTerms(torch.randn(2, 3, 2), torch.randn(2, 4, 5)),), (12, 10))
    out = torch.empty(120, dtype=torch.float16)
    merge_tensor(
        weight,
        [Patch(delta, 0.5, Placement("unet.x"))],
        lambda first, tile: out[first : first + len(tile)].copy_(tile),
        out_dtype=torch.float16,
    )
    assert torch.equal(out.reshape(12, 10), (weight.float() + 0.5 * delta.dense()).half())
