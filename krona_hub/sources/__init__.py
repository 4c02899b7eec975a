"""Resolving paths and Hub ids to local paths. The only package outside `hub/` that may use the network.

A source is a path if it exists; otherwise `hf://ns/name[@revision][/file]` or `ns/name[@revision][/file]`.
"""

from krona_hub.sources.local_path import PIPELINE as PIPELINE
from krona_hub.sources.local_path import HubId as HubId
from krona_hub.sources.local_path import is_remote as is_remote
from krona_hub.sources.local_path import parse_hub_id as parse_hub_id
from krona_hub.sources.local_path import resolve as resolve
from krona_hub.sources.local_path import resolve_base as resolve_base
