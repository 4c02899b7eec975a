"""Benchmark the wall time of `krona --help` and of `krona inspect` with a 100 MB file, for the whole process.

    python benchmarks/bench_startup.py

The same run measures the bare interpreter and `import torch`, which these commands avoid.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from krona_hub.checkpoints.writer import write_tensors

RESULT = Path(__file__).parent / "results" / "startup.json"
LIMITS = {"krona --help": 0.4, "krona inspect (100 MB)": 0.6}  # seconds


def big_lora(path: Path, megabytes: int = 100) -> None:
    """Write a file with the names and sizes of a large SDXL LoRA."""
    import torch

    names = [
        f"lora_unet_down_blocks_{b}_attentions_{a}_transformer_blocks_{t}_{attention}_{to}"
        for b, a in ((1, 0), (1, 1), (2, 0), (2, 1))
        for t in range(10 if b == 2 else 2)
        for attention in ("attn1", "attn2")
        for to in ("to_q", "to_v", "to_out_0")
        if not (attention == "attn2" and to == "to_v")
    ]
    width = {"1": 640, "2": 1280}
    numbers = sum(2 * width[name.split("_")[4]] for name in names)
    rank = -(-megabytes * 1_000_000 // (2 * numbers))
    tensors = {}
    for name in names:
        size = width[name.split("_")[4]]
        tensors[f"{name}.lora_up.weight"] = torch.ones(size, rank, dtype=torch.float16)
        tensors[f"{name}.lora_down.weight"] = torch.ones(rank, size, dtype=torch.float16)
        tensors[f"{name}.alpha"] = torch.tensor(float(rank))
    write_tensors(path, tensors)


def seconds(command: Sequence[str], repeats: int = 7) -> float:
    """Return the median wall time of a process."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> int:
    krona = [sys.executable, "-m", "krona_hub.cli"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "big.safetensors"
        big_lora(file)
        measured = {
            "python -c pass": seconds([sys.executable, "-c", "pass"]),
            "krona --help": seconds([*krona, "--help"]),
            "krona inspect (100 MB)": seconds([*krona, "inspect", str(file)]),
            "import torch": seconds([sys.executable, "-c", "import torch"], repeats=3),
        }
        size = file.stat().st_size
    for name, value in measured.items():
        limit = LIMITS.get(name)
        print(f"{name:24} {value:6.3f} s" + (f"   limit {limit} s" if limit else ""))
    ratio = measured["import torch"] / measured["krona inspect (100 MB)"]
    print(f"Importing torch alone takes {ratio:.1f}× as long as inspecting {size / 1e6:.0f} MB.")
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"seconds": measured, "limits": LIMITS, "file_bytes": size}, indent=2) + "\n")
    return int(any(measured[name] > limit for name, limit in LIMITS.items()))


if __name__ == "__main__":
    sys.exit(main())
