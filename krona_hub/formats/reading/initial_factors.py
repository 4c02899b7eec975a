"""LoRAs whose first factors were subtracted from the base weights: PiSSA and OLoRA of PEFT (FORMATS §18)."""

from __future__ import annotations

import torch
from torch import Tensor

from krona_hub.bases.loading import Weights
from krona_hub.errors import BaseMismatchError, UnknownBaseError, UnsupportedError
from krona_hub.formats.parsing.peft_fields import PLAIN_LORA
from krona_hub.formats.reading.read_plan import ModulePlan
from krona_hub.kron.terms import KronTerms, LowRank, as_lora, dense_factor, wide


def without_initial_factors(terms: KronTerms, module: ModulePlan, weights: Weights | None) -> KronTerms:
    """Return s·(BA − B₀A₀) for the decoded s·BA of a module: a LoRA of twice the rank.

    B₀A₀ is computed from the base weight as PEFT computes it, in float32. Raises UnknownBaseError without base
    weights, UnsupportedError for anything but a LoRA of one linear layer.
    """
    place = module.places[0] if len(module.places) == 1 else None
    if place is None or not place.plain or module.layout.kind != "lora" or not isinstance(terms.right, LowRank):
        raise UnsupportedError(f"init_lora_weights {module.scale.initial} of a fused layer.", fix=PLAIN_LORA)
    weight = weights(place.layer) if weights else None
    if weight is None:
        raise UnknownBaseError(
            f"init_lora_weights is {module.scale.initial}: the delta depends on the base weights.",
            fix=f"Specify a base model with weights, with --base (a folder or a checkpoint file). Or: {PLAIN_LORA}",
        )
    if tuple(weight.shape) != terms.shape.full:
        raise BaseMismatchError(
            f"The delta is {terms.shape.full}, but the base weight is {tuple(weight.shape)}.",
            fix="Specify the base model the adapter was trained on with --base.",
        )
    up, down = wide(terms.right.up[0]) * dense_factor(terms.left)[0], wide(terms.right.down[0])
    first_up, first_down = first_factors(weight.to(up.device), len(down), module.scale.initial, module.scale.value)
    return as_lora(torch.cat([up, -first_up], 1), torch.cat([down, first_down]))


def first_factors(weight: Tensor, rank: int, kind: str, scale: float) -> tuple[Tensor, Tensor]:
    """Return (out, r) and (r, in) with the product s·B₀A₀ that was subtracted from the (out, in) weight.

    PiSSA (Meng et al., 2024): the r largest singular components. OLoRA (Büyükakyüz, 2024): s times the first r columns
    of Q and rows of R of the QR decomposition. Both in float32, as PEFT computes them: where singular values lie close
    together, the rounding of the machine that trained the adapter decides between them.

    >>> up, down = first_factors(torch.diag(torch.tensor([3.0, 2.0, 1.0])), 1, "pissa", 0.5)
    >>> (up @ down)[0, 0].round(decimals=4)
    tensor(3.)
    """
    matrix = wide(weight)
    if kind == "pissa":
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        root = s[:rank].sqrt()
        return u[:, :rank] * root, root[:, None] * vh[:rank]
    q, r = torch.linalg.qr(matrix)
    return scale * q[:, :rank], r[:rank]
