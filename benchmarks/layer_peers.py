"""Trainable adapters of one linear layer, by this project and its peers; shared by the layer benchmarks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from krona_hub import KronLinear

DENSE = 100_000  # a rank high enough that PEFT and LyCORIS use a full w2
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")


def krona(layer: nn.Linear, shape: tuple[int, int]) -> nn.Module:
    return KronLinear(layer, shape=shape)


def peft(layer: nn.Linear, config: Any) -> nn.Module:
    from peft import inject_adapter_in_model

    holder = nn.ModuleDict({"layer": layer})
    inject_adapter_in_model(config, holder)
    return holder["layer"]


def peft_lokr(layer: nn.Linear) -> nn.Module:
    from peft import LoKrConfig

    return peft(layer, LoKrConfig(r=DENSE, alpha=DENSE, decompose_factor=8, target_modules=["layer"]))


def peft_lora(layer: nn.Linear) -> nn.Module:
    from peft import LoraConfig

    return peft(layer, LoraConfig(r=4, target_modules=["layer"]))


class Lycoris(nn.Module):
    """A layer together with its LyCORIS module, which replaces the forward of the layer."""

    def __init__(self, layer: nn.Linear, bypass: bool) -> None:
        from lycoris.modules.lokr import LokrModule

        logging.disable(logging.WARNING)
        super().__init__()
        self.layer = layer
        self.kron = LokrModule("layer", layer, 1.0, lora_dim=DENSE, alpha=1, factor=8, bypass_mode=bypass)
        self.kron.apply_to()

    def forward(self, x):
        return self.layer(x)


VARIANTS: Mapping[str, Callable[[nn.Linear], nn.Module]] = {
    "base": lambda layer: layer,
    "krona 64x4": lambda layer: krona(layer, (64, 4)),
    "krona 8x8": lambda layer: krona(layer, (8, 8)),
    "peft lokr": peft_lokr,
    "peft lora r=4": peft_lora,
    "lycoris bypass": lambda layer: Lycoris(layer, bypass=True),
    "lycoris rebuild": lambda layer: Lycoris(layer, bypass=False),
}
SAME_SHAPE = ("krona 8x8", "peft lokr", "lycoris bypass", "lycoris rebuild")


def build(variant: str, out: int, in_: int) -> nn.Module:
    """Return a frozen linear layer with the trainable factors of a variant."""
    return VARIANTS[variant](nn.Linear(in_, out).requires_grad_(False))


def trainable(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters() if p.requires_grad)


def check_equal_parameters(out: int, in_: int) -> int:
    """Return the parameter count, which must be equal for all variants of SAME_SHAPE."""
    (count,) = {trainable(build(variant, out, in_)) for variant in SAME_SHAPE}
    return count


def targets(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in list(model.named_modules()):
        if name.endswith(ATTENTION) and isinstance(module, nn.Linear):
            yield name, module


def adapt(model: nn.Module, variant: str) -> None:
    """Add trainable adapters of a variant to every attention of a diffusers model."""
    for name, module in targets(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, VARIANTS[variant](module))
