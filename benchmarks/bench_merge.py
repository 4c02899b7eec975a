"""Benchmark `krona_hub.merge` on a complete SDXL U-Net (5.1 GB of random fp16) against a copy, peft and LyCORIS.

Every measurement runs in a separate process, without imports, with the files in the page cache. The copies and merges
of a round run one after the other; the ratio of their medians is reported. The copy uses the fastest method
(`copy_file_range`), and both are synced to disk. `--small` uses a U-Net of 1.7 GB with fewer blocks (24 % of its bytes
are attention instead of 37 %), `--rounds N` sets the number of rounds, `--folder DIR` selects another disk.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from common import report
from safetensors.torch import load_file, save_file

from krona_hub import Adapter, BaseModel, LayerDelta, write
from krona_hub.bases import catalog
from krona_hub.kron.shapes import peft_factors
from krona_hub.kron.terms import KronTerms, as_lora

CATALOG = Path(catalog.__file__).parent / "components" / "sdxl.unet.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
ATTENTION = (".to_q", ".to_k", ".to_v", ".to_out.0")
RELATIVE = 0.02  # approximate ‖ΔW‖ / ‖W‖
TARGETS = {
    "attention, 1 thread / copy": 1.4,
    "attention, 2 threads / copy": 1.25,
    "all linear, 1 thread / copy": 1.8,
    "peft / krona": 2.5,
    "lycoris / krona": 2.5,
    "peak anonymous memory (MB)": 400,
}

COPY = """
import os, sys, time
start = time.perf_counter()
source, target = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
left = os.fstat(source).st_size
while left:
    left -= os.copy_file_range(source, target, left)
os.fsync(target)
print('{"seconds": %r}' % (time.perf_counter() - start))
"""
MERGE = """
import json, re, sys, threading, time
import torch
from krona_hub import merge
import krona_hub.formats.reading.reader, krona_hub.merging.arithmetic.tiles
base, adapter, out, threads, options = *sys.argv[1:4], int(sys.argv[4]), json.loads(sys.argv[5])
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1e3
peak, done = anonymous(), False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
start = time.perf_counter()
report = merge(base, [(adapter, 1.0)], out, threads=threads, overwrite=True, **options)
seconds, done = time.perf_counter() - start, True
print(json.dumps({"seconds": seconds, "anonymous_mb": peak}))
"""
PEFT = """
import json, sys, time
import torch
from diffusers import UNet2DConditionModel
from peft import PeftModel
start = time.perf_counter()
model = UNet2DConditionModel.from_pretrained(sys.argv[1], torch_dtype=torch.float16)
model = PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload()
model.save_pretrained(sys.argv[3])
print(json.dumps({"seconds": time.perf_counter() - start}))
"""
LYCORIS = """
import json, sys, time
import torch
from diffusers import UNet2DConditionModel
from lycoris import create_lycoris_from_weights
start = time.perf_counter()
model = UNet2DConditionModel.from_pretrained(sys.argv[1], torch_dtype=torch.float16)
network, _ = create_lycoris_from_weights(1.0, sys.argv[2], model)
assert network.loras, 'LyCORIS found no module of the file.'
network.merge_to()
model.save_pretrained(sys.argv[3])
print(json.dumps({"seconds": time.perf_counter() - start}))
"""


def configuration(small: bool) -> dict[str, Any]:
    config = json.loads(CATALOG.read_text())["config"]
    if small:
        config["transformer_layers_per_block"] = [1, 1, 2]
    return {"_class_name": "UNet2DConditionModel", **config}


def write_base(folder: Path, config: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """Write a component folder with random fp16 weights; return the (out, in) of its linear layers."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        model = UNet2DConditionModel.from_config(dict(config))
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    write_random(folder / WEIGHTS, shapes)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    return {
        n.removesuffix(".weight"): s for n, s in shapes.items() if n.removesuffix(".weight") in linear and n[-1] == "t"
    }


