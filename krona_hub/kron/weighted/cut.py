"""The best low-rank cut of a product up·down under second moments of what enters and leaves its middle.

With ΔW = U·D, C = E[x xᵀ] of the inputs x of a layer and G = E[g gᵀ] of the gradients g at its output, the change of
the network's output caused by an error E of ΔW is, to first order and for independent x and g,

    loss(E) = tr(G E C Eᵀ) = ‖G^½ E C^½‖²

For an error U X D it depends only on two r×r matrices, M_d = D C Dᵀ and M_u = Uᵀ G U: the second moments of d = D x and
of Uᵀ g. With RᵀR = M, the best cut of rank k is U Rᵤ⁺ P_k S_k Q_kᵀ (R_d⁺)ᵀ D with P S Qᵀ = svd(Rᵤ R_dᵀ), and its loss
is the sum of the squares of the other singular values (Eckart & Young, 1936).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RANK_TOLERANCE = 1e-12  # eigenvalues of a moment below this share of the largest one count as zero


@dataclass(frozen=True, eq=False)
class WeightedCut:
    """All low-rank cuts of one product under its moments.

    Attributes
    ----------
    values : (r,) float64, decreasing
        Singular values S; a cut of rank k has loss Σ_{i>k} S_i².
    left, right : (r, r) float64
        The cut of rank k is `up @ left[:, :k] @ right[:k] @ down`.
    """

    values: Tensor
    left: Tensor
    right: Tensor

    @property
    def losses(self) -> Tensor:
        """Return (r + 1,): the loss of the cuts of rank 0 … r; the first is the loss of leaving the layer out."""
        rest = self.values.square().flip(0).cumsum(0).flip(0)
        return torch.cat([rest, rest.new_zeros(1)])

    def cut(self, up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """Return the best cut of rank `rank` of up (out, r) · down (r, in), as (out, rank) and (rank, in), float64."""
        root = self.values[:rank].sqrt()
        left, right = self.left[:, :rank] * root, root[:, None] * self.right[:rank]
        return up.double() @ left, right @ down.double()


def weighted_cut(inputs: Tensor, outputs: Tensor) -> WeightedCut:
    """Return the cuts of a product under the moments of its middle.

    Parameters
    ----------
    inputs : (r, r) Tensor
        D C Dᵀ, the second moment of d = D x; symmetric, positive semidefinite.
    outputs : (r, r) Tensor
        Uᵀ G U, the second moment of Uᵀ g.

    Returns
    -------
    WeightedCut : singular values and the matrices of the cuts

    Examples
    --------
    >>> cut = weighted_cut(torch.diag(torch.tensor([4.0, 1.0])), torch.eye(2))
    >>> cut.losses
    tensor([5., 1., 0.], dtype=torch.float64)
    >>> up, down = cut.cut(torch.eye(2), torch.eye(2), 1)
    >>> (up @ down).round(decimals=6).abs()
    tensor([[1., 0.],
            [0., 0.]], dtype=torch.float64)
    """
    root_in, inverse_in = _root(inputs)
    root_out, inverse_out = _root(outputs)
    p, s, q = torch.linalg.svd(root_out @ root_in.mT)
    return WeightedCut(s, inverse_out @ p, q @ inverse_in.mT)


def _root(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Return R with RᵀR = moment, and its pseudo-inverse, both (r, r) float64."""
    wide = moment.double()
    values, vectors = torch.linalg.eigh((wide + wide.mT) / 2)
    values = values.clamp(min=0)
    known = values > RANK_TOLERANCE * values.max()
    root = values.sqrt()
    inverse = torch.where(known, 1 / root.clamp(min=torch.finfo(torch.float64).tiny), 0.0)
    return root[:, None] * vectors.mT, vectors * inverse
