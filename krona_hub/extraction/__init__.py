"""An adapter from two checkpoints: the nearest Kronecker sums of their difference, down to the rounding noise."""

from krona_hub.extraction.api import extract
from krona_hub.extraction.report import ExtractedLayer, ExtractionReport, OtherChange

__all__ = ["ExtractedLayer", "ExtractionReport", "OtherChange", "extract"]
