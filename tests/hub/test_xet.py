"""The Xet lane: the real chunking of hf-xet, into a local store; and a Hub that has no Xet at all."""

import pytest

from krona_hub.hub import pull, push

pytest.importorskip("hf_xet")
REPO = "ana/style"


@pytest.fixture
def with_xet(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_HUB_DISABLE_XET")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    return hub


@pytest.fixture
def store(with_xet, tmp_path):
    folder = tmp_path / "cas"
    folder.mkdir()
    with_xet.xet = str(folder)
    return with_xet


def test_push_and_pull_go_through_xet_bit_for_bit(store, style, tmp_path):
    report = push(style, REPO)
    assert {r.transport for r in report.plan.rows} == {"git", "xet"} and report.verified == 4
    assert store.asked("xet-write-token") and not store.asked("^PUT /lfs")
    assert pull(REPO, tmp_path / "out").written
    assert store.asked("xet-read-token")
    assert (tmp_path / "out/krona_adapter.safetensors").read_bytes() == style.read_bytes()
    store.log.clear()
    assert push(style, REPO).up_to_date and not store.writes


def test_a_hub_without_xet_gets_the_files_over_lfs(with_xet, style):
    """The client itself gives up there (huggingface_hub #4786)."""
    assert push(style, REPO).verified == 4
    assert with_xet.asked("xet-write-token") and len(with_xet.asked("^PUT /lfs")) == 1


def test_a_token_that_may_not_write_is_told(store, style):
    from krona_hub.errors import AuthError

    store.refuse("xet-write-token", 403, times=99)
    with pytest.raises(AuthError, match="no write access"):
        push(style, REPO)


def test_a_corrupted_store_is_found_by_the_digest(store, style, tmp_path):
    from pathlib import Path

    from krona_hub.errors import IntegrityError

    push(style, REPO)
    for xorb in Path(store.xet, "xet/xorbs/xorbs").glob("default.*"):
        if not xorb.name.endswith(".tagset"):
            data = bytearray(xorb.read_bytes())
            data[len(data) // 3] ^= 1
            xorb.chmod(0o644)
            xorb.write_bytes(bytes(data))
    with pytest.raises(IntegrityError):
        pull(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()
