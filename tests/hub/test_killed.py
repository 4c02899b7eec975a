"""SIGKILL at each phase of a push and of a pull: what was half done is not seen, and running it again works."""

import os
import signal
import subprocess
import sys

import pytest

from krona_hub.hub import pull, push
from tests.hub.loopback.server import Answer

REPO = "ana/style"
PUSH = "from krona_hub.hub import push; import sys; push(sys.argv[1], 'ana/style')"
PULL = "from krona_hub.hub import pull; import sys; pull('ana/style', sys.argv[1])"


def run_until(hub, pattern, code, argument, *, after_work=False):
    """Run a process that is killed at the first request that matches."""
    started = []

    def kill(*_):
        os.kill(started[0].pid, signal.SIGKILL)
        started[0].wait(30)
        return Answer(cut=-1)

    if after_work:
        hub.fault(pattern, after=lambda answer: kill() and None)
    else:
        hub.fault(pattern, before=kill)
    process = subprocess.Popen([sys.executable, "-c", code, str(argument)], stderr=subprocess.PIPE)
    started.append(process)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    hub.faults.clear()


PHASES = {  # where the push is killed -> uploads of the weights in both runs together
    "before anything": ("whoami", False, 1),
    "before the repository is made": ("repos/create", False, 1),
    "after it": ("repos/create", True, 1),
    "before the upload": ("objects/batch", False, 1),
    "in the upload": ("^PUT /lfs", False, 2),
    "after the upload": ("^PUT /lfs", True, 1),
    "after its check": ("lfs/verify", True, 1),
    "before the commit": ("/commit/", False, 1),
    "after the commit": ("/commit/", True, 1),
    "while it is verified": ("paths-info", False, 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_killed_push_is_run_again_and_sends_nothing_twice(phase, hub, style):
    pattern, after_work, uploads = PHASES[phase]
    run_until(hub, pattern, PUSH, style, after_work=after_work)
    report = push(style, REPO)
    assert report.verified == 4 or report.up_to_date
    assert len(hub.asked("^PUT /lfs")) == uploads
    assert len(hub.state.repos[REPO].commits) == 2
    assert hub.state.content(REPO, "krona_adapter.safetensors") == style.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    "pattern", ["^GET /api/models", "^GET .*resolve.*config.json", "^HEAD .*README", "^GET /blobs/", "^HEAD .*manifest"]
)
def test_a_killed_pull_leaves_nothing_and_is_run_again(pattern, hub, style, tmp_path):
    push(style, REPO)
    run_until(hub, pattern, PULL, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    pull(REPO, tmp_path / "out")
    assert (tmp_path / "out/krona_adapter.safetensors").read_bytes() == style.read_bytes()
    assert [p.name for p in tmp_path.iterdir() if p.name != "hf-home"] == ["out"]


@pytest.mark.slow
def test_a_pull_killed_while_it_copies_leaves_no_half_folder(hub, style, tmp_path):
    push(style, REPO)
    code = PULL.replace(
        "import sys;",
        "import sys, os, signal; from krona_hub.hub.installing import _Copies;"
        "_Copies.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL);",
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "out")], timeout=120)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "out").exists()
    pull(REPO, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir() if p.name != "hf-home"] == ["out"], "leftovers are swept"
