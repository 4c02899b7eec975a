"""Repositories made to hurt: nothing outside the target folder changes, and nothing wrong gets in."""

import json
import struct

import pytest

from krona_hub.errors import ConflictError, FormatError, KronaError, NonFiniteError, NotFoundError, ResourceError
from krona_hub.hub import cached, info, pull, push
from krona_hub.hub.preview import describe_preview
from krona_hub.sources.safe_names import is_safe
from tests.hub.loopback.state import File

REPO = "ana/style"
NAMES = (
    "../../escaped.safetensors", "/etc/escaped.safetensors", "a\\..\\escaped.safetensors", "C:\\escaped.safetensors",
    ".git/hooks/post-checkout", ".cache/huggingface/trees/x.json", "images/../../escaped.png", "images/.png",
    "images/\x1b[31mred.png", "con", "images/con.png", "images/nul.txt.png", "evil.pkl", "evil.bin",
    "images/" + "x" * 300 + ".png", "images/a.png ", "images/a:b.png", "images/\u202egnp.exe.png", "-rf.json",
    "plots//x.png", "images/a/b/c/d.png", "run.sh", "images/x.svg", "setup.py",
)  # fmt: skip


@pytest.fixture
def everything(tmp_path, client_home):
    """All files that are there, but for those of the client's own folder and of the output."""

    def look():
        return {p for p in tmp_path.rglob("*") if not p.is_relative_to(client_home)}

    return look


@pytest.mark.parametrize("name", NAMES)
def test_no_such_name_is_ever_written(name, hub, style, tmp_path, everything):
    assert not is_safe(name) or name.endswith("d.png")
    push(style, REPO)
    repo = hub.state.repos[REPO]
    repo.add("main", {**repo.head().files, name: File.regular(b"evil")}, "evil")
    before = everything()
    report = pull(REPO, tmp_path / "out")
    new = {p.relative_to(tmp_path / "out").as_posix() for p in everything() - before - {tmp_path / "out"}}
    assert new == {"README.md", "config.json", "krona_adapter.safetensors", "krona_manifest.json"}
    assert len(report.skipped) == 1 and "\x1b" not in report.skipped[0]


@pytest.mark.parametrize("name", NAMES)
def test_no_such_name_can_be_asked_for(name, hub, style, tmp_path, everything, monkeypatch):
    monkeypatch.chdir(tmp_path)
    push(style, REPO)
    repo = hub.state.repos[REPO]
    repo.add("main", {**repo.head().files, name: File.regular(b"evil")}, "evil")
    before = everything()
    with pytest.raises(KronaError):
        pull(f"{REPO}/{name}")
    assert everything() == before


