"""Parameters of one layer under each kind of adapter. Torch-free."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod

from krona_hub.bases.module_spec import ModuleSpec
from krona_hub.errors import UsageError
from krona_hub.kron.shapes import lycoris_factors, parse_shape, smallest_split, split

Cost = Callable[[ModuleSpec], int]  # raises ShapeError if the shape does not divide the layer


@dataclass(frozen=True)
class AdapterKind:
    """A kind of adapter, and its parameters per layer."""

    label: str
    cost: Cost


def adapter_kinds(
    shapes: Iterable[str], factors: Iterable[int], ranks: Iterable[int], terms: int = 1
) -> list[AdapterKind]:
    """Return the requested kinds: KronA by width, KronA of each shape, LoKr full and of each rank, LoRA."""
    ranks = list(ranks)
    lokr = [_lokr(f, rank) for f in factors for rank in (None, *ranks)]
    return [_krona_by_width(terms), *(_krona(s, terms) for s in shapes), *lokr, *map(_lora, ranks)]


def krona_parameters(module: ModuleSpec, a1: int, a2: int, terms: int = 1) -> int:
    """Return K · (a1·a2 + b1·b2). Raises ShapeError if a1 does not divide out, or a2 in."""
    return terms * split(module.matrix, a1, a2).parameters


def lokr_parameters(module: ModuleSpec, factor: int, rank: int | None = None) -> int:
    """Return the parameters of a LyCORIS LoKr (no Tucker decomposition, dense w1); rank None is `full_matrix`."""
    a, b = lycoris_factors(module.shape[0], factor)
    c, d = lycoris_factors(module.shape[1], factor)
    kernel = prod(module.shape[2:])
    whole = rank is None or rank >= max(b, d) / 2
    return a * c + (b * d * kernel if whole or rank is None else rank * (b + d * kernel))


def lora_parameters(module: ModuleSpec, rank: int) -> int:
    """Return r · (out + in·k…)."""
    return rank * sum(module.matrix)


def _krona(shape: str, terms: int) -> AdapterKind:
    a1, a2 = parse_shape(shape)
    return AdapterKind(f"KronA {a1}x{a2}{_times(terms)}", lambda module: krona_parameters(module, a1, a2, terms))


def _krona_by_width(terms: int) -> AdapterKind:
    """Return the default: the smallest factorization of each layer, a1·a2 near √(out·in)."""
    return AdapterKind(
        f"KronA by width{_times(terms)}", lambda module: terms * smallest_split(module.matrix).parameters
    )


def _times(terms: int) -> str:
    if terms < 1:
        raise UsageError(f"Invalid number of terms {terms}.", fix="Use an integer of at least 1.")
    return f" ×{terms} terms" if terms > 1 else ""


def _lokr(factor: int, rank: int | None) -> AdapterKind:
    if factor == 0 or factor < -1:
        raise UsageError(f"Invalid LoKr factor {factor}.", fix="Use -1 (near the square root) or a positive integer.")
    label = f"LoKr factor {factor} {'full' if rank is None else f'rank {rank}'}"
    return AdapterKind(label, lambda module: lokr_parameters(module, factor, rank))


def _lora(rank: int) -> AdapterKind:
    if rank < 1:
        raise UsageError(f"Invalid LoRA rank {rank}.", fix="Use a positive integer.")
    return AdapterKind(f"LoRA rank {rank}", lambda module: lora_parameters(module, rank))
