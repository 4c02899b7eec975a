"""Measure what smaller adapters keep of the effect on tiny-scenes: cuts, Kronecker sums and LoKr → LoRA.

    python benchmarks/distill.py            # everything, about 25 minutes of a core
    python benchmarks/distill.py --sets lora --held-out 16

The source adapters are the shipped LoRA and LoKr of the zorbi. Effects are measured on held-out prompts, with the
subject and without it (docs/smaller.md). Results go to results/distill.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib.resources import files
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path[:0] = [str(Path(__file__).parent.parent)]

from krona_hub import read  # noqa: E402
from krona_hub.adapters.adapter import Adapter  # noqa: E402
from krona_hub.adapters.moments import LayerMoments, Moments  # noqa: E402
from krona_hub.calibration.baselines import TARGETS  # noqa: E402
from krona_hub.calibration.execute import gain_for, gathered, held_out, open_session  # noqa: E402
from krona_hub.calibration.measure_effect import measured  # noqa: E402
from krona_hub.calibration.prompts import PromptSets, prompt_sets  # noqa: E402
from krona_hub.calibration.request import SAMPLES, CalibrationRequest  # noqa: E402
from krona_hub.conversion.convert_layers import apply_method  # noqa: E402
from krona_hub.conversion.methods import Budget, Rank  # noqa: E402
from krona_hub.conversion.target import ConversionTarget  # noqa: E402
from krona_hub.conversion.weighted_layers import cut_by_moments  # noqa: E402
from krona_hub.images.request import ComputeOptions, Settings  # noqa: E402
from krona_hub.kron.weighted.middle import middle_of  # noqa: E402
from krona_hub.version import __version__  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "distill.json"
ASSETS = Path(str(files("krona_hub.assets")))
SHARES = (2, 4, 8, 16)
RANKS = (1, 2, 4, 8, 16)
LORA = ConversionTarget("kohya-lora")
TABLES, WALLS = ("white", "grey", "blue", "green", "wooden", "tiled"), ("white", "grey", "beige", "dark")
POSITIONS = ("on the left", "in the middle", "on the right")
COLORS, OBJECTS = (
    ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink"),
    ("cube", "ball", "cone", "star"),
)


def prompts_with(count: int) -> PromptSets:
    """The default prompts of the calibration, with `count` held-out ones of each kind of the same grammar."""
    sets = prompt_sets("default", trigger="zorbi", family="tiny-scenes")
    subject = [f"a photo of a zorbi on a {t} table, {p}, {w} wall" for t, p, w in product(TABLES, POSITIONS, WALLS)]
    other = [f"a photo of a {c} {o} on a {t} table, {p}" for c, o, t, p in product(COLORS, OBJECTS, TABLES, POSITIONS)]
    used = {*sets.subject, *sets.other}
    every = [line for line in subject if line not in used], [line for line in other if line not in used]
    chosen = [spread(lines, min(count, len(lines))) for lines in every]
    return replace(sets, held_out=chosen[0], held_out_other=chosen[1])


def spread(lines: list[str], count: int) -> tuple[str, ...]:
    return tuple(lines[i * len(lines) // count] for i in range(count))


def adapter_of(source: Adapter, outcomes: Any) -> Adapter:
    return source.with_layers({name: o.delta for name, o in outcomes.items() if not o.is_left_out})


def sham_of(moments: Moments, adapter: Adapter) -> Moments:
    """The moments of other layers of the same size: each layer gets those of the next one."""
    sizes: dict[int, list[str]] = {}
    for name in adapter.layers:
        sizes.setdefault(middle_of(adapter[name].sums, adapter[name].matrix_shape).up.shape[1], []).append(name)
    turned = {name: names[i - 1] for names in sizes.values() for i, name in enumerate(names)}
    return replace(moments, layers={name: moments.layers[turned[name]] for name in adapter.layers})


def plain_of(adapter: Adapter) -> Moments:
    """Moments for which the loss is the plain squared norm: D Dᵀ and Uᵀ U."""
    layers = {}
    for name, delta in adapter.layers.items():
        up, down = (m.double() for m in middle_of(delta.sums, delta.matrix_shape))
        layers[name] = LayerMoments(down @ down.mT, up.mT @ up)
    return Moments(layers, "")


def rows_of(kind: str, seed: int, count: int, samples: int) -> Iterator[dict[str, Any]]:
    """Yield one measured row per method and size."""
    machine = ComputeOptions(device="cpu", dtype="float32")
    request = CalibrationRequest("tiny-scenes", prompts_with(count), samples, seed, Settings(), machine)
    session = open_session(request, read(ASSETS / f"zorbi_{kind}.safetensors", base="tiny-scenes"))
    adapter, started = session.adapter, time.perf_counter()
    moments = gathered(session)
    yield {"row": "gather moments", "seconds": round(time.perf_counter() - started, 1), "bytes": moments.nbytes}
    known = held_out(session)
    sets = {"G and C": moments, "plain": plain_of(adapter), "sham": sham_of(moments, adapter)}

    def row(name: str, size: str, result: Adapter, **more: Any) -> dict[str, Any]:
        kept, other = measured(session.how, known.subject, result), measured(session.how, known.other, result)
        low, high = kept.effect_range(seed)
        return {
            "row": name, "size": size, "parameters": sum(d.parameters for d in result.layers.values()),
            "layers": len(result.layers), "effect": round(kept.effect, 4), "range": [round(low, 4), round(high, 4)],
            "strength": round(kept.strength, 4), "other": round(other.effect, 4), "drift": round(other.drift, 4),
            **more,
        }  # fmt: skip

    if kind == "lokr":
        for rank in RANKS:
            total = sum(rank * sum(delta.matrix_shape) for delta in adapter.layers.values())
            for name in ("plain", "G and C"):
                uniform = cut_by_moments(adapter.layers, Rank(rank), LORA, sets[name])
                yield row(f"uniform, {name}", f"r {rank}", adapter_of(adapter, uniform.layers))
                shared = cut_by_moments(adapter.layers, Budget(parameters=total), LORA, sets[name])
                yield row(f"shared out, {name}", f"r {rank}", adapter_of(adapter, shared.layers))
        return
    for share in SHARES:
        size, method = f"1/{share}", Budget(share=1 / share)
        for name, own in sets.items():
            cut = cut_by_moments(adapter.layers, method, LORA, own)
            result = adapter_of(adapter, cut.layers)
            yield row(f"cut, {name}", size, result, predicted=round(cut.predicted, 4))
            if name == "G and C":
                gain = gain_for(session, result)
                louder = adapter_of(adapter, cut_by_moments(adapter.layers, method, LORA, own, gain).layers)
                yield row("cut, G and C, with gain", size, louder, gain=gain)
        yield row(
            "convert --budget",
            size,
            adapter_of(adapter, apply_method(adapter.layers, method, ConversionTarget("krona"))),
        )
        yield row("strict Kronecker", size, adapter_of(adapter, apply_method(adapter.layers, method, TARGETS[1][1])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sets", nargs="+", choices=("lora", "lokr"), default=("lora", "lokr"))
    parser.add_argument("--seeds", nargs="+", type=int, default=(0, 1, 2))
    parser.add_argument("--held-out", type=int, default=24, help="held-out prompts of each kind")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"krona": __version__, "torch": torch.__version__, "held_out": given.held_out,
                             "samples": given.samples, "rows": []}  # fmt: skip
    runs = [(kind, seed) for kind in given.sets for seed in given.seeds if kind == "lora" or seed == given.seeds[0]]
    for kind, seed in runs:
        source = "lora_kohya" if kind == "lora" else kind
        for row in rows_of(source, seed, given.held_out, given.samples):
            found["rows"].append({"source": kind, "seed": seed, **row})
            print(json.dumps(found["rows"][-1]), flush=True)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
