"""Push and pull of a 200 MB adapter through a hub on this machine, against the bare client with the same bytes.

The hub runs in a process of its own, as a real one does on another machine; the ratio is taken in one run. The bare
client is `create_commit` of the one file, and `hf_hub_download` of it: neither checks what it sends or gets.

    python -m benchmarks.bench_hub
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import torch

from benchmarks.common import peak_memory, report

ROUNDS = 3
LAYERS = 170  # of 1280x2048 with rank 88: about 200 MB in float32
SERVER = """
import sys
from tests.hub.loopback.server import Loopback
with Loopback() as hub:
    print(hub.url, flush=True)
    sys.stdin.read()
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        server = subprocess.Popen(
            [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        os.environ |= {
            "HF_ENDPOINT": server.stdout.readline().strip(), "HF_TOKEN": "hf_owner", "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(folder / "hf"),
        }  # fmt: skip
        try:
            measure(folder)
        finally:
            server.stdin.close()
            server.wait(10)


def measure(folder: Path) -> None:
    from huggingface_hub import CommitOperationAdd, HfApi

    from krona_hub.hub import info, pull, push

    times: dict[str, list[float]] = {"push": [], "bare push": [], "pull": [], "bare pull": []}
    api = HfApi()
    memory = 0.0
    for n in range(ROUNDS):  # another file every time: the hub takes no bytes twice
        path = made(folder / f"{n}.safetensors", n)
        twin = made(folder / f"{n}-twin.safetensors", n + 1000)
        memory = memory or peak_memory()
        api.create_repo(f"ana/bare{n}")
        operation = CommitOperationAdd("krona_adapter.safetensors", str(twin))
        bare = seconds(lambda n=n, o=operation: api.create_commit(f"ana/bare{n}", [o], commit_message="bare"))
        times["bare push"].append(bare)
        times["push"].append(seconds(lambda n=n, path=path: push(path, f"ana/style{n}", base_model="ana/base")))
        times["bare pull"].append(seconds(lambda n=n: api.hf_hub_download(f"ana/bare{n}", "krona_adapter.safetensors")))
        times["pull"].append(seconds(lambda n=n: pull(f"ana/style{n}", folder / f"out{n}")))
    size = path.stat().st_size
    best = {name: min(values) for name, values in times.items()}
    about = seconds(lambda: info("ana/style0"))
    report(
        "hub",
        {
            "megabytes": round(size / 1e6, 1),
            "seconds": {name: round(value, 2) for name, value in best.items()},
            "push ratio (at most 1.3)": round(best["push"] / best["bare push"], 2),
            "pull ratio (at most 1.3)": round(best["pull"] / best["bare pull"], 2),
            "memory more than before (GB)": round(peak_memory() - memory, 3),
            "info seconds": round(about, 3),
        },
    )


def seconds(work) -> float:  # type: ignore[no-untyped-def]
    start = perf_counter()
    work()
    return perf_counter() - start


def made(path: Path, seed: int) -> Path:
    """A native adapter of about 200 MB, of random numbers."""
    from krona_hub.adapter import Adapter, LayerDelta
    from krona_hub.checkpoints.writer import write_tensors
    from krona_hub.kron.terms import as_lora
    from krona_hub.schema.v1 import to_tensors

    random = torch.Generator().manual_seed(seed)
    layers = {}
    for i in range(LAYERS):
        up, down = torch.randn(1280, 88, generator=random), torch.randn(88, 2048, generator=random)
        layers[f"unet.block{i}.attn.to_q"] = LayerDelta((as_lora(up, down),), (1280, 2048))
    write_tensors(path, *to_tensors(Adapter(layers)))
    return path


if __name__ == "__main__":
    main()
