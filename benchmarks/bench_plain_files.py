"""Benchmark two checkouts side by side on adapters without vectors or LoHa: CPU time and peak memory of what users do.

    python benchmarks/bench_plain_files.py BEFORE [AFTER]

AFTER is this checkout by default. Each checkout has one process that imports its own `krona_hub`; the two take turns,
so that a busy machine slows both down alike. A ratio is the CPU time of AFTER over that of BEFORE: of the shortest runs
("shortest"), and the median of the ratios of the rounds ("median"). A case is above the limit if both are, and unclear
if one is. `--cases read,merge` measures the cases that begin with one of these words, `--times 3` thrice as often.

The adapters have the attention layers of the SDXL U-Net; models have fewer blocks, or the same blocks with fewer
channels.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_convert import attention_layers
from bench_merge import configuration, write_base
from common import report

from krona_hub import Adapter, BaseModel, LayerDelta, write
from krona_hub.kron.terms import KronTerms, as_lora

AFTER = Path(__file__).parents[1]
LIMIT = 1.05
RANK = 16
NARROW = {"block_out_channels": [32, 64, 128], "attention_head_dim": [1, 2, 4], "cross_attention_dim": 64}

WORKER = """
import gc, json, re, sys, threading, time
import torch
import krona_hub
from krona_hub import convert, load_into, merge, read, unload, verify
from krona_hub.formats.reading.describe import describe
torch.set_num_threads(1)
new = {"overwrite": True}
folder, model = sys.argv[1], None

def forward(file):
    global model
    if model is None:
        from diffusers import UNet2DConditionModel
        config = json.load(open(f"{folder}/narrow.json"))
        torch.manual_seed(0)
        model = UNet2DConditionModel.from_config(config).requires_grad_(False).eval()
    load_into(model, f"{folder}/{file}")
    return run()

def run():
    time_ids = torch.zeros(1, 6)
    more = {"text_embeds": torch.zeros(1, 1280), "time_ids": time_ids}
    with torch.no_grad():
        return model(torch.ones(1, 4, 16, 16), 1, torch.ones(1, 77, 64), added_cond_kwargs=more)

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3

def measured(work):
    gc.collect()
    start = time.process_time()
    result = work()
    seconds = time.process_time() - start
    del result
    return seconds

def peak(work):
    highest, done = anonymous(), False
    before = highest
    def watch():
        nonlocal highest
        while not done:
            highest = max(highest, anonymous())
            time.sleep(0.002)
    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    result = work()
    done = True
    watching.join()
    return highest - before

for line in sys.stdin:
    what, code = json.loads(line)
    prepare, _, code = code.rpartition(";;")
    exec(prepare)
    work = eval("lambda: " + code)
    print(json.dumps(measured(work) if what == "seconds" else peak(work)), flush=True)
