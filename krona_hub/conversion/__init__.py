"""Any adapter format to any other: exact where it can be, with a measured error where it cannot."""

from krona_hub.conversion.api import convert
from krona_hub.conversion.report import ConversionReport, LayerReport

__all__ = ["ConversionReport", "LayerReport", "convert"]
