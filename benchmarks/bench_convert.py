"""Benchmark `krona convert --max-error 0.05` on a complete SDXL-shaped rank-16 LoRA file, in a separate process.

Half of the 560 layers contain planted Kronecker sums, so that returning the input is not optimal. Reports wall time,
the peak memory of all its processes together, and the size of the result. Reading and rewriting the same file is timed
in the same run, as the reference of a ratio.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, sleep

from common import report, sdxl_lora
from safetensors.torch import save_file

from krona_hub.bases import catalog

ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
MAX_ERROR = 0.05


def attention_layers() -> dict[tuple[int, int], list[str]]:
    """Return the attention projections of the SDXL U-Net, grouped by size."""
    sizes: dict[tuple[int, int], list[str]] = {}
    for path, module in catalog.get("sdxl").components["unet"].items():
        if path.endswith(ATTENTION):
            sizes.setdefault(module.matrix, []).append(path)
    return sizes


def write_lora(path: Path) -> int:
    """Write the generated LoRA with the names of SDXL in diffusers; return the number of layers."""
    names, tensors = attention_layers(), {}
    for layer in sdxl_lora():
        name = names[layer.up.shape[0], layer.down.shape[1]].pop()
        tensors[f"unet.{name}.lora_A.weight"] = layer.down.contiguous()
        tensors[f"unet.{name}.lora_B.weight"] = layer.up.contiguous()
    save_file(tensors, path, {"format": "pt"})
    return len(tensors) // 2


def run(*arguments: str) -> tuple[float, float, dict]:
    """Run one `krona` command; return seconds, peak memory in GB and its JSON output."""
    command = [sys.executable, "-m", "krona_hub.cli", *arguments, "--json", "--quiet"]
    start, peak = perf_counter(), 0
    with tempfile.TemporaryFile() as output, subprocess.Popen(command, stdout=output) as running:
        while running.poll() is None:
            peak = max(peak, memory_of(running.pid))
            sleep(0.1)
        seconds = perf_counter() - start
        output.seek(0)
        printed = output.read()
    if running.returncode:
        raise SystemExit(printed.decode())
    return seconds, peak / 1e9, json.loads(printed)


def memory_of(process: int) -> int:
    """Return the memory of a process and its children in bytes, with shared pages counted once."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        sizes = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:  # the process has just ended
        return 0
    own = next(int(line.split()[1]) for line in sizes.splitlines() if line.startswith("Pss:"))
    return own * 1024 + sum(memory_of(int(child)) for child in children)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "sdxl.safetensors")
        layers = write_lora(source)
        size = source.stat().st_size
        rename, rename_memory, _ = run(
            "convert", str(source), "--for", "comfyui", "-o", str(Path(folder, "a.safetensors"))
        )
        search, memory, result = run(
            "convert", str(source), "--max-error", str(MAX_ERROR), "-o", str(Path(folder, "b.safetensors"))
        )
        found = Path(folder, "b.safetensors").stat().st_size
    report(
        "convert",
        {
            "layers": layers,
            "max_error": MAX_ERROR,
            "total_error": result["relative_error"],
            "parameters_before": result["parameters_before"],
            "parameters_after": result["parameters_after"],
            "bytes_before": size,
            "bytes_after": found,
            "seconds": round(search, 1),
            "peak_gb": round(memory, 2),
            "seconds_of_renaming_alone": round(rename, 1),
            "peak_gb_of_renaming_alone": round(rename_memory, 2),
            "ratio_to_renaming": round(search / rename, 1),
            "target_seconds": 120,
            "target_peak_gb": 1.5,
        },
    )


if __name__ == "__main__":
    main()
