"""Cut the layers of an adapter by their moments: ranks, and layers left out, by what they add to the effect.

Every layer becomes the best LoRA of some rank under its moments (`krona_hub.kron.weighted.cut`), is left out, or stays
as it is. The losses of all layers are comparable, so that a budget is spent where a parameter adds most.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.adapters.moments import Moments
from krona_hub.conversion.convert_layers import ConvertedLayer
from krona_hub.conversion.methods import Budget, MaxError, Method, Rank
from krona_hub.conversion.target import ConversionTarget
from krona_hub.errors import InexpressibleError, IntegrityError, abbreviated
from krona_hub.formats.forms.normal_forms import Lora, is_lora, lora_rank, size_of, with_lora
from krona_hub.kron.allocation import Point, allocate, smallest_budget, spend
from krona_hub.kron.candidates import Factorization, nothing
from krona_hub.kron.shapes import KronShape
from krona_hub.kron.weighted.cut import WeightedCut, weighted_cut
from krona_hub.kron.weighted.middle import Middle, middle_of

Layers = Mapping[str, LayerDelta]
BISECTIONS = 24  # of the budget, for a limit of the error


@dataclass(frozen=True, eq=False)
class _Cuts:
    """The cuts of one layer, and the points that they offer."""

    delta: LayerDelta
    middle: Middle
    cut: WeightedCut
    points: tuple[Point, ...]

    @property
    def loss(self) -> float:
        """The loss of leaving the layer out."""
        return float(self.cut.losses[0])


@dataclass(frozen=True, eq=False)
class WeightedLayers:
    """Converted layers, and the effect that they keep by the moments."""

    layers: dict[str, ConvertedLayer]
    predicted: float  # 1 − Σ loss / Σ loss of leaving everything out
    curve: tuple[tuple[int, float], ...]  # (parameters, predicted effect) of the best cuts of other sizes


def cut_by_moments(
    layers: Layers, method: Method, target: ConversionTarget, moments: Moments, gain: float = 1.0
) -> WeightedLayers:
    """Convert layers by `--budget`, `--rank` or `--max-error` under their moments.

    Parameters
    ----------
    layers : deltas by layer
    method : Budget leaves layers out; Rank cuts each layer to the same rank; MaxError, here of the whole adapter, is
        √(1 − predicted effect)
    target : a format that stores LoRA
    moments : of these layers
    gain : factor on all layers

    Raises
    ------
    UsageError : a budget below rank 1 of any layer
    IntegrityError : moments of other layers
    InexpressibleError : the target does not store LoRA in some layer
    """
    _check(layers, target, moments)
    cuts = {name: _cuts_of(name, delta, target, moments) for name, delta in layers.items()}
    chosen = _chosen(list(cuts.values()), method, sum(size_of(delta)[0] for delta in layers.values()))
    whole = sum(each.loss for each in cuts.values())
    lost = sum(point.loss for point in chosen)
    converted = {name: _converted(each, point, gain) for (name, each), point in zip(cuts.items(), chosen, strict=True)}
    return WeightedLayers(converted, _kept(lost, whole), _curve([each.points for each in cuts.values()], whole))


def _kept(lost: float, whole: float) -> float:
    return 1 - lost / whole if whole else 1.0


def _curve(points: Sequence[Sequence[Point]], whole: float) -> tuple[tuple[int, float], ...]:
    """Return the size and the predicted effect of the best cuts of several sizes, from 1/64 of the largest."""
    least, most = smallest_budget(points)[0], sum(max(p.parameters for p in layer) for layer in points)
    budgets = sorted({max(least, round(most * 2 ** (-i / 2))) for i in range(13)})
    found = [spend(points, budget)[0] for budget in budgets]
    sizes = [(sum(p.parameters for p in chosen), sum(p.loss for p in chosen)) for chosen in found]
    return tuple((size, _kept(lost, whole)) for size, lost in sizes)


def _check(layers: Layers, target: ConversionTarget, moments: Moments) -> None:
    missing = [name for name in layers if name not in moments.layers]
    if missing:
        raise IntegrityError(
            f"The moments lack {len(missing)} of {len(layers)} layers ({abbreviated(missing)}).",
            fix="Gather them again with krona calibrate.",
        )
    refused = [name for name, delta in layers.items() if not _holds_lora(target, delta)]
    if refused:
        raise InexpressibleError(
            f"{target.tool or target.format} stores no LoRA in {len(refused)} layers ({abbreviated(refused)}).",
            fix="Choose another target, or convert without --calibrate and --moments.",
        )


def _holds_lora(target: ConversionTarget, delta: LayerDelta) -> bool:
    if target.to_lora:
        return True
    shape = KronShape(1, 1, *delta.matrix_shape)
    return any(loads(delta.weight_shape, shape, 1, 1) for loads in target.loads)


def _cuts_of(name: str, delta: LayerDelta, target: ConversionTarget, moments: Moments) -> _Cuts:
    middle, own = middle_of(delta.sums, delta.matrix_shape), moments.layers[name]
    if len(own.inputs) != middle.up.shape[1]:
        raise IntegrityError(
            f"The moments of {name} have size {len(own.inputs)}, not {middle.up.shape[1]}.",
            fix="Gather them again with krona calibrate.",
        )
    cut = weighted_cut(own.inputs, own.outputs)
    size, losses = delta.matrix_shape, cut.losses.tolist()
    shape = KronShape(1, 1, *size)
    points = [] if target.requires(name, delta) else [Point(0, losses[0], nothing(size))]
    points += [
        Point(rank * sum(size), loss, Factorization(shape, 1, rank, rank * sum(size), _share(loss, losses[0])))
        for rank, loss in enumerate(losses)
        if rank
    ]
    if not is_lora(delta) and not target.to_lora and target.holds_any_shape(delta):
        own_size = size_of(delta)[0]
        points.append(Point(own_size, 0.0, Factorization(shape, 1, None, own_size, 0.0)))
    return _Cuts(delta, middle, cut, tuple(points))


def _share(loss: float, whole: float) -> float:
    return sqrt(loss / whole) if whole else 0.0


def _chosen(cuts: Sequence[_Cuts], method: Method, parameters: int) -> list[Point]:
    points = [each.points for each in cuts]
    if isinstance(method, Rank):
        return [_at_rank(each, method.value) for each in cuts]
    if isinstance(method, Budget):
        return spend(points, method.of(parameters))[0]
    limit = method.value if isinstance(method, MaxError) else 0.0
    return _within(points, limit**2 * sum(each.loss for each in cuts))


def _at_rank(cuts: _Cuts, rank: int) -> Point:
    low_rank = [p for p in cuts.points if p.form.right_rank is not None]
    return low_rank[min(rank, len(low_rank)) - 1]


def _within(points: Sequence[Sequence[Point]], loss: float) -> list[Point]:
    """Return the points of least total size whose total loss is at most `loss`, by bisection of the budget."""
    low, high = smallest_budget(points)[0], sum(max(p.parameters for p in layer) for layer in points)
    best = allocate(points, high)[0]
    for _ in range(BISECTIONS):
        if low >= high:
            break
        middle = (low + high) // 2
        chosen = spend(points, middle)[0]
        if sum(p.loss for p in chosen) <= loss:
            best, high = chosen, sum(p.parameters for p in chosen)
        else:
            low = middle + 1
    return best


def _converted(cuts: _Cuts, point: Point, gain: float) -> ConvertedLayer:
    delta, form = cuts.delta, point.form
    if form.is_nothing:
        return ConvertedLayer(replace(delta, sums=()), is_left_out=True)
    rank, stored = form.right_rank, lora_rank(delta) if is_lora(delta) else None
    if rank is None or (stored is not None and rank >= stored):
        sums = delta.sums if gain == 1 else tuple(s.scaled(gain) for s in delta.sums)
        return ConvertedLayer(replace(delta, sums=sums), "kept as it is" if rank is None else "kept as LoRA")
    up, down = cuts.cut.cut(*cuts.middle, rank)
    note = f"rank reduced {stored} → {rank}" if stored is not None else f"LoRA of rank {rank} by the moments"
    return ConvertedLayer(with_lora(delta, Lora((up * gain).float(), down.float())), note)
