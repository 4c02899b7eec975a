"""Images from a base model with adapters: the same prompts and seeds for each, side by side."""

from krona_hub.images.api import generate
from krona_hub.images.report import GeneratedImage, GenerateReport

__all__ = ["GenerateReport", "GeneratedImage", "generate"]
