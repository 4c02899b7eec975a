"""How the forward pass rounds, and what keeps small gradients from vanishing in float16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class MixedPrecision:
    """Autocast to `mode` ("no", "bf16", "fp16"); with fp16, gradients are scaled up so that they do not become 0."""

    def __init__(self, mode: str, device: torch.device) -> None:
        self.device, self.dtype = device, TYPES.get(mode)
        self.scaler = torch.amp.GradScaler(device.type) if mode == "fp16" else None

    def autocast(self) -> AbstractContextManager[Any]:
        """Around a forward pass."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()

    def backward(self, loss: Tensor) -> None:
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))

    def unscale(self, optimizer: Optimizer) -> None:
        """Gradients to their true size, before they are looked at."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer, *, finite: bool) -> None:
        """A step of the optimizer, unless its gradients are no numbers; then the scale is too large, and shrinks."""
        if self.scaler is None:
            if finite:
                optimizer.step()
            return
        if finite:
            self.scaler.step(optimizer)
        self.scaler.update()

    @property
    def expects_overflow(self) -> bool:
        """Whether a gradient that is no number is part of the search for a scale, and no reason to stop."""
        return self.scaler is not None

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)
