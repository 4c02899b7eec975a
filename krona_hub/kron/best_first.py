"""Best-first search over the shapes of a LoRA layer: the best form of all, having computed few.

Every shape of every layer carries a lower bound of the value that any of its forms can have. The shape with the
least bound is refined, by the next dearer way, until no bound is below the best form found:

    bounds    mode spectra and products of `bounds.py`, for all shapes at once
    moment    the fourth moment, for the shapes that are left
    probe     what K terms keep: exactly, by a Gram matrix, or from above, by a sketch; what the first B lose by rank
    exact     the forms themselves

Layers of one size go through it together, and whatever shape several of them want next is computed for all of these.
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
FIRST = 4  # right factors whose ranks the probe looks at
CERTAIN = 0.9  # of what the first B seem to lose: vectors of close values mix, and their losses with them
OVERSAMPLING = 8  # columns of a sketch beyond the terms asked for
PROMISING = 0.25  # of the value to beat: a shape with a bound below it is followed before others are bounded further
HINTS = 3  # shapes of a layer that are followed so
SEED = 1


@dataclass(frozen=True)
class Goal:
    """What is minimised: price · parameters + the squared error, or the parameters within an error."""

    price: Tensor  # (n,) per parameter, for a layer of energy 1
    max_error: float | None  # None: the squared error is part of the value

    def cost(self, left: Tensor) -> Tensor:
        """The part of the value that a relative squared error makes."""
        if self.max_error is None:
            return left.clamp(min=0)
        return torch.where(left <= max(self.max_error, ROUNDING) ** 2 * (1 + 1e-12), 0.0, torch.inf)

    @property
    def tolerates_float32(self) -> bool:
        """Whether bounds of float32, with their slack, still tell shapes apart."""
        return self.max_error is None or self.max_error >= 0.02

    def take(self, layers: Tensor) -> Goal:
        return Goal(self.price[layers], self.max_error)


class BestFactorization(NamedTuple):
    value: float
    form: Factorization


class Probe(NamedTuple):
    """What is known of one shape of one layer."""

    kept: Tensor  # (K,): the most that 1 … K terms keep
    lost: Tensor  # (f, ρ): the least that B of rank 1 … ρ lose in the first 1 … f of the terms
    done: int = 0  # terms up to which every form has been computed


class Search:
    """The search for n layers of one size and of unit norm. `roof` (n,) is a value known to be reachable."""

    def __init__(self, lora: LoraSvd, goal: Goal, roof: Tensor, allowed: Allowed | None = None) -> None:
        self.lora, self.goal, self.best_value, self.allowed = lora, goal, roof.clone(), allowed
        self.rough = lora.to(torch.float32 if goal.tolerates_float32 else torch.float64)
        self.bounds = Bounds(self.rough)
        self.found: list[BestFactorization | None] = [None] * len(roof)
        self.points: list[list[Factorization]] = [[] for _ in roof]  # every form computed that none computed beats
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
        """(n, K): a value that no form of 1 … K terms goes below, from `kept` (n, K) and `lost` (n, f, ρ)."""
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
        """The value over all ranks ρ of B, given what each loses at least: (n, K)."""
        k, rank = torch.arange(1, kept.shape[1] + 1)[:, None], torch.arange(1, lost.shape[2] + 1)
        size = goal.price[:, None, None] * k * (a + rank * thin)
        lost = lost[:, (k[:, 0] - 1).clamp(max=lost.shape[1] - 1)]
        return (size + goal.cost(1 - kept[..., None] + lost)).min(2).values

    @staticmethod
    def _at(by_rank: Tensor, q: Tensor) -> Tensor:
        """by_rank at total rank q; beyond its end the last value still bounds nothing, so zero."""
        inside = q <= by_rank.shape[1]
        return torch.where(inside, by_rank[:, q.clamp(max=by_rank.shape[1]) - 1], 0.0)

    def _most_terms(self, shape: KronShape, layers: Tensor) -> int:
        """Terms beyond which any form of the shape is worse than what is known."""
        a = shape.a1 * shape.a2
        right = min(shape.b1 * shape.b2, shape.b1 + shape.b2) if most_right_rank(shape) else shape.b1 * shape.b2
        per_term = right + (a if a > 1 else 0)
        affordable = (self.best_value[layers] / self.goal.price[layers]).max() / per_term * (1 + 1e-12)
        return min(int(affordable.clamp(max=1e9)), shape.max_terms)

    def _most_total_rank(self, thin: int, layers: Tensor) -> int:
        affordable = (self.best_value[layers] / self.goal.price[layers]).max() / thin
        return int(affordable.clamp(max=1e6)) + 1

    def _not_allowed(self, shape: KronShape, terms: int) -> Tensor:
        """(K,): infinite where no form of that many terms is allowed."""
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
        """Shapes that may still hold a better form; at equal size too, as the order of forms decides."""
        best = self.best_value[:, None]
        beaten = self.lower > best if self.goal.max_error is not None else self.lower >= best * (1 - 1e-9)
        return ~beaten & (self.stage != CLOSED) & self.lower.isfinite()

    def _follow_hints(self, layers: Tensor) -> None:
        """Go straight to the forms of the few shapes with the least bounds, each to its end, where these are low.

        That is where planted structure is, and one good form rules out nearly all the other shapes.
        """
        for _ in range(HINTS):
            value, pick = torch.where(self._open(), self.lower, torch.inf).min(1)
            low = value.isfinite() & (value <= PROMISING * self.best_value)
            layers = layers[low[layers] & self._unlucky()[layers]]
            for i, members in _grouped(layers.tolist(), pick[layers].tolist()).items():
                following = torch.tensor(members)
                self._trust_bounds(following, i)
                while len(following):
                    self._compute(following, i)
                    low = self._open()[following, i] & (
                        self.lower[following, i] <= PROMISING * self.best_value[following]
                    )
                    following = following[low & self._unlucky()[following]]

    def _unlucky(self) -> Tensor:
        """(n,): the layers for which no form has been found yet."""
        return torch.tensor([found is None for found in self.found])

    def _round(self) -> bool:
        """Refine the most promising shape of every layer."""
        value, pick = torch.where(self._open(), self.lower, torch.inf).min(1)
        wanted = value.isfinite().nonzero()[:, 0]
        stages = self.stage[wanted, pick[wanted]].tolist()
        for (i, stage), members in _grouped(wanted.tolist(), zip(pick[wanted].tolist(), stages, strict=True)).items():
            (self._probe if stage == BOUNDED else self._compute)(torch.tensor(members), i)
        return len(wanted) > 0

    def _trust_bounds(self, layers: Tensor, i: int) -> None:
        """Take the first bounds for a probe."""
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
        """All forms of a shape up to the number of terms that is promising now."""
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
        """The fewest terms that may help, and half more than last time at least; 0 where none can."""
        promising = (self._least_of_probe(shape, layer, i) <= self.best_value[layer]).nonzero()[:, 0] + 1
        if not len(promising):
            return 0
        return min(max(int(promising[0]), 3 * self.probes[layer, i].done // 2), int(promising[-1]))

    def _least_of_probe(self, shape: KronShape, layer: int, i: int) -> Tensor:
        """(K,): what forms that are not computed yet may still reach."""
        known = self.probes[layer, i]
        least = self._least(shape, torch.tensor([layer]), known.kept[None], known.lost[None])[0]
        least[: known.done] = torch.inf
        return least

    def _after(self, layer: int, i: int, result: FactorizationSpectrum, j: int, terms: int) -> None:
        """Keep what an exact computation says about more terms, and close the shape where that rules them out."""
        last = min(terms, result.kept.shape[1]) - 1
        lost = (result.kept[j, last] - result.kept_by_rank[j, last]).clamp(min=0) - 1e-9
        kept = self.probes[layer, i].kept.clone()
        more = torch.arange(1, max(1, len(kept) - last))  # terms that follow, none of them larger than the last
        at_most = result.kept[j, last] + more * result.triples.sigma[j, last] ** 2 + 1e-9
        kept[last + 1 :] = torch.minimum(kept[last + 1 :], at_most)
        self.probes[layer, i] = Probe(kept, lost[None], terms)
        self.lower[layer, i] = self._least_of_probe(self.shapes[i], layer, i).min()

    # ── forms ────────────────────────────────────────────────────────────────────────────────────

    def _learn(self, layer: int, shape: KronShape, result: FactorizationSpectrum, j: int) -> None:
        """Take the best allowed form of a spectrum, and note those that no other of it beats."""
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
        """Whether a form is allowed and keeps the error; it becomes the best if it beats the best."""
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
        """The forms of a spectrum with the least error for their size."""
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
    """The most that 1 … terms products keep, (n, K), and the least that B of rank 1 … ρ lose, (n, f, ρ).

    Both are what R has, where its smaller side is short. Where it is long, a subspace Q is found by one step of
    subspace iteration: Σ of the K largest eigenvalues of H = R Rᵀ is at most that of QᵀHQ plus what of the trace Q
    leaves (Bourin & Lee 2012), and nothing is said about ranks.
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
    """The most that 1 … ρ ranks of each unit-norm B keep, by the fourth moment of its spectrum: (n, k, ρ)."""
    n, k, _ = right.shape
    stack = right.reshape(n, k, *op.columns)
    gram = stack @ stack.mT if stack.shape[2] <= stack.shape[3] else stack.mT @ stack
    most = min(most_right_rank(shape), *op.columns)
    return largest_sums(gram.square().sum((2, 3)), min(op.columns), most)


def sketch(op: Rearranged, terms: int) -> Tensor:
    """(n, K): an upper bound of what 1 … K terms keep, for layers of unit norm."""
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
    """(n, K): cumulative sums, cut or held at their last value."""
    held: Tensor = kept[:, torch.arange(terms).clamp(max=kept.shape[1] - 1)]
    return held


def _slices(op: Rearranged, vectors: int) -> list[Tensor]:
    """The layers of a batch, as many at a time as memory allows."""
    rank = op.u.shape[1]
    sides = max(op.rows[0] ** 2, op.rows[1] ** 2, op.columns[0] ** 2, op.columns[1] ** 2) * rank**2
    dense = op.shape[0] * op.shape[1]
    step = max(1, AT_ONCE // (2 * vectors * max(op.shape) + min(sides, dense) + min(op.shape) ** 2))
    return list(torch.split(torch.arange(len(op.u)), step))
