"""One adapter from several: exactly, by concatenation, and on request smaller, with a measured error."""

from krona_hub.combining.api import combine
from krona_hub.combining.report import CombineReport, Part

__all__ = ["CombineReport", "Part", "combine"]
