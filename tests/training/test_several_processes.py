"""Training runs in separate processes: two that must equal one, and one that is killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from krona_hub import read
from krona_hub.training.api import train
from krona_hub.training.model.objective import Objective
from krona_hub.training.progress.metrics import read_metrics, series

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent.parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
PATIENCE = 300  # seconds until a hanging process is given up
MARGIN = 4  # two orders of summation differ by the same amount as any other two, but for the luck of single roundings


def command(settings, *more):
    flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "krona_hub.cli", "train", *flags, *more]


def another_order_of_summation(monkeypatch):
    """From now on a batch goes through the model one sample at a time: the same numbers, summed in another order."""
    whole = Objective.loss

    def loss(self, latents, given, step, samples, target=None):
        parts = [
            whole(
                self,
                latents[i : i + 1],
                {name: tensor[i : i + 1] for name, tensor in given.items()},
                step,
                samples[i : i + 1],
                None if target is None else target[i : i + 1],
            )
            for i in range(len(samples))
        ]
        return torch.stack(parts).mean()

    monkeypatch.setattr(Objective, "loss", loss)


def adapter_of(settings, run):
    return read(Path(run) / "adapter.safetensors", base=settings["base"])


def test_two_processes_give_the_result_of_one_at_the_same_global_batch(quick, tmp_path, monkeypatch):
    quick |= {"steps": 20}
    alone = train(quick, batch_size=4, output=str(tmp_path / "one"))
    line = command(quick | {"batch_size": 2}, "--num-processes", "2", "-q")
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    another_order_of_summation(monkeypatch)
    reordered = train(quick, batch_size=4, output=str(tmp_path / "reordered"))
    one, two, other = (adapter_of(quick, run) for run in (alone.run, quick["output"], reordered.run))
    for side in ("right", "left"):  # B began at zero: all of it was learned
        assert differing(one, two, side) <= MARGIN * differing(one, other, side)


def test_accelerate_launches_the_same_training(quick, tmp_path):
    alone = train(quick, output=str(tmp_path / "one"))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]
    line = [*launcher, *command(quick)[1:], "-q"]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert (Path(quick["output"]) / "adapter.safetensors").read_bytes() == alone.adapter.read_bytes()


@pytest.mark.parametrize("kind", ["sd15", "flux"])
def test_a_base_in_pieces_trains_to_the_same_adapter(kind, bases, quick, tmp_path, monkeypatch):
    quick |= {"steps": 6, "base": bases(kind), "validate_every": 3, "held_out": 1, "sample_every": 6}
    quick |= {"sample_steps": 2}
    alone = train(quick, batch_size=2, output=str(tmp_path / "one"))
    flags = command(quick)[3:]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    line = [*launcher, "-m", "tests.training.spread", *flags, "-q"]
    done = subprocess.run(
        line, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    another_order_of_summation(monkeypatch)
    reordered = train(quick, batch_size=2, output=str(tmp_path / "reordered"))
    one, two, other = (adapter_of(quick, run) for run in (alone.run, quick["output"], reordered.run))
    assert differing(one, two, "right") <= MARGIN * differing(one, other, "right")
    validated = [series(read_metrics(Path(run)), "validation_loss") for run in (alone.run, quick["output"])]
    assert [step for step, _ in validated[0]] == [step for step, _ in validated[1]] == [0, 3, 6]
    assert validated[0][-1][1] == pytest.approx(validated[1][-1][1], rel=1e-4)
    assert len(list(Path(quick["output"], "samples").glob("step-*.png"))) == 2


def differing(one, two, side):
    """Relative to all layers together: Adam divides a gradient by its own size, and so makes the rounding of the few
    layers whose gradient is hardly more than rounding as large as what the others learn."""
    pairs = [(getattr(d.sums[0], side), getattr(two[n].sums[0], side)) for n, d in one.layers.items()]
    apart = sum(float((a - b).square().sum()) for a, b in pairs)
    size = sum(float(a.square().sum()) for a, _ in pairs)
    return (apart / size) ** 0.5


def test_a_killed_training_goes_on_to_the_same_bytes(quick, tmp_path):
    quick |= {"steps": 40, "checkpoint_every": 3, "ema": 0.9, "caption_dropout": 0.2}
    whole = train(quick, output=str(tmp_path / "whole")).adapter.read_bytes()
    run, last = Path(quick["output"]), random.Random(os.getpid()).randint(4, 30)
    process = subprocess.Popen(command(quick, "-q"), env=ENVIRONMENT)
    started = time.monotonic()
    while len(read_metrics(run)) < last and process.poll() is None and time.monotonic() - started < PATIENCE:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the training was over before it was killed"
    assert not (run / "adapter.safetensors").exists()
    assert train(resume_from=run).adapter.read_bytes() == whole, f"killed after step {last}"