"""

# A process starts with the peak of the one that starts it, hence a small one in between.
SPAWN = """
import json, os, subprocess, sys
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, usage = os.wait4(process.pid, 0)
print(json.dumps([usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1e3]))
sys.exit(os.waitstatus_to_exitcode(status))
"""


class Case(NamedTuple):
    code: str  # an expression; what precedes ";;" is run before and not measured
    rounds: int


CASES = {
    "read kohya LoRA": Case("read(f'{folder}/kohya.safetensors')", 15),
    "read LyCORIS LoKr": Case("read(f'{folder}/lokr.safetensors')", 15),
    "read PEFT LoRA": Case("read(f'{folder}/peft')", 15),
    "read native LoRA": Case("read(f'{folder}/native.safetensors')", 15),
    "read DoRA": Case("read(f'{folder}/dora.safetensors')", 15),
    "describe kohya LoRA": Case("describe(f'{folder}/kohya.safetensors')", 15),
    "describe LyCORIS LoKr": Case("describe(f'{folder}/lokr.safetensors')", 15),
    "describe PEFT LoRA": Case("describe(f'{folder}/peft')", 15),
    "convert kohya to PEFT": Case("convert(f'{folder}/kohya.safetensors', out + '-peft', to='peft-lora', **new)", 7),
    "convert LoKr to native": Case("convert(f'{folder}/lokr.safetensors', out + '.safetensors', to='krona', **new)", 7),
    "convert native to kohya": Case(
        "convert(f'{folder}/native.safetensors', out + '.safetensors', to='kohya-lora', **new)", 7
    ),
    "merge LoRA, fp16": Case("merge(unet, [(f'{folder}/small_lora.safetensors', 0.8)], out, overwrite=True)", 5),
    "merge LoKr, fp16": Case("merge(unet, [(f'{folder}/small_lokr.safetensors', 0.8)], out, overwrite=True)", 5),
    "merge DoRA, fp16": Case("merge(unet, [(f'{folder}/small_dora.safetensors', 0.8)], out, overwrite=True)", 5),
    "merge LoRA, bf16": Case(
        "merge(unet, [(f'{folder}/small_lora.safetensors', 0.8)], out, overwrite=True, out_dtype='bf16')", 5
    ),
    "verify two LoRAs": Case("verify(f'{folder}/kohya.safetensors', f'{folder}/native.safetensors')", 7),
    "verify fit to a base": Case("verify(f'{folder}/small_lora.safetensors', base=unet)", 15),
    "load_into and forward, LoRA": Case("unload(model) if model else None;;forward('narrow_lora.safetensors')", 7),
    "load_into and forward, LoKr": Case("unload(model) if model else None;;forward('narrow_lokr.safetensors')", 7),
    "forward of a loaded LoKr": Case("unload(model);forward('narrow_lokr.safetensors');;run()", 7),
}
COMMANDS = {  # krona …
    "krona --version": (["--version"], 11),
    "krona --help": (["--help"], 11),
    "krona inspect": (["inspect", "kohya.safetensors"], 11),
    "krona inspect, LoKr": (["inspect", "lokr.safetensors"], 11),
}


class Checkout:
    """A process that runs expressions with the `krona_hub` of one checkout."""

    def __init__(self, path: Path, folder: Path, name: str) -> None:
        self.path, self.folder = path, folder
        self.start = f"folder, out, unet = {str(folder)!r}, {str(folder / f'out-{name}')!r}, {str(folder / 'unet')!r}"
        self.process = self._worker()

    @property
    def environment(self) -> dict[str, str]:
        cached = {"PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(self.folder / "bytecode")}
        return {**os.environ, **cached, "PYTHONPATH": str(self.path), "OMP_NUM_THREADS": "1"}

    def _worker(self) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", WORKER, str(self.folder)]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=self.environment, cwd=self.folder)

    def measure(self, what: str, code: str) -> float:
        """Return the CPU seconds or the peak of anonymous memory above the start, in MB, of an expression."""
        return self._ask(self.process, what, code)

    def fresh_peak(self, code: str) -> float:
        """Return the peak of an expression in a process of its own: memory that is reused is not seen otherwise."""
        with self._worker() as process:
            return self._ask(process, "peak", code)

    def _ask(self, process: subprocess.Popen[str], what: str, code: str) -> float:
        prepare, _, code = code.rpartition(";;")
        assert process.stdin and process.stdout
        process.stdin.write(json.dumps([what, f"{self.start};{prepare};;{code}"]) + "\n")
        process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.path} failed: {code}")
        if process is not self.process:
            process.stdin.close()
        return float(json.loads(answer))

    def command(self, arguments: Sequence[str]) -> tuple[float, float]:
        """Return the CPU seconds and the peak memory, in MB, of one `krona` command."""
        command = [sys.executable, "-m", "krona_hub.cli", *arguments]
        command = [sys.executable, "-c", SPAWN, *command]
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment, cwd=self.folder, check=False
        )
        if done.returncode:
            raise SystemExit(f"{self.path} failed: krona {' '.join(arguments)}")
        seconds, peak = json.loads(done.stdout.splitlines()[-1])
        return seconds, peak


# --- files -----------------------------------------------------------------------------------------------------------


def write_files(folder: Path) -> None:
    sdxl = {f"unet.{name}": size for size, names in attention_layers().items() for name in names}
    lora, lokr = filled(sdxl, low_rank), filled(sdxl, kron)
    write(lora, folder / "kohya.safetensors", format="kohya-lora", base="sdxl", dtype=torch.half)
    write(lora, folder / "peft", format="peft-lora", base="sdxl", dtype=torch.half)
    write(lora, folder / "native.safetensors", dtype=torch.half)
    write(lokr, folder / "lokr.safetensors", format="lycoris-lokr", base="sdxl", dtype=torch.half)
    write(with_magnitudes(lora), folder / "dora.safetensors", format="lycoris-locon", base="sdxl")
    small = configuration(small=True) | {"transformer_layers_per_block": [1, 1, 1]}
    linear = write_base(folder / "unet", small)
    layers = {f"unet.{name}": size for name, size in linear.items() if ".attn" in name}
    write_three(layers, folder, "small")
    narrow = configuration(small=False) | NARROW | {"projection_class_embeddings_input_dim": 2816}
    (folder / "narrow.json").write_text(json.dumps(narrow))
    write_three(dict(narrow_layers(narrow)), folder, "narrow")


def write_three(layers: Mapping[str, tuple[int, int]], folder: Path, name: str) -> None:
    lora = filled(layers, low_rank)
    for kind, adapter in {"lora": lora, "lokr": filled(layers, kron), "dora": with_magnitudes(lora)}.items():
        write(adapter, folder / f"{name}_{kind}.safetensors")


def narrow_layers(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(dict(config))
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and ".attn" in name:
            yield f"unet.{name}", (module.out_features, module.in_features)


def filled(layers: Mapping[str, tuple[int, int]], make: Any) -> Adapter:
    generator = torch.Generator().manual_seed(0)
    deltas = {name: LayerDelta((make(*size, generator),), size) for name, size in layers.items()}
    return Adapter(deltas, base=BaseModel(family="sdxl"))


def low_rank(out: int, in_: int, generator: torch.Generator) -> KronTerms:
    up, down = torch.randn(out, RANK, generator=generator), torch.randn(RANK, in_, generator=generator)
    return as_lora(0.001 * up, down)


def kron(out: int, in_: int, generator: torch.Generator) -> KronTerms:
    a, b = torch.randn(1, 16, 4, generator=generator), torch.randn(1, out // 16, in_ // 4, generator=generator)
    return KronTerms(a, 0.001 * b)


def with_magnitudes(adapter: Adapter) -> Adapter:
    from dataclasses import replace

    deltas = adapter.layers.items()
    return adapter.with_layers({n: replace(d, magnitude=torch.rand(d.weight_shape[0]) + 0.5) for n, d in deltas})


# --- measurements ----------------------------------------------------------------------------------------------------


def compare_case(before: Checkout, after: Checkout, case: Case) -> dict[str, float]:
    for side in (before, after):
        side.measure("seconds", case.code)  # imports and caches
    rounds = [
        alternating(i, before, after, lambda side: side.measure("seconds", case.code)) for i in range(case.rounds)
    ]
    figures = ratios(rounds)
    if "model" in case.code or "forward" in case.code:
        return figures
    peaks = before.fresh_peak(case.code), after.fresh_peak(case.code)
    return figures | {"peak_mb_before": round(peaks[0], 1), "peak_mb_after": round(peaks[1], 1)}


def compare_command(before: Checkout, after: Checkout, arguments: Sequence[str], count: int) -> dict[str, float]:
    for side in (before, after):
        side.command(arguments)
    rounds = [alternating(i, before, after, lambda side: side.command(arguments)) for i in range(count)]
    figures = ratios([(x[0], y[0]) for x, y in rounds])
    peaks = [min(pair[side][1] for pair in rounds) for side in (0, 1)]
    return figures | {"peak_mb_before": round(peaks[0], 1), "peak_mb_after": round(peaks[1], 1)}


def alternating(i: int, before: Checkout, after: Checkout, run: Any) -> tuple[Any, Any]:
    """Run both, the order changing every round; return the results in the order before, after."""
    if i % 2:
        late = run(after)
        return run(before), late
    early = run(before)
    return early, run(after)


def ratios(rounds: Sequence[tuple[float, float]]) -> dict[str, float]:
    shortest = [min(times) for times in zip(*rounds, strict=True)]
    return {
        "seconds_before": round(shortest[0], 4),
        "seconds_after": round(shortest[1], 4),
        "shortest": round(shortest[1] / shortest[0], 3),
        "median": round(statistics.median(after / before for before, after in rounds), 3),
    }


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("before", type=Path, help="Checkout to compare with.")
    options.add_argument("after", type=Path, nargs="?", default=AFTER)
    options.add_argument("--folder", help="Keep the generated files here, and use those that are there.")
    options.add_argument("--cases", default="", help="Measure only what begins with one of these words.")
    options.add_argument("--times", type=int, default=1, help="Multiply the number of rounds.")
    args = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        measure(Path(args.folder or name).resolve(), args)


def measure(folder: Path, args: argparse.Namespace) -> None:
    if not (folder / "narrow.json").exists():
        folder.mkdir(exist_ok=True)
        write_files(folder)
    wanted = tuple(args.cases.split(","))
    before, after = (Checkout(p.resolve(), folder, n) for p, n in ((args.before, "before"), (args.after, "after")))
    figures: dict[str, dict[str, float]] = {}
    for name, (arguments, count) in COMMANDS.items():
        if name.startswith(wanted):
            figures[name] = compare_command(before, after, arguments, count * args.times)
            print(name, figures[name], flush=True)
    for name, case in CASES.items():
        if name.startswith(wanted):
            figures[name] = compare_case(before, after, case._replace(rounds=case.rounds * args.times))
            print(name, figures[name], flush=True)
    above = [name for name, found in figures.items() if min(found["shortest"], found["median"]) > LIMIT]
    unclear = [name for name, found in figures.items() if max(found["shortest"], found["median"]) > LIMIT]
    verdict = {"above_limit": above, "unclear": [name for name in unclear if name not in above]}
    if not args.cases:
        report("plain_files", {"before": revision(args.before), "limit": LIMIT, **verdict, "cases": figures})
    print(verdict)


def revision(path: Path) -> str:
    command = ["git", "-C", str(path), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
