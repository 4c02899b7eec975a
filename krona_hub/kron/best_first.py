"""Best-first search over the shapes of a LoRA layer: finds the best factorization while computing few.

Every shape of every layer has a lower bound of the value of its factorizations. The shape with the lowest bound is
refined by the next, more expensive step, until no bound is below the best factorization found:

    bounds    mode spectra and products of `bounds.py`, for all shapes at once
    moment    the fourth moment, for the remaining shapes
    probe     energy of K terms: exact, by a Gram matrix, or an upper bound, by a sketch; loss of the first B by rank
    exact     the factorizations themselves

Layers of one size are searched together; a shape that several of them need next is computed for all of them at once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from krona_hub.kron.bounds import SLACK, Bounds, largest_sums
from krona_hub.kron.candidates import (
    AT_ONCE,
    CANCELLED,
    ROUNDING,
    Factorization,
    FactorizationSpectrum,
    is_lora,
    most_right_rank,
    parameters_of,
    spectrum,
)
from krona_hub.kron.rearrangement import LoraSvd, Rearranged
from krona_hub.kron.shapes import KronShape, choices

K = TypeVar("K")
Allowed = Callable[[KronShape, int, int | None], bool]

BOUNDED, PROBED, CLOSED = range(3)
DENSE_PROBE = 192  # side of R up to which the probe is exact
FIRST = 4  # right factors whose ranks the probe examines
CERTAIN = 0.9  # fraction of the estimated loss of the first B that is certain: vectors of close values mix
OVERSAMPLING = 8  # columns of a sketch beyond the requested terms
PROMISING = 0.25  # fraction of the value to beat: shapes with a bound below it are computed before others are refined
HINTS = 3  # promising shapes per layer that are computed first
SEED = 1


@dataclass(frozen=True)
class Goal:
    """The objective: price · parameters + squared error, or the parameters within an error limit."""

    price: Tensor  # (n,), per parameter, for a layer of energy 1
    max_error: float | None  # None: the squared error is part of the objective

    def cost(self, left: Tensor) -> Tensor:
        """Return the contribution of a relative squared error to the objective."""
        if self.max_error is None:
            return left.clamp(min=0)
        return torch.where(left <= max(self.max_error, ROUNDING) ** 2 * (1 + 1e-12), 0.0, torch.inf)

    @property
    def tolerates_float32(self) -> bool:
        """Whether float32 bounds, with their slack, are still precise enough to rank shapes."""
        return self.max_error is None or self.max_error >= 0.02

    def take(self, layers: Tensor) -> Goal:
        return Goal(self.price[layers], self.max_error)


class BestFactorization(NamedTuple):
    value: float
    form: Factorization


class Probe(NamedTuple):
    """Bounds for one shape of one layer."""

    kept: Tensor  # (K,): upper bound of the energy of 1 … K terms
    lost: Tensor  # (f, ρ): lower bound of the loss by B of rank 1 … ρ in the first 1 … f terms
    done: int = 0  # terms up to which all factorizations have been computed


class Search:
    """Search for n layers of one size and of unit norm; `roof` (n,) is a value known to be attainable."""

    def __init__(self, lora: LoraSvd, goal: Goal, roof: Tensor, allowed: Allowed | None = None) -> None:
        self.lora, self.goal, self.best_value, self.allowed = lora, goal, roof.clone(), allowed
        self.rough = lora.to(torch.float32 if goal.tolerates_float32 else torch.float64)
        self.bounds = Bounds(self.rough)
        self.found: list[BestFactorization | None] = [None] * len(roof)
        self.points: list[list[Factorization]] = [
            [] for _ in roof
        ]  # all computed factorizations that no other one dominates
        self.shapes = [s for s in choices(*lora.size) if not is_lora(s, None)]
        self.lower = torch.full((len(roof), len(self.shapes)), torch.inf, dtype=torch.float64)
        self.stage = torch.zeros(self.lower.shape, dtype=torch.int8)
        self.probes: dict[tuple[int, int], Probe] = {}
        self._terms_allowed: dict[KronShape, Tensor] = {}

    def run(self) -> Search:
        everyone = torch.arange(len(self.found))
        for i, shape in enumerate(self.shapes):
            self.lower[:, i] = self._first_bound(shape, everyone)
        self._follow_hints(everyone)
        for i, shape in enumerate(self.shapes):
            layers = (self._open()[:, i] & (self.stage[:, i] == BOUNDED)).nonzero()[:, 0]
            if len(layers):
                self._raise(layers, i, self._moment_bound(shape, layers))
        while self._round():
            pass
        return self

    # ── bounds ───────────────────────────────────────────────────────────────────────────────────

    def _first_bound(self, shape: KronShape, layers: Tensor) -> Tensor:
        terms = self._most_terms(shape, layers)
        if not terms or bool(self._not_allowed(shape, terms).isinf().all()):
            return torch.full((len(layers),), torch.inf, dtype=torch.float64)
        kept = self.bounds.kept_by_terms(shape, terms, layers)
        return self._least(shape, layers, kept, None).min(1).values

    def _moment_bound(self, shape: KronShape, layers: Tensor) -> Tensor:
        kept = self.bounds.kept_by_moment(shape, self._most_terms(shape, layers), layers)
        return self._least(shape, layers, kept, None).min(1).values

    def _least(self, shape: KronShape, layers: Tensor, kept: Tensor, lost: Tensor | None) -> Tensor:
        """Lower bound of the value of 1 … K terms, (n, K), from `kept` (n, K) and `lost` (n, f, ρ)."""
        goal, terms = self.goal.take(layers), kept.shape[1]
        a, dense, thin = shape.a1 * shape.a2, shape.b1 * shape.b2, shape.b1 + shape.b2
        a = a if a > 1 else 0
        price, k = goal.price[:, None], torch.arange(1, terms + 1)
        total = int(max(terms, min(shape.b1, shape.b2) * terms))
        total = min(total, self._most_total_rank(thin, layers))
        left = self.bounds.left_by_ranks(shape, max(total, terms), layers)  # by total rank q = K·ρ
        by_terms, by_rank = goal.cost(1 - kept), goal.cost(left)
        with_dense = price * k * (a + dense) + torch.maximum(by_terms, self._at(by_rank, k * min(shape.b1, shape.b2)))
        if not most_right_rank(shape):
            return with_dense + self._not_allowed(shape, terms)
        q = torch.arange(1, by_rank.shape[1] + 1)
        from_q = (price * q * thin + by_rank).flip(1).cummin(1).values.flip(1)[:, :terms]
        with_thin = price * k * a + torch.maximum(price * k * thin + by_terms, from_q)
        if lost is not None and lost.shape[2]:
            with_thin = torch.maximum(with_thin, self._by_loss(goal, kept, lost, a, thin))
        return torch.minimum(with_dense, with_thin) + self._not_allowed(shape, terms)

    @staticmethod
    def _by_loss(goal: Goal, kept: Tensor, lost: Tensor, a: int, thin: int) -> Tensor:
        """Lower bound of the value over all ranks ρ of B, (n, K), from the loss of each rank."""
        k, rank = torch.arange(1, kept.shape[1] + 1)[:, None], torch.arange(1, lost.shape[2] + 1)
        size = goal.price[:, None, None] * k * (a + rank * thin)
        lost = lost[:, (k[:, 0] - 1).clamp(max=lost.shape[1] - 1)]
        return (size + goal.cost(1 - kept[..., None] + lost)).min(2).values

    @staticmethod
    def _at(by_rank: Tensor, q: Tensor) -> Tensor:
        """Index by_rank by total rank q; beyond its end there is no bound, so zero."""
        inside = q <= by_rank.shape[1]
        return torch.where(inside, by_rank[:, q.clamp(max=by_rank.shape[1]) - 1], 0.0)

    def _most_terms(self, shape: KronShape, layers: Tensor) -> int:
        """Number of terms beyond which every factorization of the shape is worse than the best known value."""
        a = shape.a1 * shape.a2
        right = min(shape.b1 * shape.b2, shape.b1 + shape.b2) if most_right_rank(shape) else shape.b1 * shape.b2
        per_term = right + (a if a > 1 else 0)
        affordable = (self.best_value[layers] / self.goal.price[layers]).max() / per_term * (1 + 1e-12)
        return min(int(affordable.clamp(max=1e9)), shape.max_terms)

    def _most_total_rank(self, thin: int, layers: Tensor) -> int:
        affordable = (self.best_value[layers] / self.goal.price[layers]).max() / thin
        return int(affordable.clamp(max=1e6)) + 1

    def _not_allowed(self, shape: KronShape, terms: int) -> Tensor:
        """Return (K,): infinite where no factorization with that many terms is allowed."""
        if self.allowed is None:
            return torch.zeros(terms, dtype=torch.float64)
        known = self._terms_allowed.get(shape)
        if known is None or len(known) < terms:
            ranks = [None, *range(1, most_right_rank(shape) + 1)]
            ok = [any(self.allowed(shape, k, rank) for rank in ranks) for k in range(1, terms + 1)]
            known = torch.where(torch.tensor(ok), 0.0, torch.inf).double()
            self._terms_allowed[shape] = known
        return known[:terms]

    # ── rounds ───────────────────────────────────────────────────────────────────────────────────

    def _open(self) -> Tensor:
        """Mask of shapes that may still give a better factorization, or one of equal size that comes first in order."""
        best = self.best_value[:, None]
        beaten = self.lower > best if self.goal.max_error is not None else self.lower >= best * (1 - 1e-9)
        return ~beaten & (self.stage != CLOSED) & self.lower.isfinite()

    def _follow_hints(self, layers: Tensor) -> None:
        """Compute the few shapes with the lowest bounds first, completely, if these bounds are promising.

        Layers with planted structure are found this way, and one good factorization rules out almost all other shapes.
        """
        for _ in range(HINTS):
            value, pick = torch.where(self._open(), self.lower, torch.inf).min(1)
            low = value.isfinite() & (value <= PROMISING * self.best_value)
            layers = layers[low[layers] & self._unsolved()[layers]]
            for i, members in _grouped(layers.tolist(), pick[layers].tolist()).items():
                following = torch.tensor(members)
                self._trust_bounds(following, i)
                while len(following):
                    self._compute(following, i)
                    low = self._open()[following, i] & (
                        self.lower[following, i] <= PROMISING * self.best_value[following]
                    )
                    following = following[low & self._unsolved()[following]]

    def _unsolved(self) -> Tensor:
        """Mask (n,) of the layers without a factorization so far."""
        return torch.tensor([found is None for found in self.found])

    def _round(self) -> bool:
        """Refine the most promising shape of every layer; return False when the search is complete."""
        value, pick = torch.where(self._open(), self.lower, torch.inf).min(1)
        wanted = value.isfinite().nonzero()[:, 0]
        stages = self.stage[wanted, pick[wanted]].tolist()
        for (i, stage), members in _grouped(wanted.tolist(), zip(pick[wanted].tolist(), stages, strict=True)).items():
            (self._probe if stage == BOUNDED else self._compute)(torch.tensor(members), i)
        return len(wanted) > 0

    def _trust_bounds(self, layers: Tensor, i: int) -> None:
        """Use the first bounds in place of a probe."""
        shape = self.shapes[i]
        kept = self.bounds.kept_by_terms(shape, self._most_terms(shape, layers), layers)
        for j, layer in enumerate(layers.tolist()):
            self.probes[layer, i] = Probe(kept[j], kept.new_zeros(1, 0))
        self.stage[layers, i] = PROBED

    def _raise(self, layers: Tensor, i: int, bound: Tensor) -> None:
        self.lower[layers, i] = torch.maximum(self.lower[layers, i], bound)

    def _probe(self, layers: Tensor, i: int) -> None:
        shape = self.shapes[i]
        terms = self._most_terms(shape, layers)
        op = Rearranged.of(self.rough.take(layers), shape)
        for some in _slices(op, FIRST + OVERSAMPLING + (0 if min(op.shape) <= DENSE_PROBE else terms)):
            kept, lost = probe(op.take(some), shape, terms)
            self._raise(layers[some], i, self._least(shape, layers[some], kept, lost).min(1).values)
            for j, layer in enumerate(layers[some].tolist()):
                self.probes[layer, i] = Probe(kept[j], lost[j])
        self.stage[layers, i] = PROBED

    def _compute(self, layers: Tensor, i: int) -> None:
        """Compute all factorizations of a shape up to the number of terms that is promising now."""
        shape = self.shapes[i]
        terms = max(self._next_terms(shape, layer, i) for layer in layers.tolist())
        if not terms:
            self.stage[layers, i] = CLOSED
            return
        op = Rearranged.of(self.lora.take(layers), shape)
        for some in _slices(op, terms):
            result = spectrum(self.lora.take(layers[some]), shape, terms)
            for j, layer in enumerate(layers[some].tolist()):
                self._learn(layer, shape, result, j)
                self._after(layer, i, result, j, terms)

    def _next_terms(self, shape: KronShape, layer: int, i: int) -> int:
        """The fewest terms that may help, at least 1.5 times those of the last time; 0 if none can."""
        promising = (self._least_of_probe(shape, layer, i) <= self.best_value[layer]).nonzero()[:, 0] + 1
        if not len(promising):
            return 0
        return min(max(int(promising[0]), 3 * self.probes[layer, i].done // 2), int(promising[-1]))

    def _least_of_probe(self, shape: KronShape, layer: int, i: int) -> Tensor:
        """Lower bound (K,) of the value of factorizations that are not computed yet."""
        known = self.probes[layer, i]
        least = self._least(shape, torch.tensor([layer]), known.kept[None], known.lost[None])[0]
        least[: known.done] = torch.inf
        return least

    def _after(self, layer: int, i: int, result: FactorizationSpectrum, j: int, terms: int) -> None:
        """Update the bounds of more terms from an exact computation, and close the shape if they rule these out."""
        last = min(terms, result.kept.shape[1]) - 1
        lost = (result.kept[j, last] - result.kept_by_rank[j, last]).clamp(min=0) - 1e-9
        kept = self.probes[layer, i].kept.clone()
        more = torch.arange(1, max(1, len(kept) - last))  # following terms, none larger than the last
        at_most = result.kept[j, last] + more * result.triples.sigma[j, last] ** 2 + 1e-9
        kept[last + 1 :] = torch.minimum(kept[last + 1 :], at_most)
        self.probes[layer, i] = Probe(kept, lost[None], terms)
        self.lower[layer, i] = self._least_of_probe(self.shapes[i], layer, i).min()

    # ── factorizations ───────────────────────────────────────────────────────────────────────────

    def _learn(self, layer: int, shape: KronShape, result: FactorizationSpectrum, j: int) -> None:
        """Record the best allowed factorization of a spectrum, and its Pareto front."""
        left = torch.cat([1 - result.kept[j, :, None], 1 - result.kept_by_rank[j]], dim=1)  # (K, 1 + ρ): dense first
        per_term = [parameters_of(shape, 1, rank) for rank in (None, *range(1, left.shape[1]))]
        sizes = torch.arange(1, len(left) + 1)[:, None] * torch.tensor(per_term)
        cost = self.goal.take(torch.tensor([layer])).cost(torch.where(left < CANCELLED, 0.0, left))
        value = (float(self.goal.price[layer]) * sizes + cost).flatten()
        for at in torch.sort(value, stable=True).indices.tolist():
            if float(value[at]) > float(self.best_value[layer]):
                break
            k, rank = at // left.shape[1] + 1, at % left.shape[1] or None
            if self._take(layer, shape, k, rank, result, j):
                break
        if self.goal.max_error is None:
            self._note(layer, shape, left, sizes)

    def _take(
        self, layer: int, shape: KronShape, terms: int, rank: int | None, result: FactorizationSpectrum, j: int
    ) -> bool:
        """Return whether a factorization is allowed and within the error; record it if it is the best so far."""
        if self.allowed is not None and not self.allowed(shape, terms, rank):
            return False
        error = result.error(j, terms, rank)
        form = Factorization(shape, terms, rank, parameters_of(shape, terms, rank), error)
        cost = float(self.goal.cost(torch.tensor(error**2, dtype=torch.float64)))
        value = float(self.goal.price[layer]) * form.parameters + cost
        if cost == float("inf"):
            return False
        found = self.found[layer]
        if found is None or (value, form.order) < (found.value, found.form.order):
            self.found[layer] = BestFactorization(value, form)
            self.best_value[layer] = min(value, float(self.best_value[layer]))
        return True

    def _note(self, layer: int, shape: KronShape, left: Tensor, sizes: Tensor) -> None:
        """Record the factorizations of a spectrum with the smallest error for their size."""
        order = torch.sort(sizes.flatten(), stable=True).indices
        sorted_left = left.flatten()[order].clamp(min=0)
        before = torch.cat([sorted_left.new_tensor([2.0]), sorted_left.cummin(0).values[:-1]])
        for at in order[sorted_left < before].tolist():
            k, rank = at // left.shape[1] + 1, at % left.shape[1] or None
            if self.allowed is None or self.allowed(shape, k, rank):
                error = max(float(left.flatten()[at]), 0.0) ** 0.5
                self.points[layer].append(Factorization(shape, k, rank, parameters_of(shape, k, rank), error))


def _grouped(members: Iterable[int], keys: Iterable[K]) -> dict[K, list[int]]:
    groups: dict[K, list[int]] = defaultdict(list)
    for member, key in zip(members, keys, strict=True):
        groups[key].append(member)
    return groups


def probe(op: Rearranged, shape: KronShape, terms: int) -> tuple[Tensor, Tensor]:
    """Bound the energy of 1 … terms products from above, (n, K), and the loss by B of rank 1 … ρ from below, (n, f, ρ).

    Exact if the smaller side of R is short. If it is long, one step of subspace iteration gives a subspace Q: the sum
    of the K largest eigenvalues of H = R Rᵀ is at most that of QᵀHQ plus the part of the trace outside Q (Bourin & Lee
    2012), without a bound by rank.
    """
    small = op if op.shape[0] <= op.shape[1] else op.T
    m, n, slack = small.shape[0], len(op.u), SLACK[op.u.dtype]
    if m <= DENSE_PROBE or 3 * (terms + OVERSAMPLING) > m:
        values, vectors = torch.linalg.eigh(small.gram())
        kept = values.flip(-1).clamp(min=0).cumsum(1)
        first, energy = vectors[..., -FIRST:].flip(-1).mT, values[:, -FIRST:].flip(-1).clamp(min=0)
        right = first if small is not op else _unit(op.T.matmul(first))
        lost = (energy[..., None] * (1 - most_by_rank(op, right, shape))).clamp(min=0).cumsum(1)
        return _padded(kept, terms).double() + slack, CERTAIN * lost.double() - slack
    kept = sketch(small, terms)
    return _padded(kept, terms).double() + slack, kept.new_zeros(n, 1, 0)


def most_by_rank(op: Rearranged, right: Tensor, shape: KronShape) -> Tensor:
    """Bound the energy of ranks 1 … ρ of each unit-norm B, (n, k, ρ), by the fourth moment of its spectrum."""
    n, k, _ = right.shape
    stack = right.reshape(n, k, *op.columns)
    gram = stack @ stack.mT if stack.shape[2] <= stack.shape[3] else stack.mT @ stack
    most = min(most_right_rank(shape), *op.columns)
    return largest_sums(gram.square().sum((2, 3)), min(op.columns), most)


def sketch(op: Rearranged, terms: int) -> Tensor:
    """Return an upper bound (n, K) of the energy of 1 … K terms, for layers of unit norm."""
    generator = torch.Generator().manual_seed(SEED)
    start = torch.randn(terms + OVERSAMPLING, op.shape[0], generator=generator, dtype=op.u.dtype)
    basis = torch.linalg.qr(op.matmul(op.T.matmul(start.expand(len(op.u), -1, -1))).mT).Q.mT
    image = op.T.matmul(basis)
    values: Tensor = torch.linalg.eigvalsh(image @ image.mT).flip(-1).clamp(min=0)
    kept: Tensor = values.cumsum(1)[:, :terms] + (1 - values.sum(1, keepdim=True)).clamp(min=0)
    return kept


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=-1, eps=1e-30)


def _padded(kept: Tensor, terms: int) -> Tensor:
    """Cut cumulative sums to K terms, or extend them with their last value: (n, K)."""
    extended: Tensor = kept[:, torch.arange(terms).clamp(max=kept.shape[1] - 1)]
    return extended


def _slices(op: Rearranged, vectors: int) -> list[Tensor]:
    """Split the layers of a batch so that memory stays bounded."""
    rank = op.u.shape[1]
    sides = max(op.rows[0] ** 2, op.rows[1] ** 2, op.columns[0] ** 2, op.columns[1] ** 2) * rank**2
    dense = op.shape[0] * op.shape[1]
    step = max(1, AT_ONCE // (2 * vectors * max(op.shape) + min(sides, dense) + min(op.shape) ** 2))
    return list(torch.split(torch.arange(len(op.u)), step))
