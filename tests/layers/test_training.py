"""What training asks of a layer: little kept for backward, the same gradients under checkpointing and autocast."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.kron.terms import KronTerms, LowRank
from krona_hub.layers import KronConv2d, KronLinear, kron_linear

# A small weight is formed, a large one never: what holds for one must hold for the other.
WAYS = {"formed": 2**17, "chain": 0}
SHAPES = {"square": (8, 8), "tall": (64, 4), "wide": (4, 64), "one row": (1, 16)}


@pytest.fixture(autouse=True, params=WAYS.values(), ids=WAYS)
def way(request, monkeypatch):
    monkeypatch.setattr(kron_linear, "SMALL", request.param)


def layer_of(shape, *, terms=1, rows="kron", size=(128, 192), dtype=torch.float64):
    """A linear layer with random factors to train, none of which is zero."""
    torch.manual_seed(0)
    a1, a2 = shape
    a, b = torch.randn(terms, a1, a2), torch.randn(terms, size[0] // a1, size[1] // a2)
    layer = KronLinear(nn.Linear(size[1], size[0]).requires_grad_(False))
    layer.add("x", LayerDelta((KronTerms(a, b, rows),), size), scale=0.5, trainable=True)
    return layer.to(dtype)


def gradients(layer, x, run=None):
    """Of x and of every factor, for a loss that is not linear in the output."""
    x = x.detach().requires_grad_()
    (run or layer)(x).float().sin().sum().backward()
    found = [x.grad, *(p.grad for p in layer.branches.parameters())]
    layer.zero_grad()
    return found


def dense_gradients(layer, x):
    """The slow way: ΔW is formed, and autograd does the rest."""
    (kron,) = layer.branch("x").kron_sums
    x = x.detach().requires_grad_()
    weight = layer.base.weight + 0.5 * kron.value.dense().to(x.dtype)
    nn.functional.linear(x, weight, layer.base.bias).float().sin().sum().backward()
    found = [x.grad, *(p.grad for p in layer.branches.parameters())]
    layer.zero_grad()
    return found


@pytest.mark.parametrize("rows", ["kron", "shuffled"])
@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_in_every_order_are_those_of_the_dense_delta(shape, terms, rows):
    layer = layer_of(shape, terms=terms, rows=rows)
    x = torch.randn(2, 7, 192, dtype=torch.float64)
    for ours, theirs in zip(gradients(layer, x), dense_gradients(layer, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)  # the dense sum is float32 in part


B, C = torch.randn(3, 16, 2), torch.randn(3, 2, 24)
FORMS = {
    "B low-rank": KronTerms(torch.randn(3, 8, 8), LowRank(B, C)),
    "both low-rank": KronTerms(LowRank(torch.randn(3, 8, 1), torch.randn(3, 1, 8)), LowRank(B, C), "shuffled"),
    "LoRA": KronTerms(torch.ones(1, 1, 1), LowRank(torch.randn(1, 128, 4), torch.randn(1, 4, 192))),
    "dense": KronTerms(torch.randn(1, 128, 192), torch.ones(1, 1, 1)),
}


@pytest.mark.parametrize("terms", FORMS.values(), ids=FORMS)
def test_gradients_of_every_form_are_those_of_the_dense_delta(terms):
    layer = KronLinear(nn.Linear(192, 128).requires_grad_(False))
    layer.add("x", LayerDelta((terms,), (128, 192)), scale=0.5, trainable=True)
    layer.double()
    x = torch.randn(2, 7, 192, dtype=torch.float64)
    for ours, theirs in zip(gradients(layer, x), dense_gradients(layer, x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_frozen_adapter_beside_the_trained_one_adds_its_part_and_gets_no_gradient():
    layer = layer_of((8, 8), terms=2, rows="shuffled")
    x = torch.randn(2, 7, 192, dtype=torch.float64)
    frozen = LayerDelta((KronTerms(torch.randn(1, 4, 4).double(), torch.randn(1, 32, 48).double()),), (128, 192))
    layer.base.weight += -0.7 * frozen.dense()
    wanted = gradients(layer, x)
    layer.base.weight += 0.7 * frozen.dense()
    layer.add("y", frozen, scale=-0.7)
    for ours, theirs in zip(gradients(layer, x), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_listens_to_the_base_hears_it_while_factors_are_trained():
    for register in ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"):
        layer, heard = layer_of((8, 8)), []
        getattr(layer.base, register)(lambda *_, heard=heard: heard.append(1))
        gradients(layer, torch.randn(2, 7, 192, dtype=torch.float64))
        assert heard


def test_a_base_that_is_trained_too_gets_its_gradients():
    layer, x = layer_of((8, 8)), torch.randn(5, 192, dtype=torch.float64)
    layer.base.requires_grad_()
    gradients(layer, x)
    layer.zero_grad()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.base.weight.grad, x.sum(0).expand(128, 192))


def test_both_ways_back_are_taken_by_some_shape():
    taken = {name: next(layer_of(s).branch("x").kron_sums).contraction.beside is None for name, s in SHAPES.items()}
    assert taken["tall"] and not taken["square"]


def test_no_gradient_is_made_for_an_input_that_needs_none():
    for shape in SHAPES.values():
        layer = layer_of(shape)
        x = torch.randn(5, 192, dtype=torch.float64)
        wanted = dense_gradients(layer, x)[1:]
        layer(x).float().sin().sum().backward()
        assert x.grad is None
        for parameter, theirs in zip(layer.branches.parameters(), wanted, strict=True):
            torch.testing.assert_close(parameter.grad, theirs, rtol=1e-5, atol=1e-5)


def kept_bytes(layer, x):
    """Bytes that autograd keeps for backward, besides those of x and of the frozen base."""
    known = {t.untyped_storage().data_ptr() for t in (x, *(p for p in layer.parameters() if not p.requires_grad))}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = (storage.nbytes(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = layer(x)
    assert out.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_kept_for_backward_besides_x_is_a_hundredth_of_x(dtype):
    layer = KronLinear(nn.Linear(1280, 1280).requires_grad_(False), shape=(64, 4)).to(dtype)
    x = torch.randn(1, 1024, 1280, dtype=dtype, requires_grad=True)
    assert 0 < kept_bytes(layer, x) <= 0.01 * x.nbytes


@pytest.mark.slow
def test_peft_keeps_the_whole_delta_for_backward():
    """So the measure above does see what is kept."""
    from peft import LoKrConfig, inject_adapter_in_model

    holder = nn.ModuleDict({"layer": nn.Linear(256, 256).requires_grad_(False)})
    inject_adapter_in_model(LoKrConfig(r=1000, alpha=1000, decompose_factor=8, target_modules=["layer"]), holder)
    x = torch.randn(1, 64, 256, requires_grad=True)
    assert kept_bytes(holder["layer"], x) >= 256 * 256 * 4


def test_q_k_and_v_share_the_input_that_is_kept(monkeypatch):
    monkeypatch.setattr(kron_linear, "SMALL", 0)
    layers = [KronLinear(nn.Linear(256, 256).requires_grad_(False), shape=(16, 4)) for _ in "qkv"]
    x = torch.randn(64, 256, requires_grad=True)
    assert sum(kept_bytes(layer, x) for layer in layers) < x.nbytes // 2


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(reentrant):
    layer, x = layer_of((8, 8)), torch.randn(2, 5, 192, dtype=torch.float64)
    again = gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    for plain, through in zip(gradients(layer, x), again, strict=True):
        assert torch.equal(plain, through)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_autocast_computes_in_bfloat16_and_keeps_gradients_in_float32(shape):
    layer, x = layer_of(shape, dtype=torch.float32), torch.randn(2, 5, 192)

    def under_autocast(x):
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        assert out.dtype == torch.bfloat16
        return out

    for ours, theirs in zip(gradients(layer, x, under_autocast), gradients(layer, x), strict=True):
        assert ours.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.98


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_bfloat16_layers_compute_what_float32_ones_do_within_rounding(shape):
    layer, x = layer_of(shape, dtype=torch.bfloat16), torch.randn(3, 192, dtype=torch.bfloat16)
    wide = layer_of(shape, dtype=torch.float32)
    with torch.no_grad():
        ours, theirs = layer(x).float(), wide(x.float())
    assert (ours - theirs).norm() < 0.02 * theirs.norm()


class OnlyCalled(nn.Module):
    """A linear layer that shows no weight, as quantised ones do not."""

    def __init__(self, inner):
        super().__init__()
        self.hidden = [inner]

    def forward(self, x):
        return self.hidden[0](x)


def test_a_base_that_is_only_called_is_adapted():
    inner = nn.Linear(192, 128)
    layer = KronLinear(OnlyCalled(inner), features=(128, 192))
    delta = LayerDelta((KronTerms(torch.randn(1, 8, 8), torch.randn(1, 16, 24)),), (128, 192))
    layer.add("x", delta)
    x = torch.randn(4, 192)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), inner(x) + x @ delta.dense().mT, rtol=1e-5, atol=1e-4)


def test_an_output_that_somebody_else_holds_is_not_written_into():
    layer, seen = layer_of((8, 8)), []
    layer.base.register_forward_hook(lambda module, inputs, out: seen.append((out, out.clone())))
    with torch.no_grad():
        layer(torch.randn(3, 192, dtype=torch.float64))
    assert torch.equal(*seen[0])


@pytest.mark.parametrize(("stride", "kernel"), [(1, 1), (2, 3), (1, 3)])
@pytest.mark.parametrize("shape", [(4, 4), (8, 2), (2, 8)])
def test_convolutions_of_every_order_have_the_gradients_of_their_kernel(shape, stride, kernel):
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, kernel, stride, padding=kernel // 2).requires_grad_(False)
    layer = KronConv2d(conv, shape=shape, terms=2 if kernel > 1 else 1)
    for parameter in layer.branches.parameters():
        nn.init.normal_(parameter)
    layer.double()
    x = torch.randn(2, 16, 6, 5, dtype=torch.float64, requires_grad=True)
    factors = list(layer.branches.parameters())
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *factors), fast_mode=True)
    wanted = conv(x) + nn.functional.conv2d(
        x, layer.branch("default").value.dense().double(), None, stride, kernel // 2
    )
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
