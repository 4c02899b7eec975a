"""Mixed precision: autocast of the forward pass, and gradient scaling for float16."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class MixedPrecision:
    """Autocast to `mode` ("no", "bf16" or "fp16"). With fp16, gradients are scaled up so that they do not underflow."""

    def __init__(self, mode: str, device: torch.device) -> None:
        self.device, self.dtype = device, TYPES.get(mode)
        self.scaler = torch.amp.GradScaler(device.type) if mode == "fp16" else None

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context of a forward pass."""
        return torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Backpropagate the loss, scaled for fp16."""
        torch.autograd.backward(loss if self.scaler is None else self.scaler.scale(loss))

    def unscale(self, optimizer: Optimizer) -> None:
        """Divide the gradients by the scale, before they are inspected."""
        if self.scaler is not None:
            self.scaler.unscale_(optimizer)

    def step(self, optimizer: Optimizer, *, finite: bool) -> None:
        """Step the optimizer if the gradients are finite. Otherwise, reduce the scale, which is too large."""
        if self.scaler is None:
            if finite:
                optimizer.step()
            return
        if finite:
            self.scaler.step(optimizer)
        self.scaler.update()

    @property
    def expects_overflow(self) -> bool:
        """Whether NaN or infinite gradients are part of the search for a scale and not a reason to stop."""
        return self.scaler is not None

    @property
    def state(self) -> dict[str, Any]:
        """State for a checkpoint."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def restore(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        if self.scaler is not None and state:
            self.scaler.load_state_dict(state)
