"""Benchmark `krona inspect` of an SDXL LoRA with 1,059 modules: what the answers for applications cost, in CPU seconds.

    python benchmarks/bench_inspect.py [EXECUTABLE]

EXECUTABLE is the `krona` of another version, which is measured alternately with this one. Each run is a new process.
"""

import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from common import RESULTS
from safetensors.torch import save_file

from krona_hub.bases import catalog
from krona_hub.bases.name_table import table

REPEATS = 9
COMMAND = "from krona_hub.cli.main import main; import sys; sys.exit(main(['inspect', sys.argv[1]]))"
WITHOUT = "import krona_hub.formats.compatibility.verdicts as v; v.loads_in = lambda about: {}; " + COMMAND


def write_lora(path: Path) -> None:
    """Write a LoRA of every layer of SDXL, of rank 4 in float16."""
    base, tensors = catalog.get("sdxl"), {}
    for layer, module in base.layers():
        name, (rows, *rest) = table(base).spell(layer, "kohya"), module.shape
        tensors[f"{name}.lora_down.weight"] = torch.zeros(4, *rest, dtype=torch.float16)
        tensors[f"{name}.lora_up.weight"] = torch.zeros(rows, 4, *[1] * (len(rest) - 1), dtype=torch.float16)
        tensors[f"{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, path)


def seconds(command: list[str]) -> float:
    """CPU seconds of a process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sdxl.safetensors"
        write_lora(path)
        commands = {
            "inspect": [sys.executable, "-c", COMMAND, str(path)],
            "inspect without applications": [sys.executable, "-c", WITHOUT, str(path)],
        }
        if len(sys.argv) > 1:
            commands |= {"this version": [str(Path(sys.executable).with_name("krona")), "inspect", str(path)]}
            commands |= {"other version": [sys.argv[1], "inspect", str(path)]}
        runs: dict[str, list[float]] = {name: [] for name in commands}
        for _ in range(REPEATS):
            for name, command in commands.items():
                runs[name].append(seconds(command))
    found = {name: round(median(times), 3) for name, times in runs.items()}
    result: dict[str, object] = {"modules": 1059, "cpu_seconds": found}
    result["ratio_of_applications"] = round(found["inspect"] / found["inspect without applications"], 3)
    if "other version" in found:
        result["ratio_to_other_version"] = round(found["this version"] / found["other version"], 3)
    (RESULTS / "inspect.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
