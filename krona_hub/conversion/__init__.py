"""Convert any adapter format to any other: exactly where possible, with a measured error otherwise."""

from krona_hub.conversion.api import convert
from krona_hub.conversion.report import ConversionReport, LayerReport

__all__ = ["ConversionReport", "LayerReport", "convert"]