def write_random(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Write a safetensors file of fp16 noise without holding it in memory."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset := offset + 2 * prod(shape)]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    noise = (0.02 * torch.randn(1 << 25, generator=torch.Generator().manual_seed(0))).half().numpy().tobytes()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while offset:
            offset -= file.write(noise[:offset])


def adapters(linear: Mapping[str, tuple[int, int]]) -> Iterator[tuple[str, Adapter]]:
    generator = torch.Generator().manual_seed(1)
    attention = [n for n in linear if n.endswith(ATTENTION)]

    def kron(out: int, in_: int) -> KronTerms:
        a, b = torch.randn(1, 64, 8, generator=generator), torch.randn(1, out // 64, in_ // 8, generator=generator)
        return KronTerms(a, RELATIVE * 0.02 * b)

    def factor8(out: int, in_: int) -> KronTerms:
        """Use the shape that PEFT and LyCORIS choose for a factor of 8; they support no other shapes in one file."""
        (a1, b1), (a2, b2) = peft_factors(out, 8), peft_factors(in_, 8)
        a, b = torch.randn(1, a1, a2, generator=generator), torch.randn(1, b1, b2, generator=generator)
        return KronTerms(a, RELATIVE * 0.02 * b)

    def lora(out: int, in_: int) -> KronTerms:
        up, down = torch.randn(out, 16, generator=generator), torch.randn(16, in_, generator=generator)
        return as_lora(RELATIVE * 0.02 / 4 * up, down)

    for name, layers, make in (
        ("attention", attention, kron),
        ("attention_lora", attention, lora),
        ("attention_factor8", attention, factor8),
        ("linear", [n for n, (out, in_) in linear.items() if out % 64 == in_ % 8 == 0], kron),
    ):
        deltas = {f"unet.{n}": LayerDelta((make(*linear[n]),), linear[n]) for n in layers}
        yield name, Adapter(deltas, base=BaseModel(family="sdxl"))


def run(script: str, *arguments: str | Path) -> dict[str, float]:
    """Run a script in a separate process and return the figures that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def round_of_merges(base: Path, folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Run a copy, then each merge, one after the other; every output is deleted before the next one."""
    out = folder / "out.safetensors"
    yield "copy", run(COPY, base / WEIGHTS, out)
    for adapter in ("attention", "attention_lora", "linear"):
        for threads in (1, 2):
            out.unlink()
            file = folder / f"{adapter}.safetensors"
            yield f"{adapter} {threads}", run(MERGE, base / WEIGHTS, file, out, str(threads), '{"hash": false}')
    out.unlink()


def round_of_peers(base: Path, folder: Path) -> Iterator[tuple[str, dict[str, float]]]:
    """Merge the same attention adapters with krona, folder to folder, and with peft and LyCORIS."""
    import shutil

    for name, script, adapter in (
        ("krona lora", MERGE, folder / "attention_lora.safetensors"),
        ("peft lora", PEFT, folder / "peft-lora"),
        ("krona lokr", MERGE, folder / "attention_factor8.safetensors"),
        ("peft lokr", PEFT, folder / "peft-lokr"),
        ("lycoris lokr", LYCORIS, folder / "attention.lycoris.safetensors"),
    ):
        more = ["2", '{"hash": false}'] if script is MERGE else []
        yield name, run(script, base, adapter, folder / "merged", *more)
        shutil.rmtree(folder / "merged")


def medians(rounds: list[dict[str, dict[str, float]]]) -> dict[str, float]:
    return {name: statistics.median(r[name]["seconds"] for r in rounds) for name in rounds[0]}


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("--small", action="store_true")
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--folder")
    options.add_argument("--part", choices=("copies", "peers"), help="Only this part of the comparison.")
    args = options.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        measure(Path(name), args)


def measure(folder: Path, args: argparse.Namespace) -> None:
    base = folder / "unet"
    linear = write_base(base, configuration(args.small))
    for name, adapter in adapters(linear):
        write(adapter, folder / f"{name}.safetensors")
        if name == "attention_factor8":
            write(adapter, folder / "peft-lokr", format="peft-lokr", base="sdxl")
            write(adapter, folder / "kohya.safetensors", format="lycoris-lokr", base="sdxl")
            # create_lycoris_from_weights requires its own prefix
            ours = load_file(folder / "kohya.safetensors")
            theirs = {name.replace("lora_unet_", "lycoris_", 1): tensor for name, tensor in ours.items()}
            save_file(theirs, folder / "attention.lycoris.safetensors")
        if name == "attention_lora":
            write(adapter, folder / "peft-lora", format="peft-lora", base="sdxl")
    about = {"bytes": (base / WEIGHTS).stat().st_size, "targets": TARGETS}
    size = "_small" if args.small else ""
    if args.part != "peers":
        report(f"merge{size}", about | against_copies(base, folder, args.rounds))
    if args.part != "copies":
        report(f"merge_peers{size}", about | against_peers(base, folder))


def against_copies(base: Path, folder: Path, count: int) -> dict[str, Any]:
    rounds = [dict(round_of_merges(base, folder)) for _ in range(count)]
    seconds = medians(rounds)
    ratios = {
        f"{adapter}, {threads} / copy": seconds[f"{key} {threads[0]}"] / seconds["copy"]
        for adapter, key in (("attention", "attention"), ("attention LoRA", "attention_lora"), ("all linear", "linear"))
        for threads in ("1 thread", "2 threads")
    }
    return {
        "rounds": count,
        "seconds": rounded(seconds),
        "ratios": rounded(ratios),
        "peak anonymous memory (MB)": round(max(x.get("anonymous_mb", 0) for r in rounds for x in r.values())),
    }


def against_peers(base: Path, folder: Path) -> dict[str, Any]:
    seconds = medians([dict(round_of_peers(base, folder))])
    ratios = {
        "peft / krona, LoRA": seconds["peft lora"] / seconds["krona lora"],
        "peft / krona, LoKr": seconds["peft lokr"] / seconds["krona lokr"],
        "lycoris / krona, LoKr": seconds["lycoris lokr"] / seconds["krona lokr"],
    }
    return {"seconds": rounded(seconds), "ratios": rounded(ratios)}


def rounded(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: round(figure, 3) for name, figure in figures.items()}


if __name__ == "__main__":
    main()
