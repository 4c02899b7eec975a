"""An adapter is a mapping of its layers, under canonical names or those with `text_model.`."""

from collections.abc import Mapping

import pytest
import torch

from krona_hub import Adapter
from krona_hub.errors import NotFoundError
from tests import tiny
from tests.formats import made

ADAPTER = made.lora(tiny.layers(tiny.sd15(), "to_q", "fc1"))
FC1 = "text_encoder.encoder.layers.0.mlp.fc1"


def test_it_is_a_mapping_of_its_layers():
    assert isinstance(ADAPTER, Mapping)
    assert list(ADAPTER) == list(ADAPTER.keys()) == list(ADAPTER.layers)
    assert list(ADAPTER.values()) == list(ADAPTER.layers.values())
    assert dict(ADAPTER.items()) == dict(ADAPTER) == dict(ADAPTER.layers)
    assert len(ADAPTER) == len(ADAPTER.layers) > 0


def test_membership_and_lookup_know_both_names_of_a_text_encoder():
    longer = FC1.replace("encoder.layers", "text_model.encoder.layers")
    assert FC1 in ADAPTER and longer in ADAPTER and "unet.nothing" not in ADAPTER and 3 not in ADAPTER
    assert ADAPTER[FC1] is ADAPTER[longer] is ADAPTER.get(longer)
    assert ADAPTER.get("unet.nothing") is None and ADAPTER.get("unet.nothing", 7) == 7


def test_a_layer_that_is_missing_names_the_nearest():
    with pytest.raises(NotFoundError, match="fc1"):
        ADAPTER[FC1 + "x"]


def test_an_empty_adapter_is_false_and_equality_is_identity():
    empty = Adapter({})
    assert not empty and ADAPTER
    assert empty == empty and empty != Adapter({})
    assert len({ADAPTER, ADAPTER, empty}) == 2  # hashable, as a value that is frozen should be


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_map_changes_every_stored_tensor_and_nothing_else(dtype):
    delta = made.as_dora(made.only(ADAPTER, "unet"), lambda name: torch.ones(ADAPTER[name].weight_shape))
    for name, before in delta.items():
        after = before.map(lambda tensor: tensor.to(dtype))
        assert {t.dtype for t in after.tensors} == {dtype} and len(after.tensors) == len(before.tensors)
        assert (after.weight_shape, after.magnitude_axis) == (before.weight_shape, before.magnitude_axis), name
