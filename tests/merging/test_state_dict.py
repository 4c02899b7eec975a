"""Adapters into weights in memory: names of any kind, nothing shared that changes, nothing changed that is shared."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.errors import AmbiguousError, BaseMismatchError, DtypeError
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.writer import write
from krona_hub.kron.terms import KronTerms
from krona_hub.merging.arithmetic.rounding import Rounding
from krona_hub.merging.state_dict import apply_to_state_dict
from tests import tiny
from tests.formats.test_golden_files import LIMITS, SAMPLES
from tests.merging.cases import kron, lora, numbers
from tests.merging.oracle import HALF, in_double, rounded
from tests.shared import shared

EXACT = Rounding(exact=True)


@pytest.fixture(autouse=True)
def random() -> None:
    torch.manual_seed(5)


@pytest.fixture(scope="module")
def base_weights() -> dict[str, Tensor]:
    return load_file(shared("golden", "_base_weights.safetensors"))


def adapter_for(model: nn.Module, component: str, ending: tuple[str, ...] = ("to_q", "to_k", "conv1")) -> Adapter:
    """A Kronecker or LoRA delta on some layers of a model."""
    layers = {}
    for i, (name, weight) in enumerate(model.named_parameters()):
        module = name.removesuffix(".weight")
        if module.endswith(ending) and weight.ndim > 1:
            size = len(weight), weight[0].numel()
            layers[f"{component}.{module}"] = LayerDelta(
                ((kron(size, 4, 2) if i % 2 else lora(size, 3)),), weight.shape
            )
    return Adapter(layers)


def expected(weight: Tensor, delta: LayerDelta, strength: float = 1.0) -> Tensor:
    total = weight.double() + strength * in_double(delta).dense(weight.double())
    return rounded(total, weight.dtype)


@pytest.mark.slow
def test_the_state_dict_of_a_model_gets_its_deltas_and_shares_the_rest() -> None:
    unet = tiny.sd15().unet.half()
    adapter, before = adapter_for(unet, "unet"), unet.state_dict()
    after = apply_to_state_dict(before, [(adapter, 0.7)], rounding=EXACT)
    assert list(after) == list(before) and len(adapter) > 4
    for name, weight in before.items():
        delta = adapter.layers.get(f"unet.{name.removesuffix('.weight')}") if name.endswith(".weight") else None
        if delta is None:
            assert after[name] is weight
        else:
            assert torch.equal(after[name], expected(weight, delta, 0.7)) and after[name] is not weight
    unet.load_state_dict(after)


@pytest.mark.parametrize("prefix", ["text_model.", ""])
def test_a_text_encoder_is_found_with_and_without_its_text_model(prefix: str) -> None:
    weight = numbers(24, 24)
    delta = LayerDelta((kron((24, 24), 4, 2),), (24, 24))
    adapter = Adapter({"text_encoder.encoder.layers.0.self_attn.q_proj": delta})
    name = f"{prefix}encoder.layers.0.self_attn.q_proj.weight"
    assert torch.allclose(apply_to_state_dict({name: weight}, adapter)[name], weight + delta.dense())


def test_a_pipeline_of_two_components_is_told_apart_by_its_prefixes() -> None:
    weights = {f"{c}.proj.weight": numbers(8, 8) for c in ("unet", "text_encoder")}
    adapter = Adapter({f"{c}.proj": LayerDelta((kron((8, 8), 2, 2),), (8, 8)) for c in ("unet", "text_encoder")})
    after = apply_to_state_dict(weights, adapter)
    for component in ("unet", "text_encoder"):
        delta = adapter.layers[f"{component}.proj"].dense()
        assert torch.allclose(after[f"{component}.proj.weight"], weights[f"{component}.proj.weight"] + delta)


def test_names_of_a_checkpoint_file_are_resolved_by_the_base() -> None:
    name, layer = "joint_blocks.3.x_block.attn.qkv.weight", "transformer.transformer_blocks.3.attn.to_k"
    weight = numbers(3 * 1536, 1536, dtype=HALF)
    delta = LayerDelta((kron((1536, 1536), 4, 2),), (1536, 1536))
    after = apply_to_state_dict({name: weight}, Adapter({layer: delta}), base="sd3-medium", rounding=EXACT)[name]
    changed = (after != weight).any(1).nonzero().flatten()
    assert (int(changed.min()), int(changed.max())) == (1536, 3071)
    assert torch.equal(after[1536:3072], rounded(weight[1536:3072].double() + in_double(delta).dense(), HALF))


def test_adapters_may_be_files(tmp_path) -> None:
    before = {f"mid_block.attentions.0.{name}.weight": numbers(16, 16) for name in ("proj_in", "proj_out", "norm")}
    layers = [f"unet.mid_block.attentions.0.{name}" for name in ("proj_in", "proj_out")]
    adapter = Adapter({layer: LayerDelta((kron((16, 16), 4, 2),), (16, 16)) for layer in layers})
    write(adapter, tmp_path / "a.safetensors")
    from_file = apply_to_state_dict(before, tmp_path / "a.safetensors")
    direct = apply_to_state_dict(before, read(tmp_path / "a.safetensors"))
    assert all(torch.equal(from_file[n], direct[n]) for n in before)
    assert [n for n in before if from_file[n] is before[n]] == ["mid_block.attentions.0.norm.weight"]


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: sample["name"])
def test_every_reference_file_adds_the_delta_that_is_stored_beside_it(sample, base_weights) -> None:
    wanted = load_file(shared("golden", sample["delta"]))
    before = {f"{layer}.weight": torch.randn(delta.shape).double() for layer, delta in wanted.items()}
    before |= {name: weight.double() for name, weight in base_weights.items()}  # those that DoRA was measured on
    adapter = read(shared("golden", sample["adapter"]), base=shared("golden", "base"))
    after = apply_to_state_dict(before, [(adapter, -0.7)])
    assert {n for n in before if after[n] is not before[n]} == {f"{layer}.weight" for layer in wanted}
    for layer, delta in wanted.items():
        found = after[f"{layer}.weight"] - before[f"{layer}.weight"]
        assert (found / -0.7 - delta).abs().max() <= LIMITS[sample["reference"]] * delta.abs().max(), layer


def test_several_adapters_add_up_and_are_rounded_once() -> None:
    weight = numbers(16, 16, dtype=HALF)
    first, second = (LayerDelta((kron((16, 16), 4, 2),), (16, 16)) for _ in range(2))
    adapters = [(Adapter({"unet.x": first}), 0.5), (Adapter({"unet.x": second}), -1.5), (Adapter({"unet.x": first}), 0)]
    both = replace(first, sums=(first.sums[0].scaled(0.5), second.sums[0].scaled(-1.5)))
    after = apply_to_state_dict({"x.weight": weight}, adapters, rounding=EXACT)
    assert torch.equal(after["x.weight"], expected(weight, both))


def test_the_type_changes_only_where_asked_and_only_of_what_is_touched() -> None:
    weights = {"x.weight": numbers(8, 8, dtype=HALF), "y.weight": numbers(8, 8, dtype=HALF)}
    adapter = Adapter({"unet.x": LayerDelta((kron((8, 8), 2, 2),), (8, 8))})
    assert apply_to_state_dict(weights, adapter)["x.weight"].dtype == HALF
    wide = apply_to_state_dict(weights, adapter, out_dtype=torch.float32)
    assert wide["x.weight"].dtype == torch.float32 and wide["y.weight"] is weights["y.weight"]


def test_a_column_major_weight_is_merged_as_it_reads() -> None:
    weight = numbers(8, 12).mT
    delta = LayerDelta((kron((12, 8), 3, 2),), (12, 8))
    after = apply_to_state_dict({"x.weight": weight}, Adapter({"unet.x": delta}))["x.weight"]
    assert torch.allclose(after, weight + delta.dense())


# --- refusals --------------------------------------------------------------------------------------------------------


def adapter_of(*layers: str) -> Adapter:
    return Adapter({name: LayerDelta((kron((8, 8), 2, 2),), (8, 8)) for name in layers})


def test_layers_without_a_weight_are_named_and_allowed_only_on_request() -> None:
    weights = {"x.weight": numbers(8, 8)}
    adapter = adapter_of("unet.x", "unet.y")
    with pytest.raises(BaseMismatchError, match=r"1 of 2 layers .* missing: unet\.y\."):
        apply_to_state_dict(weights, adapter)
    after = apply_to_state_dict(weights, adapter, allow_missing=True)
    assert not torch.equal(after["x.weight"], weights["x.weight"])
    with pytest.raises(BaseMismatchError, match="0 of 1 layers"):
        apply_to_state_dict(weights, adapter_of("unet.z"), allow_missing=True)


def test_of_an_adapter_for_two_components_the_one_named_is_applied() -> None:
    weights = {"x.weight": numbers(8, 8)}
    adapter = adapter_of("unet.x", "text_encoder.y")
    after = apply_to_state_dict(weights, adapter, component="unet")["x.weight"]
    assert torch.allclose(after, weights["x.weight"] + adapter["unet.x"].dense())


def test_a_name_that_two_components_have_wants_the_component() -> None:
    weights = {"x.weight": numbers(8, 8)}
    adapter = adapter_of("text_encoder.x", "text_encoder_2.x")
    with pytest.raises(AmbiguousError, match=r"text_encoder\.x or text_encoder_2\.x"):
        apply_to_state_dict(weights, adapter)
    assert "x.weight" in apply_to_state_dict(weights, adapter, component="text_encoder_2")


def test_weights_of_another_size_are_refused_by_name() -> None:
    with pytest.raises(BaseMismatchError, match=r"x\.weight is 8x9"):
        apply_to_state_dict({"x.weight": numbers(8, 9)}, adapter_of("unet.x"))


def test_quantised_weights_are_refused() -> None:
    with pytest.raises(DtypeError, match=r"x\.weight is int8"):
        apply_to_state_dict({"x.weight": torch.zeros(8, 8, dtype=torch.int8)}, adapter_of("unet.x"))


def test_a_sum_of_ones_is_added_to_every_number() -> None:
    ones = LayerDelta((KronTerms(torch.ones(1, 1, 1), torch.ones(1, 8, 8)),), (8, 8))
    after = apply_to_state_dict({"x.weight": torch.zeros(8, 8)}, [(Adapter({"unet.x": ones}), 0.25)])
    assert torch.equal(after["x.weight"], torch.full((8, 8), 0.25))
