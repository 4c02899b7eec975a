"""The card: true, valid, and never at the cost of the owner's words."""

import json
import re

import pytest
import yaml

from krona_hub.cli.main import main
from krona_hub.errors import ConflictError, FormatError, UsageError
from krona_hub.hub import pull, push
from krona_hub.hub.model_card import LORA_TAGS, split

REPO = "ana/style"


def card(hub):
    return hub.state.content(REPO, "README.md").decode()


def front(hub):
    return split(card(hub))[0]


def edit(hub, old, new):
    text = card(hub)
    assert old in text
    hub.state.put(REPO, {"README.md": text.replace(old, new).encode()})


def test_the_card_is_valid_and_says_what_the_repository_is(hub, style):
    push(style, REPO)
    data = front(hub)
    assert data["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert data["base_model_relation"] == "adapter" and data["library_name"] == "krona-hub"
    assert data["pipeline_tag"] == "text-to-image" and {"krona", "kronecker", "lokr"} <= set(data["tags"])
    assert not set(LORA_TAGS) & set(data["tags"])
    assert hub.asked("validate-yaml")
    assert yaml.safe_load(card(hub).split("---\n")[1]) == data


def test_the_card_says_how_to_load_a_copy_without_a_network(hub, style, tmp_path, monkeypatch):
    push(style, REPO)
    monkeypatch.chdir(tmp_path)
    command, path = re.findall(r"krona (pull .*)\n```|load_into\(pipe, \"(style/.*)\"\)`\.\n", card(hub))
    assert main(command[0].split()) == 0 and (tmp_path / path[1]).read_bytes() == style.read_bytes()


def test_the_digests_and_numbers_in_the_card_are_those_of_the_files(hub, style):
    push(style, REPO, with_lora=True)
    manifest = json.loads(hub.state.content(REPO, "krona_manifest.json"))
    for name in ("krona_adapter.safetensors", "pytorch_lora_weights.safetensors"):
        assert manifest["files"][name]["sha256"] in card(hub)
    assert "| parameters | 12,800 |" in card(hub)


def test_there_is_no_picture_in_a_card_without_pictures(hub, style):
    push(style, REPO)
    assert "![" not in card(hub) and "Gallery" not in card(hub) and "widget" not in front(hub)


@pytest.mark.parametrize(
    ("title", "head"),
    [(None, "# style"), ("Two\nlines <b>", "# Two lines &lt;b>")],
)
def test_a_card_is_headed_by_the_title_of_the_file_or_the_name_of_the_repository(title, head, hub, style, tmp_path):
    from dataclasses import replace

    from krona_hub import read, write

    adapter = read(style)
    named = {"modelspec.title": title} if title else {}
    write(replace(adapter, provenance=replace(adapter.provenance, metadata=named)), tmp_path / "x.safetensors")
    push(tmp_path / "x.safetensors", REPO)
    assert card(hub).split("---\n")[2].strip().splitlines()[0] == head


def test_words_of_the_owner_survive_between_and_around_the_sections(hub, style, other):
    push(style, REPO)
    edit(hub, "<!-- krona:end about -->\n", "<!-- krona:end about -->\n\nMade of *my* pictures.\n")
    edit(hub, "# Krona demo LoKr (generated, not trained)", "# My style")
    push(other, REPO)
    assert "# My style" in card(hub) and "Made of *my* pictures." in card(hub)
    assert card(hub).count("krona:begin about") == 1


@pytest.mark.parametrize("ends", [(b"\n", b"\r\n"), (b"---\n", b"\xef\xbb\xbf---\n")])
def test_a_card_that_was_saved_on_windows_is_made_anew_like_any_other(ends, hub, style, other):
    push(style, REPO)
    edit(hub, "# Krona demo LoKr (generated, not trained)", "# My style")
    hub.state.put(REPO, {"README.md": hub.state.content(REPO, "README.md").replace(*ends, *[1] * (len(ends[0]) > 1))})
    push(other, REPO)
    assert "# My style" in card(hub) and card(hub).count("krona:begin files") == 1
    assert hub.state.repos[REPO].head().files["krona_adapter.safetensors"].sha256 in card(hub)
    assert card(hub).count("license: apache-2.0") == 1 and "\r" not in card(hub)
    assert push(other, REPO).up_to_date


def test_words_inside_a_section_are_krona_s_and_made_anew(hub, style, other):
    push(style, REPO)
    edit(hub, "| parameters | 12,800 |", "| parameters | 7 |")
    push(other, REPO)
    assert "| parameters | 12,800 |" in card(hub)


def test_a_section_that_the_owner_removed_stays_away(hub, style, other):
    push(style, REPO)
    found = re.search(r"<!-- krona:begin loads -->.*?<!-- krona:end loads -->", card(hub), re.DOTALL)
    edit(hub, found[0], "")
    push(other, REPO)
    assert "krona:begin loads" not in card(hub) and "krona:begin files" in card(hub)


@pytest.mark.parametrize("edge", ["begin", "end"])
def test_a_section_that_lost_one_of_its_ends_is_told_and_not_left_as_it_was(edge, hub, style, other):
    push(style, REPO)
    edit(hub, f"<!-- krona:{edge} files -->\n", "")
    before = hub.state.repos[REPO].head()
    with pytest.raises(FormatError, match=f"section files of the card .* its {edge}") as told:
        push(other, REPO)
    assert f"<!-- krona:{edge} files -->" in told.value.fix and hub.state.repos[REPO].head() is before


def test_in_the_front_matter_the_owner_wins_but_for_what_the_repository_is(hub, style, other):
    push(style, REPO)
    edit(hub, "license: apache-2.0", "license: mit\nlanguage: en")
    edit(hub, "base_model_relation: adapter", "base_model_relation: finetune")
    edit(hub, "- krona\n", "- krona\n- anime\n")
    push(other, REPO)
    data = front(hub)
    assert data["license"] == "mit" and data["language"] == "en" and "anime" in data["tags"]
    assert data["base_model_relation"] == "adapter"


def test_front_matter_that_is_no_yaml_is_told_and_not_thrown_away(hub, style):
    push(style, REPO)
    broken = b"---\nlicense: [mit\n---\n\n# Mine\n"
    hub.state.put(REPO, {"README.md": broken})
    with pytest.raises(FormatError, match="not valid YAML"):
        push(style, REPO)
    assert hub.state.content(REPO, "README.md") == broken


def test_no_card_leaves_the_card_alone_and_card_only_the_rest(hub, style, other):
    push(style, REPO, card=False)
    assert "README.md" not in hub.state.repos[REPO].head().files
    push(style, REPO, card_only=True)
    assert "krona:begin about" in card(hub)
    assert hub.state.content(REPO, "krona_adapter.safetensors") == style.read_bytes()


def test_a_card_alone_is_written_only_for_the_weights_that_are_there(hub, style, other, tmp_path):
    with pytest.raises(ConflictError, match="contains no weights"):
        push(style, REPO, card_only=True)
    push(style, REPO)
    edit(hub, "<!-- krona:begin about -->", "Gone.\n\n<!-- krona:begin about -->")
    with pytest.raises(ConflictError, match="contains other weights: the card would describe other"):
        push(other, REPO, card_only=True)
    push(style, REPO, card_only=True, base_model="stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert pull(REPO, tmp_path / "out").written


@pytest.mark.parametrize("more", [{"with_lora": True}, {"with_lokr": True}, {"images": "."}, {"card": False}])
def test_a_card_alone_goes_with_nothing_else(more, hub, style):
    with pytest.raises(UsageError, match="card-only writes only the card"):
        push(style, REPO, card_only=True, **more)
    assert not hub.log


def with_licence(style, folder, licence):
    from dataclasses import replace

    from krona_hub.formats.reading.reader import read
    from krona_hub.formats.writing.writer import write

    adapter = read(style)
    write(replace(adapter, provenance=replace(adapter.provenance, licence=licence)), folder / "licensed.safetensors")
    return folder / "licensed.safetensors"


def test_a_licence_that_the_hub_does_not_know_is_another_one_with_its_name(hub, style, tmp_path):
    push(with_licence(style, tmp_path, "My own terms, v2"), REPO)
    assert front(hub)["license"] == "other" and front(hub)["license_name"] == "my-own-terms-v2"
    assert "The adapter's own license: My own terms, v2." in card(hub)


@pytest.mark.parametrize(
    ("base", "licence"),
    [("stabilityai/stable-diffusion-xl-base-1.0", "openrail++"), ("somebody/a-fine-tune-of-sdxl", None)],
)
def test_the_licence_of_a_base_is_told_only_where_it_is_known(base, licence, hub, style, tmp_path):
    push(with_licence(style, tmp_path, None), REPO, base_model=base)
    assert front(hub).get("license") == licence
    assert ("which its page states" in card(hub)) == (licence is None)


def test_a_card_that_the_hub_refuses_is_told_with_its_reason(hub, style):
    from dataclasses import replace

    body = json.dumps({"errors": [{"message": '"license" must be one of'}], "warnings": []}).encode()
    hub.change("validate-yaml", lambda a: replace(a, status=400, body=body), times=9)
    with pytest.raises(UsageError, match='"license" must be one of'):
        push(style, REPO)
    assert not hub.asked("/commit/")


def test_text_of_the_file_cannot_break_out_of_a_table(hub, style, tmp_path):
    from dataclasses import replace

    from krona_hub.formats.reading.reader import read
    from krona_hub.formats.writing.writer import write

    adapter = read(style)
    evil = "x | <script>\n## Owned <!-- krona:end training -->"
    provenance = replace(adapter.provenance, training={"note": evil}, trigger_words=("a`b|c",))
    write(replace(adapter, provenance=provenance), tmp_path / "evil.safetensors")
    push(tmp_path / "evil.safetensors", REPO)
    assert "<script>" not in card(hub) and "\n## Owned" not in card(hub)
    first = card(hub)
    assert push(tmp_path / "evil.safetensors", REPO).up_to_date and card(hub) == first
