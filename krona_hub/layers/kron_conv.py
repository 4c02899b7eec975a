"""KronConv1d, KronConv2d, KronConv3d: convolutions with Kronecker adapters."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from krona_hub.errors import UnsupportedError
from krona_hub.layers.chain_step import Window
from krona_hub.layers.kron_layer import DEFAULT, KronLayer, core


class _KronConv(KronLayer):
    """y = base(x) + Σ scale · conv(x, ΔW), with the kernel flattened: ΔW is (out, in·k…).

    Where a2 divides the input channels, the kernel lives in B: a convolution by B of each of the a2 blocks of
    channels, then A mixes the blocks. Where it does not, and in a convolution with groups, ΔW is formed for a moment
    in each pass; `layer.branch(name).is_dense` says so.
    """

    KIND: ClassVar[type[nn.Module]]

    def __init__(
        self, conv: nn.Module, shape: tuple[int, int] | None = None, terms: int = 1, *, name: str = DEFAULT
    ) -> None:
        """See KronLayer; a1·b1 = out, a2·b2 = in·k…. Raises UnsupportedError for what is no such convolution."""
        if not isinstance(core(conv), self.KIND):
            raise UnsupportedError(
                f"{type(self).__name__} cannot adapt a {type(core(conv)).__name__}.",
                fix=f"Give a {self.KIND.__name__}.",
            )
        super().__init__(conv, _weight_shape(core(conv)), shape, terms, name=name)

    @property
    def _conv(self) -> Any:
        return core(self.base)

    @property
    def _pads_first(self) -> bool:
        """Whether the borders are not the zeros that a convolution adds by itself."""
        return isinstance(self._conv.padding, str) or self._conv.padding_mode != "zeros"

    @property
    def window(self) -> Window:
        conv = self._conv
        padding = (0,) * len(conv.kernel_size) if self._pads_first else conv.padding
        return Window(conv.kernel_size, conv.stride, padding, conv.dilation)

    @property
    def groups(self) -> int:
        groups: int = self._conv.groups
        return groups

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if x.dim() == len(self.weight_shape) - 1:  # a picture without a batch
            return super().forward(x[None], *args, **kwargs)[0]
        return super().forward(x, *args, **kwargs)

    def _added(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = self.base(x, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self._traced_sum(out, self._bordered(x))
        return self._sum(out, self._bordered(x), self._makes_new_output(self.KIND))

    def _bordered(self, x: Tensor) -> Tensor:
        if not self._pads_first:
            return x
        conv = self._conv
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return functional.pad(x, conv._reversed_padding_repeated_twice, mode)


def _weight_shape(conv: Any) -> tuple[int, ...]:
    return conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size


class KronConv1d(_KronConv):
    """A convolution over (N, in, length), as KronConv2d."""

    KIND = nn.Conv1d


class KronConv2d(_KronConv):
    """y = base(x) + scale · conv(x, ΔW) with x (N, in, height, width) and ΔW = Σₖ Aₖ ⊗ Bₖ flattened from dimension 1.

    >>> layer = KronConv2d(nn.Conv2d(8, 12, 3, padding=1), shape=(3, 2))
    >>> str(layer.branch("default").value.sums[0].shape), layer(torch.ones(1, 8, 5, 5)).shape
    ('3x2 ⊗ 4x36', torch.Size([1, 12, 5, 5]))
    """

    KIND = nn.Conv2d


class KronConv3d(_KronConv):
    """A convolution over (N, in, frames, height, width), as KronConv2d."""

    KIND = nn.Conv3d
