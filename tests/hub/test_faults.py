"""Every way in which the network fails: success after another try, or a coded error; never a wrong file."""

from dataclasses import replace

import pytest

from krona_hub.errors import (
    AuthError,
    IntegrityError,
    NotFoundError,
    OfflineError,
    RateLimitError,
    ResourceError,
    UsageError,
)
from krona_hub.hub import info, pull, push
from tests.hub.loopback.server import cut, flipped, header, slow

REPO = "ana/style"
RATE = {"ratelimit": '"api";r=0;t=1', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}
LONG_RATE = {"ratelimit": '"api";r=0;t=290'}
PASSING = {  # what goes wrong once or twice -> success all the same
    "whoami 503": lambda h: h.refuse("^GET /api/whoami", 503),
    "whoami closed": lambda h: h.close("^GET /api/whoami"),
    "model info 429": lambda h: h.refuse("^GET /api/models/", 429, headers=RATE),
    "model info 500 twice": lambda h: h.refuse("^GET /api/models/", 500, times=2),
    "create 502": lambda h: h.refuse("^POST /api/repos/create", 502),
    "create answered by silence": lambda h: h.close("^POST /api/repos/create", after_work=True),
    "preupload 429": lambda h: h.refuse("/preupload/", 429, headers=RATE),
    "batch 500": lambda h: h.refuse("objects/batch", 500),
    "PUT 500 twice": lambda h: h.refuse("^PUT /lfs", 500, times=2),
    "PUT closed": lambda h: h.close("^PUT /lfs"),
    "PUT closed after the work": lambda h: h.close("^PUT /lfs", after_work=True),
    "verify 503": lambda h: h.refuse("lfs/verify", 503),
    "commit 429": lambda h: h.refuse("/commit/", 429, headers=RATE),
    "commit 500": lambda h: h.refuse("/commit/", 500),
    "commit closed": lambda h: h.close("/commit/"),
    "commit done, answer lost": lambda h: h.close("/commit/", after_work=True),
    "commit done, answer 504": lambda h: h.change("/commit/", lambda a: replace(a, status=504)),
    "paths-info 503": lambda h: h.refuse("/paths-info/", 503),
    "refs 503": lambda h: h.refuse("/refs", 503),
    "tag 500": lambda h: h.refuse("/tag/", 500),
    "tag made, answer lost": lambda h: h.close("/tag/", after_work=True),
    "slow": lambda h: h.change("/commit/", slow(0.3)),
}


@pytest.mark.parametrize("fault", PASSING)
def test_a_push_survives_what_passes(fault, hub, style):
    rule = PASSING[fault](hub)
    report = push(style, REPO, tag="v1")
    assert rule.seen and report.verified == 4 and hub.state.repos[REPO].tags == {"v1": report.commit}
    assert len(hub.state.repos[REPO].commits) == 2, "one commit, however often it was tried"
    assert hub.state.content(REPO, "krona_adapter.safetensors") == style.read_bytes()


LASTING = {  # what goes on going wrong -> the error
    "whoami 500": (lambda h: h.refuse("whoami", 500, times=99), OfflineError),
    "commit 429 for minutes": (lambda h: h.refuse("/commit/", 429, times=99, headers=LONG_RATE), RateLimitError),
    "commit 500": (lambda h: h.refuse("/commit/", 500, times=99), OfflineError),
    "commit 403": (lambda h: h.refuse("/commit/", 403, times=99), AuthError),
    "PUT 403": (lambda h: h.refuse("^PUT", 403, times=99), AuthError),
    "PUT 500": (lambda h: h.refuse("^PUT", 500, times=99), OfflineError),
    "PUT 413": (lambda h: h.refuse("^PUT", 413, times=99), ResourceError),
    "PUT closed": (lambda h: h.close("^PUT", times=99), OfflineError),
    "verify 422": (lambda h: h.refuse("lfs/verify", 422, times=99), IntegrityError),
    "preupload nonsense": (
        lambda h: h.change("/preupload/", lambda a: replace(a, body=b"{}"), times=99),
        IntegrityError,
    ),
}


@pytest.mark.parametrize("fault", LASTING)
def test_a_push_that_cannot_go_on_leaves_no_commit_and_can_be_repeated(fault, hub, style):
    cause, error = LASTING[fault]
    rule = cause(hub)
    with pytest.raises(error) as told:
        push(style, REPO)
    assert rule.seen and told.value.fix and "hf_owner" not in str(told.value)
    assert REPO not in hub.state.repos or len(hub.state.repos[REPO].commits) == 1
    hub.faults.clear()
    sent = len(hub.asked("^PUT /lfs"))
    there = bool(hub.state.lfs)
    assert push(style, REPO).verified == 4
    assert len(hub.asked("^PUT /lfs")) == sent + (not there), "what has arrived is not sent again"


def test_a_hub_that_holds_something_else_after_the_commit_is_found_out(hub, style):
    from tests.hub.loopback.state import File

    def swap(answer):
        repo = hub.state.repos[REPO]
        commit = repo.head()
        repo.commits[commit.sha] = replace(
            commit, files={**commit.files, "krona_adapter.safetensors": File.lfs("0" * 64, style.stat().st_size)}
        )
        return answer

    hub.change("/commit/", swap)
    with pytest.raises(IntegrityError, match="has a different sha256"):
        push(style, REPO)


