"""A download is read while it grows; whatever goes wrong with that, the bytes are read again."""

import hashlib
import os
from threading import Event

import pytest

from krona_hub.hub import pull, push
from krona_hub.hub.installing import _Copy
from krona_hub.sources.follow_download import Follower
from krona_hub.sources.repo_listing import RemoteFile

REPO = "ana/style"


def grown(folder, pieces, name="digest.1a2b.incomplete", between=lambda: None):
    with (folder / name).open("wb", buffering=0) as file:
        for piece in pieces:
            file.write(piece)
            between()
    (folder / name).rename(folder / "digest")


def test_every_byte_is_given_away_once_and_in_order(tmp_path):
    taken, came = bytearray(), Event()

    def take(piece):
        taken.extend(piece)
        came.set()

    def wait():
        came.wait(10)
        came.clear()

    pieces = [bytes([n]) * 1000 for n in range(20)]
    with Follower(tmp_path, "digest", take) as follower:
        grown(tmp_path, pieces, between=wait)
        assert follower.has_taken(tmp_path / "digest") and bytes(taken) == b"".join(pieces)


@pytest.mark.parametrize("name", ["other.1a2b.incomplete", "digest.tmp"])
def test_other_files_are_not_followed(name, tmp_path):
    with Follower(tmp_path, "digest", lambda piece: pytest.fail("that is another file")) as follower:
        grown(tmp_path, [b"x"], name)
        assert not follower.has_taken(tmp_path / "digest")


def test_the_download_of_another_process_is_not_followed(tmp_path):
    (tmp_path / "digest.before.incomplete").write_bytes(b"half")
    (tmp_path / "digest").write_bytes(b"whole")
    with Follower(tmp_path, "digest", lambda piece: pytest.fail("that is another file")) as follower:
        assert not follower.has_taken(tmp_path / "digest")


def test_a_folder_that_is_not_there_and_an_error_while_taking_are_no_harm(tmp_path):
    with Follower(tmp_path / "none", "digest", len) as follower:
        (tmp_path / "digest").write_bytes(b"whole")
        assert not follower.has_taken(tmp_path / "digest")

    def full(_):
        seen.set()
        raise OSError(28, "no space left")

    seen = Event()
    with Follower(tmp_path, "digest", full) as follower:
        grown(tmp_path, [b"x"], between=lambda: seen.wait(10))
        assert not follower.has_taken(tmp_path / "digest")


def test_a_copy_counts_only_with_the_digest_that_the_hub_names(tmp_path):
    data = os.urandom(3_000_000)
    (tmp_path / "source").write_bytes(data)
    known = RemoteFile("x", len(data), sha256=hashlib.sha256(data).hexdigest())
    with (tmp_path / "out").open("wb") as out:
        copy = _Copy(out, known)
        copy.take(memoryview(b"something else"))
        assert not copy.is_right()
        assert copy.restart_from(tmp_path / "source").is_right()
    assert (tmp_path / "out").read_bytes() == data


@pytest.mark.parametrize("follows", [True, False])
def test_a_pull_is_the_same_with_and_without(follows, hub, style, tmp_path, monkeypatch):
    if not follows:
        monkeypatch.setattr(Follower, "_found", lambda self: None)
    push(style, REPO)
    again = []
    restart = _Copy.restart_from
    monkeypatch.setattr(_Copy, "restart_from", lambda self, path: again.append(path) or restart(self, path))
    pull(REPO, tmp_path / "out")
    assert (tmp_path / "out/krona_adapter.safetensors").read_bytes() == style.read_bytes()
    assert len(again) >= 3 if follows else len(again) == 4, "card, config and manifest lie in the cache already"
