"""A conversion between its computation and its file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.conversion.convert_layers import ConvertedLayer
from krona_hub.conversion.methods import Method
from krona_hub.conversion.report import ConversionReport
from krona_hub.conversion.request import ConvertRequest
from krona_hub.formats.writing.write_plan import WritePlan

Layers = Mapping[str, LayerDelta]


@dataclass(frozen=True, eq=False)
class PreparedConversion:
    """A conversion that has been computed and measured, but neither accepted nor written."""

    request: ConvertRequest
    method: Method
    source: Adapter
    reference: Layers  # what the result is measured against
    outcomes: Mapping[str, ConvertedLayer]
    plan: WritePlan
    report: ConversionReport

    @property
    def result(self) -> Adapter:
        """The adapter as the file will store it, rounded to its dtype, without the vectors that it has no place for."""
        return replace(self.plan.adapter.with_layers(dict(self.plan.stored)), vectors=dict(self.plan.vectors))
