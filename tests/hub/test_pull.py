"""Pulling: ours, those of others, what is refused, and what is said about it."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from krona_hub.assets import __file__ as assets
from krona_hub.errors import (
    AmbiguousError,
    AuthError,
    ConflictError,
    IntegrityError,
    NonFiniteError,
    NotFoundError,
    PickleError,
    ResourceError,
    UsageError,
)
from krona_hub.hub import info, pull, push
from krona_hub.sources import resolve

REPO = "ana/style"
LOKR = (Path(assets).parent / "demo_lokr.safetensors").read_bytes()
LORA = (Path(assets).parent / "demo_lora.safetensors").read_bytes()


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub, style, other):
    first = push(style, REPO, tag="v1").commit
    second = push(other, REPO).commit
    asked = {"": second, "@main": second, "@v1": first, f"@{first}": first}
    assert {end: pull(REPO + end, dry_run=True).commit for end in asked} == asked


def test_one_file_is_taken_alone_and_may_be_named(hub, style, tmp_path):
    push(style, REPO, with_lora=True)
    report = pull(f"hf://{REPO}@main/pytorch_lora_weights.safetensors", tmp_path / "mine.safetensors")
    assert report.files == ("pytorch_lora_weights.safetensors",)
    assert (tmp_path / "mine.safetensors").read_bytes() == hub.state.content(REPO, report.files[0])


def test_a_place_that_ends_with_a_slash_is_a_folder(hub, style, tmp_path):
    push(style, REPO)
    with pytest.raises(NotFoundError, match="does not exist"):
        pull(f"{REPO}/krona_adapter.safetensors", f"{tmp_path}/mine/")
    (tmp_path / "mine").mkdir()
    pull(f"{REPO}/krona_adapter.safetensors", f"{tmp_path}/mine/")
    assert (tmp_path / "mine/krona_adapter.safetensors").is_file()


def test_the_address_of_a_page_is_a_source(hub, style):
    push(style, REPO)
    assert pull(f"https://huggingface.co/{REPO}/tree/main", dry_run=True).repo == REPO
    page = f"https://huggingface.co/{REPO}/blob/main/krona_adapter.safetensors?download=true"
    assert pull(page, dry_run=True).files == ("krona_adapter.safetensors",)


def test_a_dry_run_downloads_no_weights(hub, style, tmp_path):
    push(style, REPO)
    hub.log.clear()
    report = pull(REPO, tmp_path / "out", dry_run=True)
    assert not report.written and not (tmp_path / "out").exists() and report.preview.description.parameters == 12_800
    assert len(hub.log) <= 4 and not hub.asked("^HEAD")


def test_what_is_here_already_is_not_copied_again(hub, style, tmp_path):
    push(style, REPO)
    pull(REPO, tmp_path / "out")
    again = pull(REPO, tmp_path / "out")
    assert "already up to date, file by file." in again.notes
    (tmp_path / "out/config.json").write_text("{}")
    with pytest.raises(ConflictError, match="already exists"):
        pull(REPO, tmp_path / "out")
    pull(REPO, tmp_path / "out", overwrite=True)
    assert json.loads((tmp_path / "out/config.json").read_text())["model_type"] == "krona"


def test_an_edited_copy_does_not_change_the_cache(hub, style, tmp_path):
    push(style, REPO)
    pull(REPO, tmp_path / "out")
    (tmp_path / "out/krona_adapter.safetensors").write_bytes(b"edited")
    pull(REPO, tmp_path / "again")
    assert (tmp_path / "again/krona_adapter.safetensors").read_bytes() == style.read_bytes()


def test_the_sha_that_is_expected_must_be_the_one_that_comes(hub, style, tmp_path):
    push(style, REPO)
    right = hashlib.sha256(style.read_bytes()).hexdigest()
    assert pull(REPO, tmp_path / "a", expect_sha=right.upper()).written
    with pytest.raises(IntegrityError, match="not 0000"):
        pull(REPO, tmp_path / "b", expect_sha="0" * 64)
    assert not (tmp_path / "b").exists()


def test_what_is_here_already_is_checked_like_what_comes(hub, style, tmp_path):
    push(style, REPO)
    pull(REPO, tmp_path / "out")
    with pytest.raises(IntegrityError, match="not 0000"):
        pull(REPO, tmp_path / "out", expect_sha="0" * 64)
    with pytest.raises(IntegrityError, match="has no signature"):
        pull(REPO, tmp_path / "out", verify_key=style)
    hub.state.put(REPO, {"krona_manifest.json": b'{"files": {}}'})
    (tmp_path / "out/krona_manifest.json").write_bytes(b'{"files": {}}')
    with pytest.raises(IntegrityError, match=r"is not listed in krona_manifest\.json"):
        pull(REPO, tmp_path / "out")


def test_numbers_of_what_is_here_already_are_looked_at(hub, tmp_path):
    import torch
    from safetensors.torch import load, save

    tensors = load(LORA)
    tensors[next(k for k in tensors if "lora_up" in k)].fill_(torch.nan)
    hub.state.create("ben/nan", files={"x.safetensors": save(tensors)})
    (tmp_path / "out").mkdir()
    (tmp_path / "out/x.safetensors").write_bytes(save(tensors))
    with pytest.raises(NonFiniteError):
        pull("ben/nan", tmp_path / "out")


def test_a_dry_run_tells_another_sha_too(hub, style, tmp_path):
    push(style, REPO)
    with pytest.raises(IntegrityError, match="not 0000"):
        pull(REPO, tmp_path / "out", expect_sha="0" * 64, dry_run=True)
    with pytest.raises(IntegrityError, match="not 0000"):
        pull(f"{REPO}/config.json", tmp_path / "out", expect_sha="0" * 64)  # a file that the Hub names no sha256 of


def test_a_signature_is_asked_for_before_the_weights_are(hub, style, tmp_path):
    push(style, REPO)
    hub.log.clear()
    with pytest.raises(IntegrityError, match="has no signature"):
        pull(REPO, tmp_path / "out", verify_key=style)
    with pytest.raises(UsageError, match="signature covers the whole repository") as told:
        pull(f"{REPO}/krona_adapter.safetensors", tmp_path / "x", verify_key=style)
    assert f"krona pull {REPO} --verify-key" in told.value.fix
    assert not hub.asked("^HEAD")


def test_weights_that_were_exchanged_after_the_push_do_not_fit_the_manifest(hub, style, other, tmp_path):
    push(style, REPO)
    hub.state.put(REPO, {"krona_adapter.safetensors": other.read_bytes()})
    with pytest.raises(IntegrityError, match=r"does not match krona_manifest\.json"):
        pull(REPO, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_card_that_its_owner_edited_on_the_web_is_no_reason_to_refuse(hub, style, tmp_path):
    push(style, REPO)
    hub.state.put(REPO, {"README.md": b"# Mine"})
    assert pull(REPO, tmp_path / "out").written


# --- repositories of others ------------------------------------------------------------------------------------------


def test_a_foreign_lora_is_recognised_and_offered_to_convert(hub, tmp_path):
    hub.state.create("ben/lora", files={"my lora (v2).safetensors": LORA, "README.md": b"# Hi", "train.py": b"x"})
    report = pull("ben/lora", tmp_path / "out")
    assert not report.native and report.preview.description.format == "kohya-lora"
    assert report.next == f"krona convert '{tmp_path / 'out' / 'my lora (v2).safetensors'}'"
    assert report.skipped == ("train.py",)
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"README.md", "my lora (v2).safetensors"}


def test_a_peft_adapter_comes_with_its_config(hub, tmp_path):
    from krona_hub import convert

    convert(Path(assets).parent / "demo_lora.safetensors", tmp_path / "peft", to="peft-lora")
    names = {"adapter_model.safetensors", "adapter_config.json"}
    hub.state.create("ben/peft", files={name: (tmp_path / "peft" / name).read_bytes() for name in names})
    report = pull("ben/peft", tmp_path / "out")
    assert set(report.files) == names == {p.name for p in (tmp_path / "out").iterdir()}
    assert report.preview.description.format == "peft-lora" and report.next == f"krona convert {tmp_path / 'out'}"
    assert convert(tmp_path / "out", tmp_path / "x.safetensors", exact=True).written
    hub.log.clear()
    assert info("ben/peft").preview.description.parameters == report.preview.description.parameters
    assert len(hub.log) <= 4
    alone = pull("ben/peft@main/adapter_model.safetensors", tmp_path / "alone.safetensors")
    assert alone.next == "krona convert ben/peft@main/adapter_model.safetensors", "alone it says no scale"


def test_several_files_want_a_choice(hub):
    hub.state.create("ben/many", files={"a.safetensors": LORA, "b.safetensors": LORA})
    with pytest.raises(AmbiguousError) as told:
        pull("ben/many")
    assert "ben/many/a.safetensors" in told.value.fix
    assert pull("ben/many/b.safetensors", dry_run=True).files == ("b.safetensors",)


def test_pickles_are_refused_by_name(hub):
    hub.state.create("ben/old", files={"pytorch_lora_weights.bin": b"\x80\x04."})
    for source in ("ben/old", "ben/old/pytorch_lora_weights.bin"):
        with pytest.raises(PickleError):
            pull(source)
    assert not hub.asked("bin$")


def test_a_base_model_is_too_large_to_be_an_adapter(hub, tmp_path):
    hub.state.create("ben/big", files={"x.safetensors": LORA})
    with pytest.raises(ResourceError, match="the limit is 100"):
        pull("ben/big", tmp_path / "out", max_size=100_000)
    assert not hub.asked("/blobs/")


# --- who may see what ------------------------------------------------------------------------------------------------


def test_private_gated_missing_disabled_and_renamed_are_told_apart(hub, style, monkeypatch):
    push(style, REPO)
    hub.state.create("ben/gated", gated=True, files={"x.safetensors": LORA})
    hub.state.create("ben/gone", files={"x.safetensors": LORA}).disabled = True
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    told = {}
    for name, error in (("ana/style", NotFoundError), ("ben/nothing", NotFoundError), ("ben/gone", AuthError)):
        with pytest.raises(error) as caught:
            pull(name)
        told[name] = caught.value
    assert "it is private and the token has no access" in told["ana/style"].cause
    assert "disabled by the Hub" in told["ben/gone"].cause
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    with pytest.raises(AuthError, match="gated: you must accept its terms first"):
        pull("ben/gated")
    with pytest.raises(NotFoundError, match="no such branch, tag or commit"):
        pull(f"{REPO}@v9")
    with pytest.raises(NotFoundError, match=r"has no file nothing\.safetensors"):
        pull(f"{REPO}/nothing.safetensors")
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AuthError, match="you are not logged in"):
        pull(REPO)


def test_a_token_that_was_revoked_is_told_apart_from_a_missing_repository(hub, style, tmp_path, monkeypatch):
    commit = push(style, REPO).commit
    pull(REPO, tmp_path / "first")
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    with pytest.raises(AuthError, match="does not accept the token") as told:
        pull(REPO, tmp_path / "out")
    assert "hf auth login" in told.value.fix and f"copy of commit {commit[:7]}" in told.value.fix
    assert "hf_revoked" not in str(told.value)


def test_a_renamed_repository_is_followed_and_named(hub, style):
    push(style, REPO)
    hub.state.repos["ana/new"] = hub.state.repos.pop(REPO)
    hub.state.repos["ana/new"].name = "ana/new"
    hub.state.renamed[REPO] = "ana/new"
    report = pull(REPO, dry_run=True)
    assert report.repo == "ana/new" and "ana/style was renamed to ana/new." in report.notes


# --- anywhere a file is accepted -------------------------------------------------------------------------------------


def test_a_hub_id_is_accepted_where_a_file_is(hub, style, tmp_path):
    from krona_hub import combine, convert, read
    from krona_hub.verification import verify

    push(style, REPO, with_lora=True, tag="v1")
    assert resolve(f"{REPO}@v1").read_bytes() == style.read_bytes()
    assert len(read(resolve(REPO)).layers) == 24
    mixed = combine([(REPO, 1.0), (style, -0.5)], tmp_path / "half.safetensors")
    assert mixed.written and len(read(tmp_path / "half.safetensors").layers) == 24
    report = convert(REPO, tmp_path / "lokr.safetensors", to="lokr", exact=True)
    assert report.written and verify(REPO, tmp_path / "lokr.safetensors").same


@pytest.mark.parametrize(
    ("source", "name"),
    [("ben/style", "style.krona.safetensors"), ("ben/style@main/my_lokr.safetensors", "my_lokr.krona.safetensors"),
     ("hf://ben/style", "style.krona.safetensors")],
)  # fmt: skip
def test_what_is_made_of_an_id_lies_here_and_not_in_the_cache(source, name, hub, client_home, tmp_path, monkeypatch):
    from krona_hub import convert

    hub.state.create("ben/style", files={"my_lokr.safetensors": LOKR})
    monkeypatch.chdir(tmp_path)
    assert convert(source).out == Path(name) and (tmp_path / name).is_file()
    assert [p.name for p in client_home.rglob("snapshots/*/*")] == ["my_lokr.safetensors"]


def bytes_asked_for(hub):
    """Of files, by ranges; a file that was asked for whole is too much."""
    gets = [r for r in hub.asked("^GET") if "/resolve/" in r.path or "/blobs/" in r.path]
    ends = [tuple(map(int, r.headers["range"].removeprefix("bytes=").split("-"))) for r in gets if r.origin == "cdn"]
    assert all("range" in r.headers for r in gets)
    return sum(end - start + 1 for start, end in ends)


def test_info_takes_four_requests_and_little_more_than_the_header(hub, style):
    push(style, REPO)
    hub.log.clear()
    about = info(REPO)
    assert len(hub.log) <= 4
    assert about.preview.description.parameters == 12_800 and about.base_model.startswith("stable-diffusion-v1-5/")
    assert bytes_asked_for(hub) <= 100_000 + about.preview.description.header.data_start


@pytest.mark.parametrize("size", ["told", "untold", "too small", "too large", "no number"])
def test_a_long_header_takes_no_more_requests_and_is_believed_only_as_far_as_it_is_true(size, hub, tmp_path):
    """Of a native adapter, whose config.json tells how long the header is; anybody may have written that."""
    import torch

    from krona_hub.adapters.adapter import Adapter, LayerDelta
    from krona_hub.checkpoints.header import read_header
    from krona_hub.formats.writing.writer import write
    from krona_hub.kron.terms import as_lora

    layers = {
        f"unet.{'long.' * 20}{n}.to_q": LayerDelta((as_lora(torch.ones(4, 1), torch.ones(1, 4)),), (4, 4))
        for n in range(400)
    }
    write(Adapter(layers), tmp_path / "long.safetensors")
    push(tmp_path / "long.safetensors", REPO, base_model="ana/base")
    start = read_header(tmp_path / "long.safetensors").data_start
    config = json.loads(hub.state.content(REPO, "config.json"))
    assert config["header_size"] == start > 110_000
    lies = {"untold": None, "too small": 1, "too large": 10**12, "no number": "7"}
    if size != "told":
        hub.state.put(REPO, {"config.json": json.dumps(config | {"header_size": lies[size]}).encode()})
    hub.log.clear()
    about = info(REPO)
    assert about.preview.description.parameters == 400 * 8
    assert len(hub.log) <= (4 if size == "told" else 5) and bytes_asked_for(hub) <= start


def test_the_header_of_a_foreign_adapter_is_read_where_the_first_part_of_it_was(hub, tmp_path):
    import numpy as np
    from safetensors.numpy import save

    from krona_hub.checkpoints.header import read_header

    tensors = {f"lora_unet_{'x' * 200}_{i}.lora_up.weight": np.zeros((1, 1), np.float32) for i in range(500)}
    data = save(tensors)
    (tmp_path / "x.safetensors").write_bytes(data)
    hub.state.create("ben/long", files={"x.safetensors": data, "config.json": b"{}"})
    assert info("ben/long").preview.name == "x.safetensors"
    assert len(hub.asked("/blobs/")) == 2 and len(hub.log) == 4
    assert not [r for r in hub.asked("/blobs/") if "authorization" in r.headers]
    assert bytes_asked_for(hub) <= read_header(tmp_path / "x.safetensors").data_start


def test_a_copy_serves_without_the_hub_and_that_is_said_aloud(hub, style, tmp_path, monkeypatch):
    commit = push(style, REPO).commit
    pull(REPO, tmp_path / "first")
    shutil.rmtree(tmp_path / "first")
    hub.log.clear()
    report = pull(REPO, tmp_path / "a", offline=True)
    assert not hub.log and report.notes == (f"Using the cached copy {commit[:7]} of {REPO} (offline).",)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert pull(REPO, tmp_path / "b").written and resolve(REPO).read_bytes() == style.read_bytes()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.stop()
    report = pull(REPO, tmp_path / "c")
    assert report.notes == (f"Using the cached copy {commit[:7]} of {REPO} (the Hub does not respond).",)
    assert (tmp_path / "c/krona_adapter.safetensors").read_bytes() == style.read_bytes()


def test_of_a_copy_nobody_knows_who_may_see_it(hub, style, tmp_path):
    push(style, REPO)
    pull(REPO, tmp_path / "first")
    assert info(REPO).private is True and info(REPO, offline=True).private is None


def test_a_damaged_copy_is_not_used_offline(hub, style, tmp_path):
    push(style, REPO)
    pull(REPO, tmp_path / "first")
    blob = resolve(REPO).resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError, match="differs from the file on the Hub"):
        pull(REPO, tmp_path / "out", offline=True)
    assert pull(REPO, tmp_path / "out").written  # and with the Hub it is repaired


def test_a_repository_that_was_deleted_says_that_a_copy_is_here(hub, style, tmp_path):
    commit = push(style, REPO).commit
    pull(REPO, tmp_path / "first")
    del hub.state.repos[REPO]
    with pytest.raises(NotFoundError) as told:
        pull(REPO, tmp_path / "out")
    assert f"To use the cached copy of commit {commit[:7]}, add --offline." in told.value.fix


def test_nothing_in_the_cache_and_no_hub_is_offline(hub, tmp_path):
    from krona_hub.errors import OfflineError

    hub.stop()
    with pytest.raises(OfflineError):
        pull(REPO, tmp_path / "out")
