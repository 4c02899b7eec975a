"""torch.compile sees plain products: one graph, compiled once for all batches, lengths, strengths and numbers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.kron.terms import KronTerms, LowRank
from krona_hub.layers import KronConv2d, KronLinear

A, B = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)


def delta(generator: torch.Generator, form: str, size=(24, 32)) -> LayerDelta:
    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    sums = {
        "tall": lambda: KronTerms(numbers(2, 8, 2), numbers(2, 3, 16)),
        "shuffled": lambda: KronTerms(numbers(1, 4, 4), numbers(1, 6, 8), "shuffled"),
        "LoRA": lambda: KronTerms(torch.ones(1, 1, 1), LowRank(numbers(1, 24, 3), numbers(1, 3, 32))),
        "low-rank B": lambda: KronTerms(numbers(2, 4, 4), LowRank(numbers(2, 6, 2), numbers(2, 2, 8))),
    }[form]()
    magnitude = numbers(24).abs() if form == "tall" else None
    return LayerDelta((sums,), size, magnitude)


FORMS = ("tall", "shuffled", "LoRA", "low-rank B")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_one_graph_serves_every_batch_length_strength_and_swap(form, trainable):
    layer, counter = KronLinear(nn.Linear(32, 24)), CompileCounter()
    layer.add("x", delta(A, form), trainable=trainable)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for batch, length, strength in ((2, 7, 1.0), (3, 7, 0.5), (2, 9, 0.0), (5, 64, -1.5)):
        layer.branch("x").set_scale(strength)
        x = torch.randn(batch, length, 32)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    layer.branch("x").take(delta(B, form), layer.readable_weight)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


def test_marked_dimensions_compile_once():
    layer, counter = KronLinear(nn.Linear(32, 24).requires_grad_(False), shape=(8, 2)), CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for batch, length in ((2, 7), (3, 11), (6, 5)):
        x = torch.randn(batch, length, 32, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        compiled(x).sum().backward()
    assert counter.frame_count == 1


@pytest.mark.parametrize("shape", [(4, 4), (8, 2)])
def test_a_convolution_compiles_once(shape):
    layer, counter = KronConv2d(nn.Conv2d(8, 16, 3, padding=1), shape=shape), CompileCounter()
    nn.init.normal_(next(layer.branch("default").kron_sums).factors[1])
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for batch, height, width in ((2, 6, 7), (3, 6, 7), (3, 9, 8)):
        x = torch.randn(batch, 8, height, width)
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1


@pytest.mark.parametrize("form", FORMS)
def test_compiled_gradients_are_the_eager_ones(form):
    layer = KronLinear(nn.Linear(32, 24).requires_grad_(False))
    layer.add("x", delta(A, form), trainable=True)
    factors = list(layer.branches.parameters())
    x = torch.randn(3, 5, 32, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(layer(x).sin().sum(), (x, *factors))
    theirs = torch.autograd.grad(compiled(x).sin().sum(), (x, *factors))
    for eager, traced in zip(ours, theirs, strict=True):
        torch.testing.assert_close(eager, traced, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_inductor_compiles_a_layer():
    layer = KronLinear(nn.Linear(32, 24).requires_grad_(False), shape=(8, 2))
    nn.init.normal_(next(layer.branch("default").kron_sums).factors[1])
    x = torch.randn(3, 5, 32)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=1e-4, atol=1e-4)
