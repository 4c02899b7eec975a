"""Adapters on the Hugging Face Hub: push, pull, info, search and the local cache."""

from krona_hub.hub.browsing import Cached, RepoInfo, SearchHit, cached, info, search
from krona_hub.hub.pulling import PullReport, pull
from krona_hub.hub.pushing import PushReport, push

__all__ = ["Cached", "PullReport", "PushReport", "RepoInfo", "SearchHit", "cached", "info", "pull", "push", "search"]
