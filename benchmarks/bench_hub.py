"""Benchmark push and pull of a 200 MB adapter through a local hub, against the bare client with the same bytes.

The hub runs in a separate process, as a real one runs on another machine. The bare client calls `create_commit` and
`hf_hub_download` for the single file; neither verifies what it transfers. Both alternate in going first, and the ratio
is that of their medians. Memory is the additional memory of a separate process for a push or pull, for two sizes: if
the larger file needs no more, no file is ever held in memory completely.

    python -m benchmarks.bench_hub
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from benchmarks.common import peak_memory, report

ROUNDS = 7
LAYERS = 170  # layers of 1280x2048 with rank 88: about 200 MB in float32
SIZES = (LAYERS, 3 * LAYERS)  # layers of the files for the memory measurement
VARIANTS = ("push", "bare push", "pull", "bare pull")
FILE = "krona_adapter.safetensors"
SERVER = """
import sys
from tests.hub.loopback.server import Loopback
with Loopback() as hub:
    print(hub.url, flush=True)
    for line in sys.stdin:
        hub.state.lfs.clear()  # forget the files of earlier rounds
"""
MEMORY = """
import sys
from benchmarks.bench_hub import memory_of
print(memory_of(*sys.argv[1:]))
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name, loopback(Path(name)) as forget:
        times = measure(Path(name), forget)
        memory = {variant: [needed_memory(Path(name), variant, size, forget) for size in SIZES] for variant in VARIANTS}
    medians = {variant: statistics.median(values) for variant, values in times.items()}
    ratios = [(variant, f"{variant} ratio") for variant in ("push", "pull")]
    figures = {
        "megabytes": round(LAYERS * 88 * (1280 + 2048) * 4 / 1e6, 1),
        "rounds": ROUNDS,
        "seconds, median": {variant: round(value, 3) for variant, value in medians.items()},
        "seconds, best": {variant: round(min(values), 3) for variant, values in times.items()},
        **{
            f"{name} (at most 1.3)": round(medians[variant] / medians[f"bare {variant}"], 2) for variant, name in ratios
        },
        **{f"{name}, best": round(min(times[variant]) / min(times[f"bare {variant}"]), 2) for variant, name in ratios},
        "MB more in memory than for 1 MB, with 200 MB and with 600 MB": memory,
    }
    report("hub", figures)


@contextmanager
def loopback(folder: Path) -> Iterator[Callable[[], None]]:
    """Start the hub in a separate process and configure the client; yield a function that clears all large files."""
    server = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    os.environ |= {
        "HF_ENDPOINT": server.stdout.readline().strip(), "HF_TOKEN": "hf_owner", "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(folder / "hf"),
    }  # fmt: skip

    def forget() -> None:
        shutil.rmtree(folder / "hf", ignore_errors=True)
        server.stdin.write("\n")
        server.stdin.flush()

    try:
        yield forget
    finally:
        server.stdin.close()
        server.wait(10)


def measure(folder: Path, forget: Callable[[], None]) -> dict[str, list[float]]:
    """Return the seconds of every round, each with empty caches and new bytes that the hub does not have."""
    times: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    work = write_adapter(folder / "work.safetensors", LAYERS)
    for n in range(ROUNDS):
        for kind in ("push", "pull"):
            for variant in (kind, f"bare {kind}")[:: 1 if n % 2 else -1]:
                if kind == "push":
                    stamp(work, 2 * n + variant.startswith("bare"))
                times[variant].append(seconds(lambda variant=variant, n=n: run(variant, work, f"{n}", folder / "out")))
        shutil.rmtree(folder / "out")
        forget()
    return times


def run(variant: str, path: Path, number: str, out: Path) -> None:
    """Run one push or pull with krona or with the bare client."""
    from huggingface_hub import CommitOperationAdd, HfApi

    from krona_hub.hub import pull, push

    if variant == "push":
        push(path, f"ana/style{number}", base_model="ana/base")
    elif variant == "pull":
        pull(f"ana/style{number}", out)
    elif variant == "bare push":
        HfApi().create_repo(f"ana/bare{number}")
        HfApi().create_commit(f"ana/bare{number}", [CommitOperationAdd(FILE, str(path))], commit_message="bare")
    else:
        HfApi().hf_hub_download(f"ana/bare{number}", FILE)


def needed_memory(folder: Path, variant: str, layers: int, forget: Callable[[], None]) -> int:
    """Return the MB that a process needs in addition to those for the same operation with a small file."""
    files = {
        f"{variant}-{layers}-{n}".replace(" ", "-"): write_adapter(folder / f"{n}.safetensors", n) for n in (1, layers)
    }
    if variant.endswith("pull"):  # there must be something to pull
        for number, path in files.items():
            run(variant.replace("pull", "push"), path, number, folder)
        shutil.rmtree(folder / "hf", ignore_errors=True)
    arguments = [variant, *(text for pair in files.items() for text in map(str, pair))]
    done = subprocess.run([sys.executable, "-c", MEMORY, *arguments], capture_output=True, text=True, check=True)
    forget()
    return int(done.stdout)


def memory_of(variant: str, *files: str) -> int:
    """Return the additional MB for the second file; run by `needed_memory` in a separate process."""
    held = []
    for number, path in zip(files[::2], files[1::2], strict=True):
        run(variant, Path(path), number, Path(path).parent / number)
        held.append(peak_memory())
    return round((held[-1] - held[0]) * 1000)


def stamp(path: Path, number: int) -> None:
    """Change the last values of a file; they stay finite."""
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(number.to_bytes(2, "little") * 4)


def seconds(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def write_adapter(path: Path, layers: int) -> Path:
    """Write a native adapter with random values, about 1.2 MB per layer."""
    import torch

    from krona_hub.adapters.adapter import Adapter, LayerDelta
    from krona_hub.checkpoints.writer import write_tensors
    from krona_hub.kron.terms import as_lora
    from krona_hub.schema.native_tensors import to_tensors

    if path.exists():
        return path
    random = torch.Generator().manual_seed(layers)
    up, down = torch.randn(1280, 88, generator=random), torch.randn(88, 2048, generator=random)
    deltas = {f"unet.block{i}.attn.to_q": LayerDelta((as_lora(up + i, down),), (1280, 2048)) for i in range(layers)}
    write_tensors(path, *to_tensors(Adapter(deltas)))
    return path


if __name__ == "__main__":
    main()
