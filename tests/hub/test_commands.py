"""The three commands: what they print, their exit statuses, and that the token is never among it."""

import json

import pytest

from krona_hub.cli.main import main

TOKEN = "hf_owner"


@pytest.fixture
def run(hub, made, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def line(text, status=0):
        got = main([w.replace("STYLE", str(made / "style.safetensors")) for w in text.split()])
        shown = capsys.readouterr()
        assert TOKEN not in shown.out + shown.err
        assert got == status, shown.err
        return shown

    return line


def test_push_pull_and_look(run, hub, tmp_path):
    assert "ana/style, new, public" in run("push STYLE ana/style --public --with-lora --tag v1").out
    assert "already up to date" in run("push STYLE ana/style").out
    assert "12,800" in run("hub info ana/style").out
    assert "ana/style" in run("hub search style --base sd15").out
    assert "ana/style" not in run("hub search style --base sdxl").out
    run("pull ana/style -o here")
    assert (tmp_path / "here/krona_adapter.safetensors").is_file()
    assert "ana/style" in run("hub ls").out


@pytest.mark.parametrize("answer", [True, False])
def test_what_is_asked_is_shown_once_and_with_all_that_has_to_be_said(answer, run, monkeypatch):
    run("push STYLE ana/style")
    seen = []
    monkeypatch.setattr("krona_hub.cli.push_command._is_interactive", lambda: True)
    monkeypatch.setattr("click.confirm", lambda text, **_: seen.append(text) or answer)
    shown = run("push STYLE ana/style --with-lora --public --revision dev --tag v1").out
    assert seen == ["Push to ana/style?"] and shown.count("pytorch_lora_weights.safetensors") == 1
    before = shown[: shown.index("url")]
    assert "exists and stays private" in before and "branch dev will be created" in before and "v1" in before
    assert shown.count("exists and stays private") == 1
    assert ("canceled: nothing was sent." in shown) is not answer


@pytest.mark.parametrize(
    ("line", "words"),
    [("hub ls style", "does not accept a name"), ("hub info ana/style --base sd15", "--base"),
     ("hub ls --base sd15", "--base"), ("hub search --offline", "--offline")],
)  # fmt: skip
def test_what_an_action_does_not_know_is_not_passed_over(line, words, run, hub):
    assert words in run(line, 2).err and not hub.log


def test_a_search_reads_all_pages(run, hub):
    for n in range(5):
        run(f"push STYLE ana/style{n} --public")
    found = json.loads(run("hub search --base sd15 --json").out)
    assert [f["repo"] for f in found] == [f"ana/style{n}" for n in range(5)]
    assert len(json.loads(run("hub search --limit 3 --json").out)) == 3


def test_dry_runs_say_so_and_write_nothing(run, hub, tmp_path):
    assert "Dry run: nothing was sent." in run("push STYLE ana/style --dry-run").err
    assert not hub.writes
    run("push STYLE ana/style")
    assert "Dry run: no weights were downloaded." in run("pull ana/style --dry-run").err
    assert not (tmp_path / "style").exists()


@pytest.mark.parametrize(
    "line",
    ["push STYLE ana/style --dry-run", "push STYLE ana/style", "pull ana/there --dry-run", "pull ana/there",
     "hub info ana/there", "hub search", "hub ls"],
)  # fmt: skip
def test_json_is_one_document(line, run):
    run("push STYLE ana/there")
    shown = run(f"{line} --json")
    assert isinstance(json.loads(shown.out), (dict, list)) and not shown.err


@pytest.mark.parametrize(
    ("line", "status", "code"),
    [
        ("push STYLE style", 2, "KH101"),
        ("push STYLE ana/style --with-lora=big", 2, "KH101"),
        ("push STYLE ana/style --base-model /models/sd", 2, "KH101"),
        ("push nothing.safetensors ana/style", 7, "KH190"),
        ("push STYLE ben/style", 4, "KH220"),
        ("push STYLE ana/taken", 5, "KH170"),
        ("pull ana/nothing", 7, "KH190"),
        ("pull ana/taken/nothing.safetensors", 7, "KH190"),
        ("pull ana/pickle", 2, "KH121"),
        ("pull ana/taken --max-size 1", 8, "KH200"),
        ("pull ana/mine --expect-sha 00", 6, "KH180"),
        ("pull ana/taken --max-size much", 2, "KH101"),
        ("pull nothing.safetensors", 2, "KH101"),
        ("hub info", 2, "KH101"),
        ("hub search --base sdx", 2, "KH161"),
    ],
)
def test_failures_have_their_codes(line, status, code, run, hub):
    hub.state.create("ana/taken", files={"model.safetensors": b"theirs"})
    run("push STYLE ana/mine")
    hub.state.create("ana/pickle", files={"model.ckpt": b"\x80"})
    assert f"error {code}: " in run(line, status).err


def test_a_busy_hub_is_status_nine_and_one_that_is_away_ten(run, hub):
    rule = hub.refuse("^GET /api/models", 429, times=99, headers={"ratelimit": '"api";r=0;t=290'})
    assert "Wait 290 seconds" in run("pull ana/style", 9).err and rule.seen
    hub.stop()
    run("pull ana/style", 10)
    run("push STYLE ana/style", 10)


@pytest.mark.parametrize("line", ["pull ana/style -o again", "inspect ana/style", "validate ana/style@main"])
def test_that_a_copy_serves_while_the_hub_is_down_is_said_aloud(line, run, hub, tmp_path):
    run("push STYLE ana/style")
    run("pull ana/style -o here")
    commit = hub.state.repos["ana/style"].head().sha
    hub.refuse("^GET /api/models", 503, times=99)
    told = f"Using the cached copy {commit[:7]} of ana/style (the Hub does not respond)."
    assert told in run(line).err
    assert not run(f"{line}{'2' if line.startswith('pull') else ''} --json").err


def test_offline_a_push_is_refused_at_once_and_a_dry_run_shows_the_files(run, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    run("push STYLE ana/style", 10)
    assert "krona_adapter.safetensors" in run("push STYLE ana/style --dry-run").out
    assert not hub.log


def test_the_token_is_in_no_log_of_the_client_and_in_no_error(run, hub, caplog):
    caplog.set_level("DEBUG")
    run("push STYLE ana/style")
    hub.refuse("/commit/", 403, times=9)
    hub.state.put("ana/style", {"README.md": b"# other"})
    run("push STYLE ana/style", 4)
    assert TOKEN not in caplog.text
