"""With the numbers of PEFT and of LyCORIS in it, a layer computes what theirs compute, and the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.kron.terms import KronTerms, as_lora
from krona_hub.layers import KronLinear

pytestmark = pytest.mark.slow
OUT, IN = 48, 96


def base() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(IN, OUT).requires_grad_(False)


def peft_layer(config):
    from peft import inject_adapter_in_model

    holder = nn.ModuleDict({"layer": base()})
    inject_adapter_in_model(config, holder)
    layer = holder["layer"]
    for parameter in layer.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    return layer


def peft_lokr():
    from peft import LoKrConfig

    layer = peft_layer(LoKrConfig(r=500, alpha=250, decompose_factor=4, target_modules=["layer"], init_weights=False))
    factors = [layer.lokr_w1["default"], layer.lokr_w2["default"]]
    return layer, factors, KronTerms(*(f.detach()[None] for f in factors)), layer.scaling["default"]


def peft_lora():
    from peft import LoraConfig

    layer = peft_layer(LoraConfig(r=4, lora_alpha=6, target_modules=["layer"]))
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return layer, factors, as_lora(factors[1].detach(), factors[0].detach()), layer.scaling["default"]


def lycoris():
    from lycoris.modules.lokr import LokrModule

    layer = base()
    module = LokrModule("layer", layer, 1.0, lora_dim=500, alpha=1, factor=4, bypass_mode=True)
    module.apply_to()
    layer.kept = [module]
    factors = [module.lokr_w1, module.lokr_w2]
    for factor in factors:
        nn.init.normal_(factor)
    return layer, factors, KronTerms(*(f.detach()[None] for f in factors)), 1.0


@pytest.mark.parametrize("peer", [peft_lokr, peft_lora, lycoris])
def test_outputs_and_gradients_are_those_of_the_peer(peer):
    theirs, factors, terms, scale = peer()
    ours = KronLinear(base())
    ours.add("x", LayerDelta((terms,), (OUT, IN)), scale=scale, trainable=True)
    x = torch.randn(3, 7, IN, requires_grad=True)
    g = torch.randn(3, 7, OUT)
    wanted, found = theirs(x), ours(x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    wanted = torch.autograd.grad(wanted, (x, *factors), g)
    found = torch.autograd.grad(found, (x, *ours.branches.parameters()), g)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.reshape(other.shape), other, rtol=1e-4, atol=1e-3)