BLOB = r"^GET /blobs/"
DOWNLOADS = {  # what goes wrong once -> success
    "cut once": lambda h: h.change(BLOB, cut, times=1),
    "flipped once": lambda h: h.change(BLOB, flipped, times=1),
    "blob 503": lambda h: h.refuse(BLOB, 503),
    "blob closed": lambda h: h.close(BLOB),
    "head 503": lambda h: h.refuse("^HEAD", 503),
    "head closed": lambda h: h.close("^HEAD"),
    "model info closed": lambda h: h.close("^GET /api/models"),
    "readme flipped": lambda h: h.change("README.md$", lambda a: flipped(a) if a.body else a, times=2),
    "no ranges": lambda h: h.change("config.json$", lambda a: replace(a, status=200), times=1),
}


@pytest.mark.parametrize("fault", DOWNLOADS)
def test_a_pull_survives_what_passes(fault, hub, style, tmp_path):
    push(style, REPO)
    about = info(REPO)  # so that the fault meets the download, and not the preview
    rule = DOWNLOADS[fault](hub)
    pull(REPO, tmp_path / "out")
    assert rule.seen and about.commit
    assert (tmp_path / "out/krona_adapter.safetensors").read_bytes() == style.read_bytes()


BROKEN = {
    "always cut": (lambda h: h.change(BLOB, cut, times=99), OfflineError, "was interrupted.*starts over"),
    "always flipped": (lambda h: h.change(BLOB, flipped, times=99), IntegrityError, "its sha256 does not match"),
    "shorter": (
        lambda h: h.change(BLOB, lambda a: replace(a, body=a.body[:-8]), times=99),
        IntegrityError,
        "different size",
    ),
    "longer": (
        lambda h: h.change(BLOB, lambda a: replace(a, body=a.body + b"x"), times=99),
        IntegrityError,
        "different size",
    ),
    "size lie": (lambda h: h.change("^HEAD", header("X-Linked-Size", "7"), times=99), IntegrityError, "different size"),
    "no commit": (lambda h: h.change("^HEAD", header("X-Repo-Commit", None), times=99), IntegrityError, "HF_ENDPOINT"),
    "head 503": (lambda h: h.refuse("^HEAD", 503, times=99), OfflineError, "returned error 503"),
    "429": (lambda h: h.refuse("^GET /api/models", 429, times=99, headers=LONG_RATE), RateLimitError, "290 seconds"),
    "blob 404": (lambda h: h.refuse(BLOB, 404, times=99), NotFoundError, "lists it but cannot find it"),
    "blob 403": (lambda h: h.refuse(BLOB, 403, times=99), AuthError, "has no read access"),
    "blob 418": (lambda h: h.refuse(BLOB, 418, times=99), UsageError, r"rejected the request \(418\)"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_pull_that_cannot_go_on_leaves_nothing(fault, hub, style, tmp_path):
    push(style, REPO)
    cause, error, words = BROKEN[fault]
    rule = cause(hub)
    with pytest.raises(error, match=words) as told:
        pull(REPO, tmp_path / "out")
    assert rule.seen and told.value.fix and "write access" not in told.value.fix and not list(tmp_path.glob("out*"))
    hub.faults.clear()
    assert pull(REPO, tmp_path / "out").written


def test_a_disk_without_room_is_told_before_the_download(hub, style, tmp_path, monkeypatch):
    import shutil
    from collections import namedtuple

    push(style, REPO)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    with pytest.raises(ResourceError, match=r"the download of .* MB does not fit"):
        pull(REPO, tmp_path / "out")
    assert not hub.asked("^HEAD")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Linked-Etag", '"../../../../escaped"'),
        ("X-Linked-Etag", '"/etc/passwd"'),
        ("X-Linked-Etag", '"' + "a" * 300 + '"'),
        ("X-Repo-Commit", "../../../../escaped"),
        ("ETag", '"../../../escaped"'),
    ],
)
def test_a_digest_that_is_a_path_is_refused_before_anything_is_written(name, value, hub, style, tmp_path, client_home):
    push(style, REPO)
    hub.change("^(HEAD|GET) /ana/style/resolve", header(name, value), times=99)
    before = {p for p in tmp_path.rglob("*") if "hf-home" not in str(p)}
    with pytest.raises(IntegrityError, match="which is not a digest"):
        pull(REPO, tmp_path / "out")
    assert {p for p in tmp_path.rglob("*") if "hf-home" not in str(p)} == before
    assert not list(tmp_path.rglob("*escaped*"))


@pytest.mark.parametrize("sha", ["../../../escaped", "main", "", None, "A" * 40])
def test_a_listing_of_no_commit_is_refused(sha, hub, style, tmp_path):
    import json

    def lie(answer):
        return replace(answer, body=json.dumps(json.loads(answer.body) | {"sha": sha}).encode())

    push(style, REPO)
    hub.change("^GET /api/models/ana/style$", lie, times=99)
    for work in (lambda: pull(REPO, tmp_path / "out"), lambda: push(style, REPO, force=True)):
        with pytest.raises(IntegrityError, match="instead of a commit"):
            work()
    assert not (tmp_path / "out").exists()
