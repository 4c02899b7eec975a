"""One step of a chain: a multiplication from the left or the right, and its derivatives.

The state is (N, p·k·q, …): channels first, then the positions of an image if the layer is a convolution. Every
step is a product with one matrix W, in which the matrices of the terms are arranged so that the sum over terms
happens inside the product.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from krona_hub.layers.chain import ChainStep

# (side, role) -> order of the axes (term, row, column) of a factor in W; rows of W first
AXES: Mapping[tuple[str, str], tuple[int, int, int]] = {
    ("right", "open"): (0, 1, 2),  # rows (term, row), columns (column)
    ("right", "close"): (1, 0, 2),  # rows (row), columns (term, column)
    ("left", "open"): (1, 0, 2),  # rows (row, term), columns (column)
    ("left", "close"): (1, 2, 0),  # rows (row), columns (column, term)
}
DIAGONAL: Mapping[str, tuple[int, int, int, int]] = {  # for middle steps, where the terms stay separate
    "right": (2, 0, 3, 1),  # of (row, column, term, term): rows (term, row), columns (term, column)
    "left": (0, 2, 1, 3),  # rows (row, term), columns (column, term)
}


@dataclass(frozen=True)
class Window:
    """Kernel size, stride, padding and dilation of a convolution."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]

    @property
    def point(self) -> Window:
        """A 1×1 convolution, for the steps without the kernel."""
        one = (1,) * len(self.kernel)
        return Window(one, one, (0,) * len(one), one)


def arrange(factor: Tensor, step: ChainStep) -> Tensor:
    """Arrange a factor (terms, rows, columns) as the matrix W of a step."""
    terms, rows, columns = factor.shape
    if terms == 1:
        return factor[0]
    if step.role == "middle":
        spread = torch.diag_embed(factor.permute(1, 2, 0)).permute(DIAGONAL[step.side])
        return spread.reshape(terms * rows, terms * columns)
    width = columns if step.role == "open" else terms * columns
    return factor.permute(AXES[step.side, step.role]).reshape(-1, width)


def gather(w: Tensor, step: ChainStep, shape: torch.Size) -> Tensor:
    """The adjoint of `arrange`: convert the derivative of W to that of the factor, (terms, rows, columns)."""
    terms, rows, columns = shape
    if terms == 1:
        return w[None]
    if step.role == "middle":
        sizes = {"right": (terms, rows, terms, columns), "left": (rows, terms, columns, terms)}[step.side]
        back = _inverse(DIAGONAL[step.side])
        return w.reshape(sizes).permute(back).diagonal(dim1=2, dim2=3).permute(2, 0, 1)
    axes = AXES[step.side, step.role]
    return w.reshape([shape[axis] for axis in axes]).permute(_inverse(axes))


def _inverse(axes: tuple[int, ...]) -> list[int]:
    return [axes.index(i) for i in range(len(axes))]


def forward(z: Tensor, w: Tensor, step: ChainStep, window: Window | None) -> Tensor:
    """Apply W to the state."""
    n, positions = len(z), z.shape[2:]
    if step.side == "left":
        return left_product(w, z.reshape(n, w.shape[1], -1)).reshape(n, -1, *positions)
    if window is None:
        return right_product(z.reshape(n * step.p, -1), w).reshape(n, -1)
    window = window if step.kernel else window.point
    image = z.reshape(n * step.p, step.k * step.q, *positions)
    out = convolve(image, w.reshape(len(w), -1, *window.kernel), window)
    return out.reshape(n, -1, *out.shape[2:])


def left_product(w: Tensor, z: Tensor) -> Tensor:
    """W Z for every one of the N matrices Z: (rows, columns), (N, columns, q) → (N, rows, q)."""
    if z.shape[-1] == 1:
        return (z.squeeze(-1) @ w.mT).unsqueeze(-1)
    return torch.bmm(w.expand(len(z), *w.shape), z)


def right_product(z: Tensor, w: Tensor) -> Tensor:
    """Z Wᵀ: (N, columns), (rows, columns) → (N, rows)."""
    return z @ w.mT


def to_factor(g: Tensor, z: Tensor, w: Tensor, step: ChainStep, window: Window | None) -> Tensor:
    """Return the derivative of W, from the state before the step and the derivative of the state after it."""
    if step.side == "left":
        outer, matrices = g.reshape(len(z), len(w), -1), z.reshape(len(z), w.shape[1], -1)
        if outer.shape[-1] == 1:
            return outer.squeeze(-1).mT @ matrices.squeeze(-1)
        return torch.bmm(outer, matrices.mT).sum(0)
    if window is None:
        return g.reshape(-1, len(w)).mT @ z.reshape(-1, w.shape[1])
    return _convolution_backward(g, z, w, step, window, of_input=False).reshape(w.shape)


def to_input(g: Tensor, shape: torch.Size, w: Tensor, step: ChainStep, window: Window | None) -> Tensor:
    """Return the derivative of the state before the step, of this shape, from that of the state after it."""
    if step.side == "left":
        return left_product(w.mT, g.reshape(shape[0], len(w), -1)).reshape(shape)
    if window is None:
        return right_product(g.reshape(-1, len(w)), w.mT).reshape(shape)
    state = g.new_empty(1).expand(shape)  # only its shape is used
    return _convolution_backward(g, state, w, step, window, of_input=True).reshape(shape)


def _convolution_backward(g: Tensor, z: Tensor, w: Tensor, step: ChainStep, window: Window, of_input: bool) -> Tensor:
    window = window if step.kernel else window.point
    image = z.reshape(len(z) * step.p, step.k * step.q, *z.shape[2:])
    outer = g.reshape(len(image), len(w), *g.shape[2:])
    kernel, zeros = w.reshape(len(w), -1, *window.kernel), [0] * len(window.kernel)
    derivatives = torch.ops.aten.convolution_backward(
        outer, image, kernel, None, window.stride, window.padding, window.dilation, False, zeros, 1,
        [of_input, not of_input, False],
    )  # fmt: skip
    derivative: Tensor = derivatives[0 if of_input else 1]
    return derivative


def convolve(image: Tensor, kernel: Tensor, window: Window | None, groups: int = 1) -> Tensor:
    """Convolve in one, two or three dimensions, without bias; without a window, multiply by the matrix."""
    if window is None:
        return image @ kernel.mT
    conv = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}[len(window.kernel)]
    return conv(image, kernel, None, window.stride, window.padding, window.dilation, groups)
