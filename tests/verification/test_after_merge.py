"""What merge writes, verify calls the same; and merging a combined adapter is merging its parts."""

import pytest
import torch
from safetensors.torch import load_file

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.combining import combine
from krona_hub.errors import BaseMismatchError
from krona_hub.kron.terms import as_lora
from krona_hub.merging.api import merge
from krona_hub.verification import verify
from krona_hub.verification.ulps import units_apart
from tests.verification.test_check_merge import DORA, LOKR, LORA, TYPES, UNET, base_of

OPTIONS = {
    "nearest": {},
    "exact": {"exact_rounding": True},
    "stochastic": {"rounding": "stochastic", "seed": 3},
    "fp32-touched": {"out_dtype": "fp32-touched"},
    "bf16": {"out_dtype": "bf16"},
    "blocks": {"block_weights": {"attn1": 0.25, "proj_in": 0.0}},
}


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_merge_is_verified_in_every_way_it_can_be_made(options, dtype, tmp_path):
    base, adapters = base_of(tmp_path / "base", dtype), [(LOKR, 0.7), (LORA, -1.2)]
    merge(base, adapters, tmp_path / "merged", **OPTIONS[options])
    blocks = {name: value for name, value in OPTIONS[options].items() if name == "block_weights"}
    report = verify(tmp_path / "merged", base=base, adapters=adapters, **blocks)
    assert report.same, report.different[:3]
    wrong = verify(tmp_path / "merged", base=base, adapters=[(LOKR, 0.7), (LORA, -1.0)], **blocks)
    assert wrong.exit_code == 6 and {t.state for t in wrong.different} == {"other strength"}
    assert wrong.strengths == (pytest.approx(0.7, abs=0.02), pytest.approx(-1.2, abs=0.02))


@pytest.mark.parametrize("dtype", TYPES)
def test_a_merged_dora_is_verified(dtype, tmp_path):
    base = base_of(tmp_path / "base", dtype)
    merge(base, [(DORA, 0.5)], tmp_path / "merged")
    assert verify(tmp_path / "merged", base=base, adapters=[(DORA, 0.5)], exact=True).same
    report = verify(tmp_path / "merged", base=base, adapters=[(DORA, 1.0)])
    assert report.strengths == (pytest.approx(0.5, abs=0.01),)


@pytest.mark.parametrize(("dtype", "weights"), [("fp16", (0.7, -1.2)), ("bf16", (0.7, -1.2)), ("fp32", (0.5, -2.0))])
def test_merging_a_combination_is_merging_its_parts(dtype, weights, tmp_path):
    """Equal but for single units. In float32 the folded weights must be exact: its units are as small as theirs."""
    base, parts = base_of(tmp_path / "base", dtype), list(zip((LOKR, LORA), weights, strict=True))
    combine(parts, tmp_path / "both.safetensors", base=base)
    merge(base, parts, tmp_path / "a", exact_rounding=True)
    merge(base, [(tmp_path / "both.safetensors", 1.0)], tmp_path / "b", exact_rounding=True)
    one, two = load_file(tmp_path / "a" / UNET), load_file(tmp_path / "b" / UNET)
    assert one.keys() == two.keys()
    apart = torch.cat([units_apart(one[name], two[name]).flatten() for name in one])
    assert int(apart.max()) <= 1 and float((apart > 0).double().mean()) < 1e-4
    assert verify(tmp_path / "b", base=base, adapters=parts).same
    assert verify(tmp_path / "a", base=base, adapters=[(tmp_path / "both.safetensors", 1.0)]).same


def test_an_adapter_for_another_base_is_an_error_and_no_difference(tmp_path):
    base = base_of(tmp_path / "base")
    other = Adapter({"unet.nowhere": LayerDelta((as_lora(torch.ones(8, 2), torch.ones(2, 6)),), (8, 6))})
    with pytest.raises(BaseMismatchError, match="0 of 1 modules"):
        verify(base, base=base, adapters=[(other, 1.0)])
