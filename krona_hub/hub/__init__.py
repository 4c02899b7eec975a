"""Adapters on the Hugging Face Hub: push, pull, info, search, and what lies in the cache."""

from krona_hub.hub.pushing import PushReport, push

__all__ = ["PushReport", "push"]
