"""Combine several adapters into one: exactly, by concatenation, or smaller, with a measured error."""

from krona_hub.combining.api import combine
from krona_hub.combining.report import CombinedAdapter, CombineReport

__all__ = ["CombineReport", "CombinedAdapter", "combine"]
