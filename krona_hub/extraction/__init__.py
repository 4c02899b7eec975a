"""Extract an adapter from two checkpoints: nearest Kronecker sums of the difference, down to the rounding noise."""

from krona_hub.extraction.api import extract
from krona_hub.extraction.report import ExtractedLayer, ExtractionReport, OtherChange

__all__ = ["ExtractedLayer", "ExtractionReport", "OtherChange", "extract"]