def test_names_that_differ_in_capitals_only_are_refused(hub, style, tmp_path):
    push(style, REPO)
    data = hub.state.content(REPO, "krona_adapter.safetensors")
    hub.state.put(REPO, {"images/A.png": data, "images/a.png": data})
    with pytest.raises(ConflictError, match="which are equal on many disks"):
        pull(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("repo", ["../x", "ana/../style", "ana/style/../../x", "..", "a/b\x00c", "ana/" + "x" * 300])
def test_names_of_repositories_cannot_leave_the_cache(repo, hub, tmp_path, everything):
    before = everything()
    with pytest.raises(KronaError):
        pull(repo, tmp_path / "out")
    assert everything() == before


def forged(header: dict | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start, end, shape=(1,), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


BROKEN = {
    "endless header": forged({}, length=2**62),
    "header of 20 MB": forged(b"{" + b" " * 20_000_000 + b"}"),
    "overlap": forged({"a": tensor(0, 4), "b": tensor(2, 6)}, bytes(6)),
    "hole": forged({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)),
    "trailing bytes": forged({"a": tensor(0, 4)}, bytes(99)),
    "overflow": forged({"a": tensor(0, 4, (2**62, 2**62))}, bytes(4)),
    "duplicate keys": forged(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],'
                             b'"data_offsets":[0,4]}}', bytes(4)),
    "not JSON": forged(b"{nonsense}"),
    "a pickle": b"\x80\x04\x95" + bytes(100),
    "a web page": b"<!DOCTYPE html><html>" + bytes(100),
    "an lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n",
    "empty": b"",
    "no adapter": forged({"model.weight": tensor(0, 4)}, bytes(4)),
    "20,001 tensors": forged({f"t{i}": tensor(4 * i, 4 * i + 4) for i in range(20_001)}, bytes(4 * 20_001)),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("name", ["krona_adapter.safetensors", "x.safetensors"])
def test_a_broken_file_is_refused_from_its_header(kind, name, hub, tmp_path):
    hub.state.create("ben/bad", files={name: BROKEN[kind]})
    with pytest.raises((FormatError, ResourceError)) as told:
        pull("ben/bad", tmp_path / "out")
    assert told.value.fix and not (tmp_path / "out").exists()
    assert sum(len(BROKEN[kind]) for r in hub.asked("^GET /blobs/") if "range" not in r.headers) == 0
    if kind not in ("header of 20 MB", "endless header"):
        assert describe_preview(info("ben/bad").preview)["problem"] or kind == "20,001 tensors"


def test_nan_is_found_before_anything_is_put_in_place(hub, style, tmp_path):
    data = bytearray(style.read_bytes())
    data[-4:] = struct.pack("<f", float("nan"))
    push(style, REPO)
    manifest = json.loads(hub.state.content(REPO, "krona_manifest.json"))
    import hashlib

    manifest["files"]["krona_adapter.safetensors"]["sha256"] = hashlib.sha256(data).hexdigest()
    changed = {"krona_adapter.safetensors": bytes(data), "krona_manifest.json": json.dumps(manifest).encode()}
    hub.state.put(REPO, changed)
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        pull(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", [b"", b"[]", b"{", b'{"files": 3}', b'{"files": {"a": {"size": "x", "sha256": 1}}}', b"\xff\xfe", b"null"]
)
def test_a_broken_manifest_stops_a_pull_and_is_replaced_by_a_push(text, hub, style, tmp_path):
    push(style, REPO)
    hub.state.put(REPO, {"krona_manifest.json": text or b" "})
    with pytest.raises(KronaError):
        pull(REPO, tmp_path / "out")
    push(style, REPO)
    assert pull(REPO, tmp_path / "out").written


def test_a_manifest_cannot_name_files_of_others_to_delete(hub, style, other):
    push(style, REPO)
    hub.state.put(REPO, {"precious.safetensors": b"mine"})
    manifest = json.loads(hub.state.content(REPO, "krona_manifest.json"))
    manifest["files"]["precious.safetensors"] = {"size": 4, "sha256": "0" * 64}
    hub.state.put(REPO, {"krona_manifest.json": json.dumps(manifest).encode()})
    report = push(other, REPO)
    assert not [r for r in report.plan.rows if r.action == "delete"]
    assert hub.state.content(REPO, "precious.safetensors") == b"mine"


def test_escapes_in_cards_and_configs_do_not_reach_the_terminal(hub, style, capsys, tmp_path):
    from krona_hub.cli.main import main

    push(style, REPO)
    evil = json.dumps({"model_type": "krona", "base_model": "a/\x1b]0;owned\x07b"}).encode()
    hub.state.put(REPO, {"config.json": evil, "images/\x1b[2J.png": b"x"})
    assert main(["hub", "info", REPO]) == 0
    shown = capsys.readouterr()
    assert "\x1b" not in shown.out + shown.err and "\x07" not in shown.out


def test_a_cache_full_of_strange_things_can_be_listed(hub, style, client_home, tmp_path):
    push(style, REPO)
    pull(REPO, tmp_path / "out")
    (client_home / "hub" / "models--x--y" / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (client_home / "hub" / "stray").write_text("x")
    assert [c.repo for c in cached()] == [REPO]


@pytest.mark.parametrize("name", ["con.safetensors", "x" * 200 + ".safetensors", "a/b/c/d/e.safetensors"])
def test_an_adapter_whose_name_is_none_that_krona_writes_is_told_as_such(name, hub):
    hub.state.create("ben/odd", files={name: b"x"})
    with pytest.raises(NotFoundError, match="is not a safe file name") as told:
        pull("ben/odd")
    assert "rename" in told.value.fix


def test_a_repository_without_files_has_no_adapter(hub):
    hub.state.create("ben/empty")
    with pytest.raises(NotFoundError, match="has no safetensors file"):
        pull("ben/empty")
