"""Benchmark converting Kronecker 16x16 to LoRA of rank 16 on the 560 attention layers of SDXL, against PEFT.

`peft.convert_to_lora` is timed on a few LoKr layers of each size, scaled by the number of layers; its singular values
are compared with ours. Both run on one core, so that the ratio is valid on a busy machine, too.
"""

from __future__ import annotations

from functools import partial

import peft
import torch
from common import SDXL_LAYERS, report, timed
from peft.tuners.lora.conversion import convert_to_lora
from torch import nn

from krona_hub.kron.terms import KronTerms
from krona_hub.kron.to_lora import nearest_loras

FACTOR, RANK, SAMPLE = 16, 16, 2


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    ours, theirs, worst = 0.0, 0.0, 0.0
    for (out, in_), count in SDXL_LAYERS.items():
        layers = [random_layer(out, in_, generator) for _ in range(count)]
        model = peft_model([layer[0] for layer in layers[:SAMPLE]])
        converted: dict[str, torch.Tensor] = {}
        theirs += count / SAMPLE * timed(partial(convert_into, converted, model), repeat=2)
        ours += timed(lambda layers=layers: nearest_loras(layers, RANK), repeat=3)
        for i, fit in enumerate(nearest_loras(layers[:SAMPLE], RANK)):
            (name,) = [k for k in converted if f".{i}." in k and "lora_B" in k]
            sigma = converted[name].double().norm(dim=0)  # PEFT keeps σ in B
            worst = max(worst, float(((fit.singular_values - sigma) / sigma).abs().max()))
        print(f"{out}x{in_}: ours {ours:.3f} s, peft {theirs:.1f} s so far")
    figures = {"layers": sum(SDXL_LAYERS.values()), "ours_seconds": round(ours, 3), "peft_seconds": round(theirs, 1)}
    figures = {**figures, "ratio": round(theirs / ours, 1), "worst_relative_difference_of_singular_values": worst}
    report("to_lora", {**figures, "peft": peft.__version__})


def convert_into(converted: dict[str, torch.Tensor], model: nn.Module) -> None:
    converted.update(convert_to_lora(model, RANK)[1])


def random_layer(out: int, in_: int, generator: torch.Generator) -> list[KronTerms]:
    a = torch.randn(1, FACTOR, FACTOR, generator=generator)
    return [KronTerms(a, torch.randn(1, out // FACTOR, in_ // FACTOR, generator=generator))]


def peft_model(layers: list[KronTerms]) -> nn.Module:
    """Return a model of linear layers with these deltas as full LoKr factors."""
    full = layers[0].shape.full
    config = peft.LoKrConfig(r=10**4, alpha=10**4, decompose_factor=FACTOR, target_modules=["0", "1"])
    model = peft.get_peft_model(nn.Sequential(*(nn.Linear(full[1], full[0], bias=False) for _ in layers)), config)
    with torch.no_grad():
        for i, layer in enumerate(layers):
            module = model.base_model.model[i]
            module.lokr_w1["default"].copy_(layer.left[0])
            module.lokr_w2["default"].copy_(layer.right[0])
    return model


if __name__ == "__main__":
    main()
