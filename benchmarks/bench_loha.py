"""Benchmark a LoHa of all attention layers of SDXL against a LoRA with a file of the same size.

    python benchmarks/bench_loha.py

Reads, merges and converts LoHas of rank 8 and 32, each in a process of its own, with one thread. Reports CPU time and
the peak of anonymous memory above the start, the quantity that a LoHa multiplies if too many layers are formed at once.
`--share 0.1` uses a tenth of the layers of each size for the conversions, which take minutes otherwise.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from bench_convert import attention_layers
from bench_merge import configuration, write_base
from common import report
from safetensors.torch import save_file
from torch import Tensor

RANKS = (8, 32)
TASK = """
import json, re, sys, threading, time
import torch
from krona_hub import convert, merge, read
torch.set_num_threads(1)
import krona_hub.formats.reading.reader, krona_hub.formats.writing.readback, krona_hub.merging.arithmetic.tiles
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3
first = peak = anonymous()
done = False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.005)
watching = threading.Thread(target=watch, daemon=True)
watching.start()
start = time.process_time()
result = eval(sys.argv[2])
seconds, done = time.process_time() - start, True
watching.join()
print(json.dumps({"seconds": round(seconds, 2), "peak_mb": round(peak - first)}))
"""
READ = "read(sys.argv[1])"
MERGE = "merge('unet', [(sys.argv[1], 1.0)], 'merged', overwrite=True, threads=1)"
CONVERSIONS = {
    "convert to LoKr, default": "convert(sys.argv[1], 'out.safetensors', to='lokr', overwrite=True, allow_loss=True)",
    "convert to LoRA, default": "convert(sys.argv[1], 'out.safetensors', to='lora', overwrite=True)",
    "convert to LoRA of rank 16": "convert(sys.argv[1], 'out.safetensors', to='lora', rank=16, overwrite=True,"
    " allow_loss=True)",
    "convert to LoRA, exact": "convert(sys.argv[1], 'out.safetensors', to='lora', exact=True, overwrite=True)",
    "convert to LoKr 16x16": "convert(sys.argv[1], 'out.safetensors', to='lokr', shape='16x16', overwrite=True,"
    " allow_loss=True)",
}


def chosen(share: float) -> dict[str, tuple[int, int]]:
    """Return layer -> (out, in) of the attention layers, or of a share of each size."""
    return {
        name: size for size, names in attention_layers().items() for name in names[: max(1, round(share * len(names)))]
    }


def write_pair(folder: Path, name: str, layers: Mapping[str, tuple[int, int]], rank: int) -> None:
    """Write a LoHa of that rank, and a LoRA of twice the rank, which has as many parameters."""
    generator = torch.Generator().manual_seed(rank)
    save_file(dict(_loha(layers, rank, generator)), folder / f"{name}-loha.safetensors")
    save_file(dict(_lora(layers, 2 * rank, generator)), folder / f"{name}-lora.safetensors")


def _loha(layers: Mapping[str, tuple[int, int]], rank: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for layer, (out, in_) in layers.items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        for i in (1, 2):
            yield f"{name}.hada_w{i}_a", _random(out, rank, generator)
            yield f"{name}.hada_w{i}_b", _random(rank, in_, generator)
        yield f"{name}.alpha", torch.tensor(rank / 2)


def _lora(layers: Mapping[str, tuple[int, int]], rank: int, generator: torch.Generator) -> Iterator[tuple[str, Tensor]]:
    for layer, (out, in_) in layers.items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        yield f"{name}.lora_up.weight", _random(out, rank, generator)
        yield f"{name}.lora_down.weight", _random(rank, in_, generator)
        yield f"{name}.alpha", torch.tensor(rank / 2)


def _random(p: int, q: int, generator: torch.Generator) -> Tensor:
    """Return numbers whose columns (or rows, of a wide matrix) decay, like those of a trained adapter."""
    decay = 0.8 ** torch.arange(min(p, q))
    values = torch.randn(p, q, generator=generator) * 0.1
    return (values * decay if p > q else decay[:, None] * values).half()


def figures(file: Path, code: str) -> dict[str, float]:
    command = [sys.executable, "-c", TASK, str(file), code]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=file.parent, env=environment, check=False)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1]}  # type: ignore[dict-item]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--share", type=float, default=0.1, help="Share of the layers that conversions use.")
    args = options.parse_args()
    found: dict[str, object] = {"share_of_layers_in_conversions": args.share}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        small = configuration(small=True) | {"transformer_layers_per_block": [1, 1, 1]}
        linear = write_base(folder / "unet", small)
        attention = {path: size for path, size in linear.items() if ".attn" in path}
        for rank in RANKS:
            write_pair(folder, f"r{rank}", chosen(1.0), rank)
            write_pair(folder, f"part{rank}", chosen(args.share), rank)
            write_pair(folder, f"merge{rank}", attention, rank)
            found[f"bytes, rank {rank}"] = (folder / f"r{rank}-loha.safetensors").stat().st_size
            tasks = {"read": (READ, "r"), "merge": (MERGE, "merge")} | {k: (c, "part") for k, c in CONVERSIONS.items()}
            for task, (code, prefix) in tasks.items():
                for kind in ("loha", "lora"):
                    key = f"{task}, {kind} of rank {rank if kind == 'loha' else 2 * rank}"
                    found[key] = figures(folder / f"{prefix}{rank}-{kind}.safetensors", code)
                    print(key, found[key], flush=True)
    report("loha", found)


if __name__ == "__main__":
    main()
