"""Compare what kinds of adapters learn over learning rates: identity and prompt score on tiny-scenes, in short runs.

    python benchmarks/quality.py                    # the whole grid; resumes after an interruption
    python benchmarks/quality.py --seeds 0 --most 5 # five missing runs of the first seed
    python benchmarks/quality.py --table            # only the table and the chart of the existing runs

All kinds use the same harness: q, k, v and out of every attention of the U-Net, the five views of the toy, velocity
prediction, STEPS steps of AdamW at a constant rate, and the same noise for the same seed. LoKr is the module of
LyCORIS, LoRA that of PEFT. Ranks and shapes are matched by parameters: one KronA term with LoKr and LoRA of rank 1,
four terms with LoRA of rank 4. Every run adds a line to results/quality.jsonl:

    identity   mean score of images of the toy on every table and position (krona_hub.evaluation.color_identity)
    shown      share of these images above RECOGNIZED, which no wrong toy reaches
    prompt     mean share of right shapes and colors in images of PROMPTS held-out prompts without the toy
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

sys.path[:0] = [str(Path(__file__).parent.parent)]

from layer_peers import DENSE, peft, targets  # noqa: E402
from quality_report import save_report  # noqa: E402

from krona_hub import KronLinear  # noqa: E402
from krona_hub.assets.shipped import folder_of  # noqa: E402
from krona_hub.evaluation.color_identity import RECOGNIZED, identity  # noqa: E402
from scripts.tiny_scenes import autoencoder, check, sampling, scene, toy  # noqa: E402
from scripts.tiny_scenes.denoiser import held_out_scenes  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
RATES, SEEDS = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (0, 1, 2)
STEPS, PROMPTS = 150, 36
SHAPE, FACTOR = (16, 4), 8  # KronA; LyCORIS
TOY_PROMPTS = [f"a photo of a {toy.TRIGGER} on a {t} table, {p}" for t in scene.TABLES for p in scene.POSITIONS]


def lora(rank: int) -> Callable[[nn.Linear], nn.Module]:
    from peft import LoraConfig

    return lambda layer: peft(layer, LoraConfig(r=rank, lora_alpha=rank, target_modules=["layer"]))


class Lokr(nn.Module):
    """A layer with the module of LyCORIS, which replaces the forward of the layer; w2 is full."""

    def __init__(self, layer: nn.Linear) -> None:
        from lycoris.modules.lokr import LokrModule

        logging.disable(logging.WARNING)
        super().__init__()
        self.layer = layer
        self.kron = LokrModule("layer", layer, 1.0, lora_dim=DENSE, alpha=1, factor=FACTOR)
        self.kron.apply_to()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


VARIANTS: Mapping[str, Callable[[nn.Linear], nn.Module]] = {
    "KronA 16x4": lambda layer: KronLinear(layer, shape=SHAPE),
    "Kronecker 4 × 16x4": lambda layer: KronLinear(layer, shape=SHAPE, terms=4),
    "LoKr, lycoris": Lokr,
    "LoRA r1, peft": lambda layer: lora(1)(layer),
    "LoRA r4, peft": lambda layer: lora(4)(layer),
}


def load_frozen(base: Path) -> Any:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(base)
    for model in (pipe.unet, pipe.text_encoder, pipe.vae):
        model.requires_grad_(False)
    return pipe


def adapt(model: nn.Module, variant: str) -> list[nn.Parameter]:
    for name, module in targets(model):
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, VARIANTS[variant](module))
    return [p for p in model.parameters() if p.requires_grad]


def teach(pipe: Any, parameters: list[nn.Parameter], rate: float, seed: int) -> float:
    """Train on the views repeatedly; return the mean loss of the last ten steps."""
    latents = autoencoder.encode(pipe.vae, toy_views()) * pipe.vae.config.scaling_factor
    text = pipe.encode_prompt(toy.captions(), "cpu", 1, False)[0].detach()
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    generator, losses = torch.Generator().manual_seed(seed), []
    for _ in range(STEPS):
        times = torch.randint(pipe.scheduler.config.num_train_timesteps, (len(latents),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        prediction = pipe.unet(pipe.scheduler.add_noise(latents, noise, times), times, text).sample
        loss = nn.functional.mse_loss(prediction, pipe.scheduler.get_velocity(latents, noise, times))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    return sum(losses[-10:]) / 10


def toy_views() -> Any:
    import numpy as np

    return np.stack(toy.views())


def scores(pipe: Any) -> dict[str, float]:
    """Return the scores of images of the toy and of held-out prompts."""
    views = [Image.fromarray(view) for view in toy.views()]
    found = [identity(Image.fromarray(image), views) for image in sampling.generate(pipe, TOY_PROMPTS)]
    wanted = held_out_scenes(PROMPTS)
    kept = check.score(sampling.generate(pipe, [scene.prompt(each) for each in wanted]), wanted)
    return {
        "identity": sum(found) / len(found),
        "shown": sum(each > RECOGNIZED for each in found) / len(found),
        "prompt": (kept.shape + kept.color) / 2,
    }


def run(base: Path, variant: str, rate: float, seed: int) -> dict[str, Any]:
    """Train and score one variant; return one line of the results."""
    start = perf_counter()
    pipe = load_frozen(base)
    torch.manual_seed(seed)
    parameters = adapt(pipe.unet, variant) if variant else []
    loss = teach(pipe, parameters, rate, seed) if variant else None
    count = sum(p.numel() for p in parameters)
    found = {name: round(value, 4) for name, value in scores(pipe).items()}
    took = round(perf_counter() - start, 1)
    setup = {"way": variant, "rate": rate, "seed": seed, "steps": STEPS, "parameters": count, "loss": loss}
    return {**setup, **found, "seconds": took}


def lines() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def missing(seeds: tuple[int, ...], rates: tuple[float, ...]) -> Iterator[tuple[str, float, int]]:
    """Yield the runs without a line: first the base model alone (""), then seed by seed, each one a complete grid."""
    done = {(row["way"], row["rate"], row["seed"]) for row in lines() if row["steps"] == STEPS}
    wanted = [("", 0.0, 0), *((variant, rate, seed) for seed, rate, variant in product(seeds, rates, VARIANTS))]
    return (each for each in wanted if each not in done)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--base", type=Path, default=folder_of("tiny-scenes"))
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--rates", type=float, nargs="*", default=RATES)
    parser.add_argument("--most", type=int, default=10**6, help="Maximum number of runs.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="Only write the table and the chart.")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    todo = [] if args.table else list(missing(tuple(args.seeds), tuple(args.rates)))[: args.most]
    for variant, rate, seed in todo:
        row = run(args.base, variant, rate, seed)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        print(row, flush=True)
    print(save_report(lines(), tuple(VARIANTS), RATES, RESULTS.with_suffix("")))


if __name__ == "__main__":
    main()
