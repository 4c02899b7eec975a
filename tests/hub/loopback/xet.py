"""The local Xet store of the loopback hub: what was uploaded there, and its bytes for clients without Xet."""

from __future__ import annotations

import struct
from pathlib import Path
from tempfile import TemporaryDirectory

RECORD = 48  # bytes of every record of a shard
VERIFIED, DESCRIBED = 1 << 31, 1 << 30  # flags of a file: its parts have check values; its sha256 follows
FAR_AWAY = 4_000_000_000  # seconds since 1970


def received(store: str) -> dict[str, str]:
    """sha256 -> Xet hash of every file in the store, from its shards."""
    found: dict[str, str] = {}
    for shard in (Path(store) / "xet/xorbs/shards").glob("*.mdb"):
        found |= dict(_files(shard.read_bytes()))
    return found


def _files(data: bytes):
    place = RECORD
    while place + RECORD <= len(data) and data[place : place + 32] != b"\xff" * 32:
        flags, parts = struct.unpack_from("<II", data, place + 32)
        end = place + RECORD * (1 + parts * (2 if flags & VERIFIED else 1))
        if flags & DESCRIBED:
            yield _digest(data, end), _digest(data, place)
            end += RECORD
        place = end


def _digest(data: bytes, place: int) -> str:
    """32 bytes in hexadecimal; each word of eight is stored the other way round."""
    return "".join(data[i : i + 8][::-1].hex() for i in range(place, place + 32, 8))


def bridged(store: str, xet_hash: str, size: int) -> bytes:
    """The bytes of a file, put together again, as the Hub does for clients without Xet."""
    from hf_xet import XetFileInfo
    from huggingface_hub.utils._xet import get_xet_session

    with TemporaryDirectory() as folder:
        out = Path(folder) / "file"
        with get_xet_session().new_file_download_group(
            endpoint=f"local://{store}", token="xet_token", token_expiry_unix_secs=FAR_AWAY
        ) as group:
            group.start_download_file(XetFileInfo(xet_hash, size), str(out))
        return out.read_bytes()
