"""Several people at once: one wins, the others are told, and nothing is lost."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from krona_hub.errors import ConflictError
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.writer import write
from krona_hub.hub import pull, push

REPO = "ana/style"


def test_of_four_different_pushes_exactly_one_wins(hub, style, tmp_path):
    from dataclasses import replace

    push(style, REPO)
    adapter = read(style)
    ways = []
    for n in range(1, 5):
        layers = {k: replace(d, sums=tuple(s.scaled(1 + n) for s in d.sums)) for k, d in adapter.layers.items()}
        write(replace(adapter, layers=layers), tmp_path / f"{n}.safetensors")
        ways.append(tmp_path / f"{n}.safetensors")
    before = len(hub.state.repos[REPO].commits)

    def attempt(path):
        try:
            return push(path, REPO, confirm=lambda plan: meet()).commit
        except ConflictError as lost:
            return lost

    from threading import Barrier

    barrier = Barrier(4)

    def meet():
        barrier.wait(30)
        return True

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(attempt, ways))
    won = [n for n, r in enumerate(results) if isinstance(r, str)]
    assert len(won) == 1 and len(hub.state.repos[REPO].commits) == before + 1
    assert all("Someone else changed" in r.cause for r in results if not isinstance(r, str))
    assert hub.state.content(REPO, "krona_adapter.safetensors") == ways[won[0]].read_bytes()


def test_the_same_adapter_pushed_four_times_at_once_is_one_commit(hub, style):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: push(style, REPO), range(4)))
    assert len(hub.state.repos[REPO].commits) == 2


def in_between(hub, work):
    """Let somebody else commit just before ours arrives."""

    def before(_):
        work()

    hub.fault("/commit/", before=before)


def test_a_commit_that_touches_other_files_is_built_upon(hub, style, other):
    push(style, REPO)
    in_between(hub, lambda: hub.state.put(REPO, {"notes.txt": b"hers"}))
    report = push(other, REPO)
    repo = hub.state.repos[REPO]
    assert repo.head().sha == report.commit and hub.state.content(REPO, "notes.txt") == b"hers"
    assert len(hub.asked("/commit/")) == 3, "the first push, the stale one and the one on top of hers"


def test_a_card_that_was_edited_in_between_is_not_overwritten(hub, style, other):
    push(style, REPO)
    card = hub.state.content(REPO, "README.md")
    in_between(hub, lambda: hub.state.put(REPO, {"README.md": card + b"\nHer words.\n"}))
    with pytest.raises(ConflictError, match=r"Someone else changed README\.md"):
        push(other, REPO)
    assert b"Her words." in hub.state.content(REPO, "README.md")
    push(other, REPO)  # seen now, and kept
    assert b"Her words." in hub.state.content(REPO, "README.md")


def test_force_plans_again_with_her_words_kept(hub, style, other):
    push(style, REPO)
    card = hub.state.content(REPO, "README.md")
    in_between(hub, lambda: hub.state.put(REPO, {"README.md": card + b"\nHer words.\n"}))
    push(other, REPO, force=True)
    assert b"Her words." in hub.state.content(REPO, "README.md")
    assert hub.state.content(REPO, "krona_adapter.safetensors") == other.read_bytes()


def test_four_pulls_of_one_file_are_one_download(hub, style, tmp_path):
    push(style, REPO)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda n: pull(REPO, tmp_path / str(n)), range(4)))
    whole = [r for r in hub.asked("^GET /blobs/") if "range" not in r.headers]
    assert len(whole) == 1
    assert all((tmp_path / str(n) / "krona_adapter.safetensors").read_bytes() == style.read_bytes() for n in range(4))
