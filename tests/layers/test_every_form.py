"""A layer computes base output + scale · ΔW x, and the gradients of that, for every form a delta can have."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.layers import KronConv2d, KronLinear
from tests.merging.cases import FORMS

SCALE = 0.7
SIZE = (24, 48)


def linear_case(form: str):
    """A layer, its input, and a function of input and ΔW that says what it should compute."""
    base = nn.Linear(SIZE[1], SIZE[0])
    delta = LayerDelta(FORMS[form](SIZE), SIZE)
    return KronLinear(base), delta, torch.randn(3, 5, SIZE[1]), lambda x, w: base(x) + SCALE * F.linear(x, w)


def conv_case(form: str):
    base = nn.Conv2d(SIZE[1] // 4, SIZE[0], 2, stride=2, padding=1)
    delta = LayerDelta(FORMS[form](SIZE), (SIZE[0], SIZE[1] // 4, 2, 2))
    sizes = base.stride, base.padding
    return (
        KronConv2d(base),
        delta,
        torch.randn(2, 12, 7, 8),
        lambda x, w: base(x) + SCALE * F.conv2d(x, w, None, *sizes),
    )


CASES = {"linear": linear_case, "conv": conv_case}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", CASES)
def test_a_layer_computes_its_base_and_the_delta(kind, form):
    torch.manual_seed(0)
    layer, delta, x, wanted = CASES[kind](form)
    layer.add("x", delta, scale=SCALE)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted(x, delta.dense()), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", CASES)
def test_gradients_of_factors_and_input_are_those_of_the_dense_delta(kind, form):
    torch.manual_seed(0)
    layer, delta, x, wanted = CASES[kind](form)
    layer.add("x", delta, scale=SCALE, trainable=True)
    layer.double()
    x = x.double().requires_grad_()
    factors = [p for p in layer.branches.parameters() if p.requires_grad]
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *factors), fast_mode=True)
    w = layer.branch("x").value.dense()
    ours = torch.autograd.grad(layer(x).sin().sum(), x)[0]
    theirs = torch.autograd.grad(wanted(x, w.double()).sin().sum(), x)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
