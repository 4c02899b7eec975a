"""The rules of who holds what, against the libraries that make them."""

import itertools
import logging

import pytest
import torch

from krona_hub.formats.compatibility.applications import APPLICATIONS, application_named
from krona_hub.formats.compatibility.factorizations import loads_form
from krona_hub.formats.compatibility.format_limits import common_peft_factor, lycoris_resumes, refusal
from krona_hub.formats.forms.delta_form import (
    ChannelSplit,
    LayerFactorization,
    SumFactorization,
    channel_split,
    is_factored,
)
from krona_hub.kron.shapes import KronShape, choices, divisors

SIZES = [(32, 24), (24, 64), (36, 36), (40, 7)]


def lycoris_loads(size, kernel, split, rank):
    """Whether LyCORIS builds a module from tensors of this split and gets the same tensors back."""
    from lycoris.modules.lokr import LokrModule

    (a1, b1), (a2, channels) = split
    layer = torch.nn.Linear(size[1], size[0]) if kernel == 1 else torch.nn.Conv2d(size[1], size[0], kernel)
    w2 = w2a = w2b = None
    if rank is None:
        w2 = torch.ones((b1, channels) if kernel == 1 else (b1, channels, kernel, kernel))
    else:
        w2a, w2b = torch.ones(b1, rank), torch.ones(rank, channels * kernel * kernel)
    logging.disable(logging.CRITICAL)
    try:
        with torch.no_grad():
            module = LokrModule.make_module_from_state_dict(
                "m", layer, torch.ones(a1, a2), None, None, w2, w2a, w2b, None, None, torch.tensor(1.0), None
            )
        module.get_weight(module.shape)
    except (RuntimeError, AttributeError):
        return False
    finally:
        logging.disable(logging.NOTSET)
    return True


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("rank", [None, 1, 2])
def test_lycoris_resumes_exactly_the_splits_that_the_rule_says(kernel, rank):
    for size in SIZES:
        for a1, a2 in itertools.product(divisors(size[0]), divisors(size[1])):
            split = ChannelSplit((a1, size[0] // a1), (a2, size[1] // a2))
            if rank is not None and not is_factored(rank, (split.out[1], split.in_[1])):
                continue  # such a product is stored dense
            seen = kernel * kernel if rank is not None else 1
            assert lycoris_resumes(split, seen) == lycoris_loads(size, kernel, split, rank), (size, split)


def peft_split(size, factor):
    """The split that PEFT itself makes of a linear layer."""
    from peft import LoKrConfig, inject_adapter_in_model

    model = torch.nn.Sequential(torch.nn.Linear(size[1], size[0]))
    inject_adapter_in_model(LoKrConfig(r=64, decompose_factor=factor, target_modules=["0"]), model)
    w1, w2 = model[0].lokr_w1["default"], model[0].lokr_w2["default"]
    return ChannelSplit((w1.shape[0], w2.shape[0]), (w1.shape[1], w2.shape[1]))


@pytest.mark.parametrize("factor", [-1, 1, 2, 4, 5, 8, 16])
def test_the_factor_found_for_peft_gives_the_splits_of_all_layers(factor):
    splits = [peft_split(size, factor) for size in SIZES]
    found = common_peft_factor(splits)
    assert found is not None
    assert [peft_split(size, found) for size in SIZES] == splits


def test_no_factor_is_found_where_peft_has_none():
    size = (32, 24)
    reachable = {peft_split(size, factor) for factor in (-1, *range(1, 40))}
    for shape in choices(*size):
        split = ChannelSplit((shape.a1, shape.b1), (shape.a2, shape.b2))
        assert (common_peft_factor([split]) is not None) == (split in reachable), shape


def test_two_layers_may_each_fit_peft_and_not_together():
    four, eight = peft_split((64, 64), 4), peft_split((64, 64), 8)
    assert common_peft_factor([four]) and common_peft_factor([eight])
    assert common_peft_factor([four, eight]) is None


def test_a_lora_in_columns_and_rows_is_a_lora_and_shuffling_single_rows_moves_nothing():
    columns = SumFactorization(KronShape(8, 1, 1, 6), terms=3, rows="shuffled")
    assert columns.lora_rank == 3 and columns.plain
    form = LayerFactorization((8, 6), (columns, SumFactorization(KronShape(1, 1, 8, 6), right_rank=2)))
    assert form.lora_rank == 5
    assert channel_split(form) == ChannelSplit((1, 8), (1, 6))


def test_shuffled_rows_fit_no_format_but_their_own_and_the_native_one():
    form = LayerFactorization(
        (8, 6), (SumFactorization(KronShape(2, 2, 4, 3), rows="shuffled"),), layer="unet.x.attn1.to_q"
    )
    fits = {name for name in ("krona", "diffusekrona", "lycoris-lokr", "peft-lokr") if not refusal(form, name)}
    assert fits == {"krona", "diffusekrona"}


def test_kernels_that_a_reaches_into_are_for_shape_driven_readers_only():
    conv, shape = (320, 320, 3, 3), KronShape(5, 720, 64, 4)
    assert loads_form("lycoris-lokr", conv, shape) and loads_form("comfyui", conv, shape)
    assert not loads_form("peft", conv, shape) and not loads_form("diffusers-lokr", conv, shape)


@pytest.mark.parametrize("tool", APPLICATIONS)
def test_every_tool_loads_a_plain_lora_and_only_lora_tools_refuse_a_lokr(tool):
    assert loads_form(tool, (64, 48), KronShape(1, 1, 64, 48), right_rank=4)
    lokr = loads_form(tool, (64, 48), KronShape(4, 4, 16, 12), right_rank=2)
    assert lokr == (APPLICATIONS[tool].lokr is not None)


def test_an_unknown_tool_is_met_with_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'comfyui'"):
        application_named("comfyuii")
