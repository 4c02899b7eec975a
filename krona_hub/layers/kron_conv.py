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

    If a2 divides the input channels, the kernel is in B: each of the a2 blocks of channels is convolved with B, then A
    mixes the blocks. Otherwise, and in a convolution with groups, ΔW is formed in each pass, and
    `layer.branch(name).is_dense` is True.
    """

    KIND: ClassVar[type[nn.Module]]

    def __init__(
        self, conv: nn.Module, shape: tuple[int, int] | None = None, terms: int = 1, *, name: str = DEFAULT
    ) -> None:
        """See KronLayer; a1·b1 = out, a2·b2 = in·k…. Raises UnsupportedError for any other kind of layer."""
        if not isinstance(core(conv), self.KIND):
            raise UnsupportedError(
                f"{type(self).__name__} cannot adapt a {type(core(conv)).__name__}.",
                fix=f"Use it with a {self.KIND.__name__}.",
            )
        super().__init__(conv, _weight_shape(core(conv)), shape, terms, name=name)

    @property
    def _conv(self) -> Any:
        return core(self.base)

    @property
    def _pads_first(self) -> bool:
        """Whether to pad before the convolution, which by itself pads only with given numbers of zeros."""
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
        if x.dim() == len(self.weight_shape) - 1:  # an image without a batch axis
            return super().forward(x[None], *args, **kwargs)[0]
        return super().forward(x, *args, **kwargs)

    def _added(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        out = self.base(x, *args, **kwargs)
        if torch.compiler.is_compiling():
            return self._traced_sum(out, self._padded(x))
        return self._sum(out, self._padded(x), self._makes_new_output(self.KIND))

    def _padded(self, x: Tensor) -> Tensor:
        if not self._pads_first:
            return x
        conv = self._conv
        mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
        return functional.pad(x, conv._reversed_padding_repeated_twice, mode)


def _weight_shape(conv: Any) -> tuple[int, ...]:
    return conv.out_channels, conv.in_channels // conv.groups, *conv.kernel_size


class KronConv1d(_KronConv):
    """A convolution over (N, in, length); see KronConv2d."""

    KIND = nn.Conv1d


class KronConv2d(_KronConv):
    """Convolution with Kronecker adapters: y = base(x) + Σ scale · conv(x, ΔW), with x (N, in, height, width).

    ΔW = Σₖ Aₖ ⊗ Bₖ is the kernel flattened from dimension 1, (out, in/groups·kh·kw). Factors start as in
    DiffuseKronA (arXiv:2402.17412): A ~ N(0, 1/a1²), B = 0, so that the layer starts equal to its base.

    Parameters
    ----------
    conv : nn.Conv2d; left unfrozen
    shape : size (a1, a2) of A, to add trainable factors; a1 divides out, a2 divides in/groups·kh·kw (default: none)
    terms : number of terms of ΔW (default: 1)
    name : name of the adapter (default: "default")

    Raises
    ------
    ShapeError
        `shape` does not divide the weight, or fewer terms are already exact.
    UnsupportedError
        `conv` is not an nn.Conv2d.

    Examples
    --------
    >>> layer = KronConv2d(nn.Conv2d(8, 12, 3, padding=1), shape=(3, 2))
    >>> str(layer.branch("default").value.sums[0].shape), layer(torch.ones(1, 8, 5, 5)).shape
    ('3x2 ⊗ 4x36', torch.Size([1, 12, 5, 5]))
    """

    KIND = nn.Conv2d


class KronConv3d(_KronConv):
    """A convolution over (N, in, frames, height, width); see KronConv2d."""

    KIND = nn.Conv3d
