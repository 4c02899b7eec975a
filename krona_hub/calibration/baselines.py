"""What other factorizations of the same size keep of the effect: a plain cut of the LoRA, and a Kronecker sum.

Both minimize the error of the delta without data, may leave layers out, and are measured on the same held-out calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from krona_hub.adapters.adapter import Adapter
from krona_hub.calibration.denoiser_calls import RepeatedCall
from krona_hub.calibration.measure_effect import References, measured
from krona_hub.conversion.convert_layers import apply_method
from krona_hub.conversion.methods import Budget
from krona_hub.conversion.report import percent
from krona_hub.conversion.target import ConversionTarget, Loads
from krona_hub.errors import InexpressibleError, UsageError
from krona_hub.kron.shapes import KronShape

LEAST_SIDE = 4  # of both factors: smaller ones are LoRA in all but name


@dataclass(frozen=True)
class _Kronecker(ConversionTarget):
    """A target that holds only sums of Kronecker products of dense factors."""

    @property
    def loads(self) -> tuple[Loads, ...]:
        return (_is_kronecker,)


def _is_kronecker(_weight: tuple[int, ...], shape: KronShape, _terms: int, right_rank: int | None) -> bool:
    return right_rank is None and min(shape) >= LEAST_SIDE


TARGETS = (("a plain cut of the LoRA", ConversionTarget("kohya-lora")), ("a Kronecker sum", _Kronecker("krona")))


def baselines(how: RepeatedCall, known: References, adapter: Adapter, parameters: int) -> Iterator[str]:
    """Yield, in words, what each baseline within `parameters` keeps of the effect."""
    for name, target in TARGETS:
        try:
            outcomes = apply_method(dict(adapter.layers), Budget(parameters=parameters), target)
        except (InexpressibleError, UsageError) as error:
            yield f"{name} of this size: {error.cause}"
            continue
        kept = {layer: outcome.delta for layer, outcome in outcomes.items() if not outcome.is_left_out}
        result = adapter.with_layers(kept)
        size = sum(delta.parameters for delta in kept.values())
        yield f"{name}, {size:,} parameters: {percent(measured(how, known, result).effect)} of the effect"
