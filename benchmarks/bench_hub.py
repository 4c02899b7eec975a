"""Push and pull of a 200 MB adapter through a hub on this machine, against the bare client with the same bytes.

The hub runs in a process of its own, as a real one does on another machine. The bare client is `create_commit` of the
one file, and `hf_hub_download` of it: neither checks what it sends or gets. Both take turns at going first, and the
ratio is that of their medians. Memory is what a process of its own needs more for a push or pull than it held before,
for two sizes: where the larger file needs no more, no file is ever held whole.

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
LAYERS = 170  # of 1280x2048 with rank 88: about 200 MB in float32
SIZES = (LAYERS, 3 * LAYERS)  # layers of the files that memory is measured with
WAYS = ("push", "bare push", "pull", "bare pull")
FILE = "krona_adapter.safetensors"
SERVER = """
import sys
from tests.hub.loopback.server import Loopback
with Loopback() as hub:
    print(hub.url, flush=True)
    for line in sys.stdin:
        hub.state.lfs.clear()  # what earlier rounds have sent
"""
MEMORY = """
import sys
from benchmarks.bench_hub import memory_of
print(memory_of(*sys.argv[1:]))
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name, loopback(Path(name)) as forget:
        times = measure(Path(name), forget)
        memory = {way: [needed(Path(name), way, size, forget) for size in SIZES] for way in WAYS}
    middle = {way: statistics.median(values) for way, values in times.items()}
    both = [(way, f"{way} ratio") for way in ("push", "pull")]
    figures = {
        "megabytes": round(LAYERS * 88 * (1280 + 2048) * 4 / 1e6, 1),
        "rounds": ROUNDS,
        "seconds, median": {way: round(value, 3) for way, value in middle.items()},
        "seconds, best": {way: round(min(values), 3) for way, values in times.items()},
        **{f"{name} (at most 1.3)": round(middle[way] / middle[f"bare {way}"], 2) for way, name in both},
        **{f"{name}, best": round(min(times[way]) / min(times[f"bare {way}"]), 2) for way, name in both},
        "MB more in memory than for 1 MB, with 200 MB and with 600 MB": memory,
    }
    report("hub", figures)


@contextmanager
def loopback(folder: Path) -> Iterator[Callable[[], None]]:
    """The hub in its own process, and this client's settings for it; gives what makes it forget all large files."""
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
    """Seconds of every round. Each has bytes of its own, since a hub takes none twice, and starts with empty caches."""
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    work = made(folder / "work.safetensors", LAYERS)
    for n in range(ROUNDS):
        for kind in ("push", "pull"):
            for way in (kind, f"bare {kind}")[:: 1 if n % 2 else -1]:
                if kind == "push":
                    stamp(work, 2 * n + way.startswith("bare"))
                times[way].append(seconds(lambda way=way, n=n: run(way, work, f"{n}", folder / "out")))
        shutil.rmtree(folder / "out")
        forget()
    return times


def run(way: str, path: Path, number: str, out: Path) -> None:
    """One push or pull, by krona or by the bare client."""
    from huggingface_hub import CommitOperationAdd, HfApi

    from krona_hub.hub import pull, push

    if way == "push":
        push(path, f"ana/style{number}", base_model="ana/base")
    elif way == "pull":
        pull(f"ana/style{number}", out)
    elif way == "bare push":
        HfApi().create_repo(f"ana/bare{number}")
        HfApi().create_commit(f"ana/bare{number}", [CommitOperationAdd(FILE, str(path))], commit_message="bare")
    else:
        HfApi().hf_hub_download(f"ana/bare{number}", FILE)


def needed(folder: Path, way: str, layers: int, forget: Callable[[], None]) -> int:
    """MB that a process needs for it, beyond what it held after doing the same with a small file."""
    files = {f"{way}-{layers}-{n}".replace(" ", "-"): made(folder / f"{n}.safetensors", n) for n in (1, layers)}
    if way.endswith("pull"):  # something has to be there
        for number, path in files.items():
            run(way.replace("pull", "push"), path, number, folder)
        shutil.rmtree(folder / "hf", ignore_errors=True)
    told = [way, *(text for pair in files.items() for text in map(str, pair))]
    done = subprocess.run([sys.executable, "-c", MEMORY, *told], capture_output=True, text=True, check=True)
    forget()
    return int(done.stdout)


def memory_of(way: str, *files: str) -> int:
    """What `needed` runs: MB more for the second file than for the first."""
    held = []
    for number, path in zip(files[::2], files[1::2], strict=True):
        run(way, Path(path), number, Path(path).parent / number)
        held.append(peak_memory())
    return round((held[-1] - held[0]) * 1000)


def stamp(path: Path, number: int) -> None:
    """Other bytes in the last numbers of a file, which stay finite."""
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(number.to_bytes(2, "little") * 4)


def seconds(work: Callable[[], object]) -> float:
    start = perf_counter()
    work()
    return perf_counter() - start


def made(path: Path, layers: int) -> Path:
    """A native adapter of random numbers, of about 1.2 MB per layer."""
    import torch

    from krona_hub.adapters.adapter import Adapter, LayerDelta
    from krona_hub.checkpoints.writer import write_tensors
    from krona_hub.kron.terms import as_lora
    from krona_hub.schema.v1 import to_tensors

    if path.exists():
        return path
    random = torch.Generator().manual_seed(layers)
    up, down = torch.randn(1280, 88, generator=random), torch.randn(88, 2048, generator=random)
    deltas = {f"unet.block{i}.attn.to_q": LayerDelta((as_lora(up + i, down),), (1280, 2048)) for i in range(layers)}
    write_tensors(path, *to_tensors(Adapter(deltas)))
    return path


if __name__ == "__main__":
    main()
