"""Pushing: what arrives, in how many commits, and what a second push does."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

from krona_hub.assets import __file__ as assets
from krona_hub.errors import AuthError, ConflictError, FormatError, LossyError, NotFoundError, ResourceError, UsageError
from krona_hub.hub import pull, push
from tests.hub.loopback.state import User

REPO = "ana/style"


def files(hub, repo=REPO):
    return set(hub.state.repos[repo].head().files) - {".gitattributes"}


def front_matter(hub):
    return yaml.safe_load(hub.state.content(REPO, "README.md").decode().split("---")[1])


def test_one_commit_brings_weights_card_config_and_manifest(hub, style):
    report = push(style, REPO)
    repo = hub.state.repos[REPO]
    assert files(hub) == {"README.md", "krona_adapter.safetensors", "config.json", "krona_manifest.json"}
    assert repo.head().sha == report.commit and len(repo.commits) == 2  # the Hub's own first one, and ours
    assert hub.state.content(REPO, "krona_adapter.safetensors") == style.read_bytes()
    assert json.loads(hub.state.content(REPO, "config.json"))["model_type"] == "krona"
    assert report.verified == 4 and repo.private


def test_what_is_pulled_is_what_was_pushed_bit_for_bit(hub, style, tmp_path):
    push(style, REPO)
    report = pull(REPO, tmp_path / "out")
    assert (tmp_path / "out/krona_adapter.safetensors").read_bytes() == style.read_bytes()
    assert report.native and set(report.files) == files(hub)
    assert report.sha256 == hashlib.sha256(style.read_bytes()).hexdigest()


def test_the_same_again_commits_nothing_and_sends_nothing(hub, style, pictures):
    push(style, REPO, with_lora=True, with_lokr=True, images=pictures)
    head = hub.state.repos[REPO].head()
    hub.log.clear()
    report = push(style, REPO, with_lora=True, with_lokr=True, images=pictures)
    assert report.up_to_date and report.commit is None and hub.state.repos[REPO].head() is head
    assert not hub.writes


def test_a_dry_run_sends_no_write_request(hub, style):
    report = push(style, REPO, dry_run=True)
    assert {r.action for r in report.plan.rows} == {"add"} and report.commit is None
    assert not hub.writes and not hub.state.repos


def test_an_adapter_of_another_format_names_the_file_that_it_was(hub, tmp_path):
    source = Path(assets).parent / "demo_lokr.safetensors"
    push(source, REPO)
    told = json.loads(hub.state.content(REPO, "krona_manifest.json"))["provenance"]
    assert told["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert told["source_format"] == "lycoris-lokr" and told["created_by"].startswith("krona_hub ")


def test_an_export_that_cannot_be_is_refused_in_words_of_a_push(hub, style, tmp_path):
    from krona_hub import convert

    convert(
        Path(assets).parent / "demo_lora.safetensors", tmp_path / "many.safetensors",
        to="krona", shape="64x4", terms=2, allow_loss=True,
    )  # fmt: skip
    for options, words in (({"with_lora": 1}, "--with-lora=2"), ({"with_lokr": True}, "--with-lokr")):
        with pytest.raises(LossyError, match=r"pytorch_lora_weights|lycoris_lokr") as told:
            push(tmp_path / "many.safetensors", REPO, **options)
        assert words in told.value.fix and "--to" not in told.value.fix and "--allow" not in told.value.fix
    assert not hub.writes


def test_a_plan_that_is_declined_sends_nothing(hub, style):
    seen = []
    report = push(style, REPO, confirm=lambda plan: seen.append(plan))
    assert seen and report.commit is None and not hub.writes


def test_an_update_sends_only_what_changed(hub, style, other):
    push(style, REPO)
    hub.log.clear()
    report = push(other, REPO)
    assert {r.file: r.action for r in report.plan.rows} == {
        "README.md": "update", "krona_adapter.safetensors": "update", "krona_manifest.json": "update",
        "config.json": "same",
    }  # fmt: skip
    assert len(hub.asked("^PUT /lfs")) == 1
    assert pull(REPO, dry_run=True).sha256 == hashlib.sha256(other.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """An adapter of 24 MB."""
    import torch

    from krona_hub.adapters.adapter import Adapter, LayerDelta
    from krona_hub.formats.writing.writer import write
    from krona_hub.kron.terms import as_lora

    random = torch.Generator().manual_seed(0)
    layers = {
        f"unet.block{n}.attn.to_q": LayerDelta(
            (as_lora(torch.randn(1280, 88, generator=random), torch.randn(88, 2048, generator=random)),), (1280, 2048)
        )
        for n in range(20)
    }
    write(Adapter(layers), tmp_path_factory.mktemp("large") / "large.safetensors")
    return tmp_path_factory.getbasetemp() / "large0" / "large.safetensors"


def test_a_large_file_goes_in_parts_of_ten_megabytes_and_a_part_that_fails_goes_again(hub, large, tmp_path):
    hub.multipart = 10_000_000
    hub.refuse("^PUT /parts/.*/2$", 500)
    push(large, REPO, base_model="ana/base")
    assert len(hub.asked("^PUT /parts/")) == 3 + 1 and len(hub.asked("^POST /complete/")) == 1
    pull(REPO, tmp_path / "out")
    assert (tmp_path / "out/krona_adapter.safetensors").read_bytes() == large.read_bytes()
    assert not [r for r in hub.log if r.origin == "cdn" and "authorization" in r.headers]


def test_exports_are_there_and_tagged_only_while_they_are_true(hub, style, other):
    push(style, REPO, with_lora=True, with_lokr=True)
    assert {"pytorch_lora_weights.safetensors", "lycoris_lokr.safetensors"} <= files(hub)
    assert front_matter(hub)["library_name"] == "diffusers" and "lora" in front_matter(hub)["tags"]

    push(style, REPO)  # the same weights: the exports are still true, and stay
    assert "pytorch_lora_weights.safetensors" in files(hub) and "lora" in front_matter(hub)["tags"]

    report = push(other, REPO)  # other weights: they would be a lie
    assert {r.file for r in report.plan.rows if r.action == "delete"} == {
        "pytorch_lora_weights.safetensors", "lycoris_lokr.safetensors",
    }  # fmt: skip
    assert "pytorch_lora_weights.safetensors" not in files(hub)
    assert front_matter(hub)["library_name"] == "krona-hub" and "lora" not in front_matter(hub)["tags"]


def test_a_rank_makes_a_lora_of_that_rank_with_its_error_in_the_card(hub, style):
    push(style, REPO, with_lora=16)
    export = json.loads(hub.state.content(REPO, "krona_manifest.json"))["exports"][0]
    assert export["words"] == "LoRA of rank 16" and 0.01 < export["relative_error"] < 1
    assert "LoRA of rank 16" in hub.state.content(REPO, "README.md").decode()


def test_a_file_of_another_format_is_pushed_natively_with_the_same_deltas(hub, style, tmp_path):
    from pathlib import Path

    from krona_hub.assets import __file__ as assets
    from krona_hub.verification import verify

    lora = Path(assets).parent / "demo_lora.safetensors"
    push(lora, REPO)
    pull(REPO, tmp_path / "out")
    assert verify(tmp_path / "out/krona_adapter.safetensors", lora).same


def test_a_tag_names_the_commit_and_is_never_moved(hub, style, other):
    first = push(style, REPO, tag="v1")
    assert hub.state.repos[REPO].tags == {"v1": first.commit}
    assert push(style, REPO, tag="v1").up_to_date
    with pytest.raises(ConflictError, match="already has a tag v1"):
        push(other, REPO, tag="v1")
    assert hub.state.repos[REPO].head().sha == first.commit
    assert push(style, REPO, tag="same").tag == "same"


def test_a_branch_is_made_where_there_is_none(hub, style, other):
    push(style, REPO)
    main = hub.state.repos[REPO].head().sha
    report = push(other, REPO, revision="stronger")
    repo = hub.state.repos[REPO]
    assert repo.head("main").sha == main and repo.head("stronger").sha == report.commit
    assert repo.head("stronger").parent == main


def test_a_pull_request_leaves_the_branch_alone(hub, style, other, monkeypatch):
    push(style, REPO, private=False)
    main = hub.state.repos[REPO].head().sha
    monkeypatch.setenv("HF_TOKEN", "hf_other")  # who may read may propose
    report = push(other, REPO, create_pr=True)
    assert report.pull_request.endswith("/discussions/1") and hub.state.repos[REPO].head().sha == main
    assert pull(f"{REPO}@refs/pr/1", dry_run=True).commit == report.commit


def test_a_pull_request_has_no_commit_of_the_branch_to_tag(hub, style):
    with pytest.raises(UsageError, match="needs a commit on the branch, and a pull request has none yet"):
        push(style, REPO, create_pr=True, tag="v1")
    assert not hub.log


def test_public_is_public_only_when_asked_for(hub, style):
    push(style, REPO, private=False)
    assert not hub.state.repos[REPO].private


def test_a_repository_that_is_there_stays_as_public_as_it_is_and_that_is_said(hub, style, other):
    push(style, REPO)
    report = push(other, REPO, private=False)
    assert hub.state.repos[REPO].private
    assert "ana/style exists and stays private; change that in its settings on the Hub." in report.notes


def test_pictures_that_the_owner_changed_on_the_web_are_no_reason_to_refuse(hub, style, other, pictures, tmp_path):
    push(style, REPO, images=pictures)
    data = hub.state.content(REPO, "images/01-a-cat.png")
    hub.state.put(REPO, {"images/extra.png": data, "images/02-dog.png": data})
    push(other, REPO)
    assert "images/extra.png" in pull(REPO, tmp_path / "out").files
    assert (tmp_path / "out/images/02-dog.png").read_bytes() == data


def test_pictures_become_a_gallery(hub, style, pictures):
    push(style, REPO, images=pictures)
    assert {"images/01-a-cat.png", "images/02-dog.png"} <= files(hub)
    assert front_matter(hub)["widget"][1] == {"text": "a dog | on <b>grass</b>", "output": {"url": "images/02-dog.png"}}
    push(style, REPO)
    assert "images/02-dog.png" in files(hub) and "widget" in front_matter(hub)


@pytest.mark.parametrize(
    ("prepare", "error"),
    [
        (lambda d: [(d / f"{i}.png").write_bytes(b"\x89PNG") for i in range(13)], ResourceError),
        (lambda d: (d / "big.png").write_bytes(b"\x89PNG" + bytes(1_000_001)), ResourceError),
        (lambda d: (d / "no.png").write_bytes(b"<html>"), FormatError),
        (lambda d: [(d / "x.png").write_bytes(b"\x89PNG"), (d / "x.txt").write_bytes(b"caf\xe9")], FormatError),
        (lambda d: (d / "words.txt").write_text("no picture"), NotFoundError),
    ],
)
def test_pictures_are_few_small_and_pictures(prepare, error, hub, style, tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    prepare(folder)
    with pytest.raises(error):
        push(style, REPO, images=folder)
    assert not hub.log


def test_somebody_elses_model_is_not_overwritten_unasked(hub, style):
    hub.state.create(REPO, files={"model.safetensors": b"theirs", "config.json": b'{"model_type": "llama"}'})
    with pytest.raises(ConflictError, match=r"contains other files, such as model\.safetensors"):
        push(style, REPO)
    assert not hub.writes
    push(style, REPO, force=True)
    assert hub.state.content(REPO, "model.safetensors") == b"theirs"


def test_an_adapter_of_another_base_is_something_else(hub, style):
    push(style, REPO)
    with pytest.raises(ConflictError, match="this one is for else/where"):
        push(style, REPO, base_model="else/where")


def test_a_repository_that_is_empty_or_has_a_card_only_is_free(hub, style):
    hub.state.create(REPO, files={"README.md": b"---\nlicense: mit\n---\n\n# Mine\n\nSoon."})
    push(style, REPO)
    card = hub.state.content(REPO, "README.md").decode()
    assert "# Mine\n\nSoon." in card and "license: mit" in card and "krona:begin about" in card


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("hf_reader", "does not permit this operation"),
        ("hf_wrong", "does not accept the token"),
        ("hf_other", "does not permit this operation"),
    ],
)
def test_without_the_right_token_nothing_is_sent(token, message, hub, style, monkeypatch):
    hub.state.create(REPO)
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(AuthError, match=message):
        push(style, REPO)
    assert not hub.writes


def test_without_any_token_the_fix_says_how_to_log_in(hub, style, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AuthError) as told:
        push(style, REPO)
    assert "hf auth login" in told.value.fix and not hub.writes


def test_a_namespace_of_others_is_refused(hub, style):
    for dry_run in (True, False):
        with pytest.raises(AuthError, match="ana cannot create a repository in ben") as told:
            push(style, "ben/mine", dry_run=dry_run)
        assert "ana/mine" in told.value.fix and not hub.writes


def test_a_token_that_only_reads_is_told_before_there_is_a_repository(hub, style, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(AuthError, match="the token is read-only"):
        push(style, REPO, dry_run=True)


def test_an_organisation_that_one_belongs_to_is_no_namespace_of_others(hub, style):
    hub.state.users["hf_owner"] = User("ana", orgs=("Studio",))
    assert push(style, "studio/style", dry_run=True).plan.is_new


def test_a_token_that_may_hide_organisations_is_left_to_the_hub(hub, style):
    hub.state.users["hf_owner"] = User("ana", role="fineGrained")
    assert push(style, "studio/style", dry_run=True).plan.is_new


@pytest.mark.parametrize("repo", ["style", "a/b/c", "../x/y", "ana/..", "ana/st yle", "", "-a/b"])
def test_names_that_are_no_repository_are_told_at_once(repo, hub, style):
    with pytest.raises(UsageError, match="Invalid repository name"):
        push(style, repo)
    assert not hub.log


@pytest.mark.parametrize("name", ["a b", "", "../x", "v1..v2", "-v", "v1:", "x.lock", "a//b", "v1/"])
def test_names_that_are_no_tag_or_branch_are_told_at_once(name, hub, style):
    for what in ("tag", "revision"):
        with pytest.raises(UsageError, match=r"Invalid (tag|branch) name"):
            push(style, REPO, **{what: name})
    assert not hub.log


@pytest.mark.parametrize("base", ["/home/ana/sd15", "./sd15", "sd15", "a/b/c"])
def test_a_base_is_named_as_others_find_it(base, hub, style):
    with pytest.raises(UsageError, match="not a model on the Hub"):
        push(style, REPO, base_model=base)
    assert not hub.log


def test_a_broken_file_is_not_pushed(hub, style, tmp_path):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(style.read_bytes()[:-7])
    with pytest.raises(FormatError):
        push(broken, REPO)
    assert not hub.log


def test_files_in_git_ignore_are_sent_all_the_same(hub, style):
    """The client drops ignored files without a word; ours are looked for afterwards."""
    hub.state.create(REPO, files={".gitignore": b"*.safetensors\n"})
    report = push(style, REPO)
    assert report.verified == 4 and "krona_adapter.safetensors" in files(hub)


def test_no_token_leaves_for_another_origin_or_into_a_file(hub, style, tmp_path):
    push(style, REPO, with_lora=True)
    pull(REPO, tmp_path / "out")
    other_origin = [r for r in hub.log if r.origin == "cdn"]
    assert {r.method for r in other_origin} == {"PUT", "GET"}
    assert not [r for r in other_origin if "authorization" in r.headers]
    assert all(b"hf_owner" not in p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file())


def test_the_examples_in_the_docstrings_run(hub, style, tmp_path, monkeypatch):
    """They need a Hub, so doctest skips them: here each runs as it stands, and pull downloads what push sent."""
    import doctest

    import krona_hub

    monkeypatch.chdir(tmp_path)
    (tmp_path / "krona.safetensors").write_bytes(style.read_bytes())
    for name in ("push", "pull"):
        example = doctest.DocTestFinder().find(getattr(krona_hub, name), name, globs={})[0].examples
        assert len(example) == 2 and "+SKIP" in example[1].source
        exec("".join(e.source for e in example), {})
    assert (tmp_path / "style" / "krona_adapter.safetensors").read_bytes() == style.read_bytes()
