"""What a native file was made of, for those who find it later: a file of another format, by its digest."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from krona_hub.adapters.provenance import Provenance, this_krona
from krona_hub.sources.download import sha256_of
from krona_hub.sources.safe_names import PEFT_WEIGHTS


def made_of(source: Path, known: Provenance) -> Provenance:
    """The provenance of what was read from the foreign `source`, with its sha256 and the krona that writes it anew.

    A folder of PEFT stands for its weights; of several components none is the one.
    """
    weights = source / PEFT_WEIGHTS if source.is_dir() else source
    sha256 = sha256_of(weights) if weights.is_file() else None
    return replace(known, created_by=this_krona(), source_sha256=sha256)
