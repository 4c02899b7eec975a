"""Pairs of small checkpoints with a known difference."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import torch
from safetensors.torch import save_file

SIZES = {  # of a diffusers U-Net, under its own names
    "conv_in.weight": (64, 8, 3, 3),
    "mid_block.resnets.0.conv1.weight": (64, 32, 3, 3),
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight": (160, 160),
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (160, 384),
}
Delta = Callable[[int, int, torch.Generator], torch.Tensor]


def lora(rank: int) -> Delta:
    """Random factors; all its singular values are alike."""
    return lambda out, in_, g: torch.randn(out, rank, generator=g) @ torch.randn(rank, in_, generator=g)


def kron(a1: int, a2: int, terms: int = 1) -> Delta:
    """Terms of falling size."""

    def delta(out: int, in_: int, g: torch.Generator) -> torch.Tensor:
        size = (out // a1, in_ // a2)
        made = (torch.kron(torch.randn(a1, a2, generator=g), torch.randn(size, generator=g)) for _ in range(terms))
        return sum((0.7**i * term for i, term in enumerate(made)), torch.zeros(out, in_))

    return delta


def lokr(a1: int, a2: int, rank: int) -> Delta:
    """A ⊗ (up·down)"""
    return lambda out, in_, g: torch.kron(
        torch.randn(a1, a2, generator=g),
        torch.randn(out // a1, rank, generator=g) @ torch.randn(rank, in_ // a2, generator=g),
    )


def pair(folder, delta: Delta, dtype=torch.float16, *, base_dtype=None, share=0.03, seed=0, sizes=SIZES, more=()):
    """base.safetensors and tuned.safetensors: ‖ΔW‖ is `share` of ‖W‖. `more`: (name, base's, tuned's) besides."""
    generator = torch.Generator().manual_seed(seed)
    base, tuned, deltas = {}, {}, {}
    for name, size in sizes.items():
        weight = (0.02 * torch.randn(size, generator=generator)).to(base_dtype or dtype)
        made = delta(size[0], prod(size[1:]), generator).reshape(size)
        made = made * (share * weight.float().norm() / made.norm())
        base[name], tuned[name], deltas[name] = weight, (weight.float() + made).to(dtype), made
    for name, before, after in more:
        base[name], tuned[name] = before, after
    save_file(base, folder / "base.safetensors")
    save_file(tuned, folder / "tuned.safetensors")
    return base, tuned, deltas
