"""Measure which names of LoRA and LoKr layers the pipelines of diffusers load, for each base model of the catalog.

    python scripts/measure_diffusers.py [--jobs N] [--uneven] OUT.json [BASE ...]

Each model is built from its published configuration, without memory for its weights. A file with every layer, under one
naming and in one form, is loaded with `load_lora_weights`. A layer counts as loaded if the adapted module then adds the
ΔW that the file means to its output, for a random input. A naming is a prefix and a spelling (see
`krona_hub.bases.original_names`); a form lists the tensors. With `--uneven`, ranks and alphas differ between layers.

Of each naming and form, the result has the number of `layers` loaded, `of` how many, the patterns of the `missing`
layers and of the `wrong` ones with the factor by which they are too strong, and the `error` raised. After an error,
`refused` lists layers without which a file loads, and `rest` is the number of layers that are then loaded.
"""

import argparse
import gc
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import cache, cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
import transformers
from diffusers.loaders import lora_pipeline
from peft.tuners.lokr.layer import factorization
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer

from krona_hub.bases import catalog, dialects, meta_device
from krona_hub.bases.base import Base
from krona_hub.bases.families import FAMILIES
from krona_hub.bases.module_spec import Placement, stored_height
from krona_hub.bases.name_rules import fused_projections
from krona_hub.bases.name_table import table

LOADERS = {  # start of the name of a base model or class -> start of the name of the LoRA loader, where they differ
    "sdxl": "StableDiffusionXL", "kolors": "StableDiffusionXL", "UNet2D": "StableDiffusion", "PRXT": "StableDiffusion",
    "Chroma": "Flux", "BriaFibo": "Flux", "ChronoEdit": "Wan", "AnyFlow": "Wan", "Mochi": "Mochi1", "anima": "Anima",
}  # fmt: skip
WITHOUT_LOADER = ("cosmos-predict2-", "prx-pixel-", "HunyuanVideo15")
MIXIN, ADAPTER = "LoraLoaderMixin", "measured"
POOL = 0.1 * torch.randn(1 << 23, generator=torch.Generator().manual_seed(0))
LORA_A, LORA_DOWN, LOKR = ("lora_A", "lora_A, alpha"), ("lora_down, alpha",), ("lokr w2", "lokr full")
PREFIXES = {  # {} is the denoiser
    "{}.": ("diffusers", "authors"),
    "": ("diffusers", "authors"),
    "diffusion_model.": ("diffusers", "authors", "comfyui"),
    "lora_unet_": ("diffusers", "authors", "comfyui"),
    "lora_transformer_": ("diffusers",),
    "lycoris_": ("diffusers",),
}


class Delta(NamedTuple):
    """scale · left · right, or scale · left ⊗ right, where `right` may be a product."""

    scale: float
    left: torch.Tensor
    right: Sequence[torch.Tensor]
    kron: bool

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """ΔW · x for a flat input x."""
        y = x.reshape(self.left.shape[1], -1).T if self.kron else x
        for factor in reversed(self.right):
            y = factor.flatten(1) @ y
        return self.scale * ((y @ self.left.T).T.flatten() if self.kron else self.left.flatten(1) @ y)


class Stored(NamedTuple):
    """A module of a file."""

    name: str
    places: Sequence[Placement]
    shape: Sequence[int]

    def is_named(self, message: str) -> bool:
        """Whether an error names this module, possibly without its prefix."""
        bare = re.sub(r"^((diffusion_model|transformer|unet)\.|(lora_unet|lora_transformer|lycoris)_)", "", self.name)
        return f"'{bare}." in message or f"{self.name}." in message


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("bases", nargs="*")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--uneven", action="store_true")
    options = parser.parse_args()
    loaders = {name: found for name in options.bases or FAMILIES if (found := loader_of(name))}
    result: dict[str, Any] = {"version": diffusers.__version__, "date": date.today().isoformat(), "families": {}}
    with ProcessPoolExecutor(options.jobs, initializer=_quiet) as pool:
        runs: dict[str, Any] = {}
        for name, loader in loaders.items():
            other = FAMILIES[name].same_layers_as
            same = runs.get(other or "") if other and loaders.get(other) is loader else None
            runs[name] = same or pool.submit(measure_base, name, options.uneven)
        for name, run in runs.items():
            result["families"][name] = run.result()
            options.out.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
            print(name, {naming: n for naming, facts in run.result().items() if (n := facts["layers"])}, flush=True)


def _quiet() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    diffusers.utils.logging.set_verbosity(60)
    transformers.utils.logging.set_verbosity(60)
    transformers.utils.logging.disable_progress_bar()


def loader_of(name: str) -> type | None:
    """The class that loads LoRA in the pipelines of a base model."""
    class_name = catalog.component(FAMILIES[name].components[catalog.get(name).denoiser]).class_name
    if not class_name or name.startswith(WITHOUT_LOADER) or class_name.startswith(WITHOUT_LOADER):
        return None
    own = [new for start, new in LOADERS.items() if name.startswith(start) or class_name.startswith(start)]
    mixins = {m.removesuffix(MIXIN) for m in vars(lora_pipeline) if m.endswith(MIXIN)} - {""}
    fitting = own[:1] or sorted((m for m in mixins if class_name.startswith(m)), key=len)[-1:]
    return getattr(lora_pipeline, fitting[0] + MIXIN) if fitting else None


def measure_base(name: str, uneven: bool) -> dict[str, dict[str, Any]]:
    """Return naming and form -> facts."""
    bench, found = Bench(catalog.get(name), uneven), {}
    for naming, modules, forms in bench.files():
        for form in forms:
            facts = bench.measure(modules, form)
            found[f"{naming} | {form}"] = {"kind": form[:4], **facts, "error": facts["error"] and facts["error"][:240]}
    return found


class Bench:
    """A pipeline of a base model, without memory for its weights."""

    def __init__(self, base: Base, uneven: bool) -> None:
        self.base, self.uneven, self.pipe = base, uneven, None
        self.loader = loader_of(base.name)
        self.texts = [c for c in base.text_encoders if c in self.loader._lora_loadable_modules]
        also = dialects.CONDITIONER
        self.denoisers = [base.denoiser, *([also] if also in self.loader._lora_loadable_modules else [])]

    def files(self) -> Iterator[tuple[str, list[Stored], Sequence[str]]]:
        """Naming, modules and forms of every file to load."""
        denoiser, with_alpha = self.base.denoiser, [f"{form}, alpha" for form in LOKR]
        spelled = table(self.base).parts[denoiser].spellings
        for prefix, spellings in PREFIXES.items():
            forms = (*LORA_DOWN, *with_alpha) if prefix[-1:] == "_" else (*LORA_A, *LORA_DOWN, *LOKR, *with_alpha)
            for spelling in spellings:
                if spelling == "diffusers" or spelling in spelled:
                    yield f"{prefix.format(denoiser)} {spelling}", list(self.modules(prefix, spelling)), forms
        trainers = "authors" if "authors" in spelled and denoiser == "transformer" else "diffusers"
        for dialect, prefix, spelling, forms in (
            ("diffusers", "{}.", "diffusers", LORA_A[:1]), ("kohya", "lora_unet_", trainers, LORA_DOWN),
        ) if self.texts else ():  # fmt: skip
            texts = [
                Stored(dialects.prefixed(self.base, c, path, dialect), [Placement(f"{c}.{path}")], spec.shape)
                for c in self.texts
                for path, spec in self.base.components[c].items()
            ]
            modules = [*self.modules(prefix, spelling), *texts]
            yield f"{prefix.format(denoiser)} {spelling} + text encoders", modules, forms

    def modules(self, prefix: str, spelling: str) -> Iterator[Stored]:
        """The modules of a file with every layer of the denoiser, and of what belongs to it."""
        for component in self.denoisers:
            part = table(self.base).parts[component]
            named: dict[str, Sequence[Placement]] = {}
            done: set[tuple[str, Any]] = set()
            for name, places in part.spellings.get(spelling, {}).items():
                if done.isdisjoint((place.layer, place.part) for place in places):
                    named[name] = places
                    done.update((place.layer, place.part) for place in places)
            covered = {layer for layer, _ in done}
            paths = [path for path in part.modules if f"{component}.{path}" not in covered]
            named |= {path: [Placement(f"{component}.{path}")] for path in paths}
            inner = "llm_adapter." if component != self.base.denoiser and prefix not in ("{}.", "") else ""
            for name, places in named.items():
                specs = [self.base.module(place.layer) for place in places]
                heights = [place.height(spec) for place, spec in zip(places, specs, strict=True)]
                title = (inner + name).replace(".", "_" if prefix[-1:] == "_" else ".")
                shape = stored_height(places, heights), *specs[0].shape[1:]
                yield Stored(prefix.format(component) + title, places, shape)

    def measure(self, modules: Sequence[Stored], form: str) -> dict[str, Any]:
        """Load one file, and, after an error, a file without the layers that cause it."""
        facts = self.load(modules, form)
        if facts["error"] is None or facts["error"].startswith("NoMatchingPeft"):
            return facts
        kept, rest = next(
            ((part, found) for part, found in self.parts(modules, form, facts) if found["layers"]), ((), {})
        )
        names = {module.name for module in kept}
        refused = {self.label(place.layer) for m in modules if m.name not in names for place in m.places}
        more = {key: rest.get(key, facts[key]) for key in ("missing", "wrong")}
        return facts | more | {"refused": sorted(refused) if kept else ["*"], "rest": rest.get("layers", 0)}

    def parts(
        self, modules: Sequence[Stored], form: str, facts: dict[str, Any]
    ) -> Iterator[tuple[Any, dict[str, Any]]]:
        """Smaller files, and what is loaded of them."""
        groups: dict[str, list[Stored]] = {}
        for module in modules:
            groups.setdefault(self.label(module.places[0].layer), []).append(module)
        blocks = [
            m for label, group in groups.items() if re.search(r"(blocks|layers|refiner)\.#\.", label) for m in group
        ]
        if "Invalid" not in facts["error"]:
            for part, found in ((modules, facts), (blocks, {"error": None})):
                found = found if found["error"] else self.load(part, form)
                while found["error"] and (less := [m for m in part if not m.is_named(found["error"])]) and less != part:
                    part, found = less, self.load(less, form)
                yield part, found
            for label in groups if form.startswith("lora") else ():
                part = [module for module in modules if self.label(module.places[0].layer) != label]
                yield part, self.load(part, form)
        part = [m for group in groups.values() if self.load(group[:1], form)["error"] is None for m in group]
        yield part, self.load(part, form) if part else facts

    def load(self, modules: Iterable[Stored], form: str) -> dict[str, Any]:
        """Load the modules in one form, and compare every layer."""
        state: dict[str, torch.Tensor] = {}
        wanted: dict[str, torch.Tensor] = {}
        for i, module in enumerate(modules):
            tensors, delta = tensors_of(module, form, i if self.uneven else 0, i)
            state |= tensors
            for place in module.places:
                self.expect(wanted, place, delta)
        try:
            self.pipe = self.pipe or self.build()
            self.pipe.load_lora_weights(state, adapter_name=ADAPTER)
            facts = self.compare(wanted)
            self.pipe.unload_lora_weights()
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            facts = {"layers": 0, "of": len(wanted), "missing": [], "wrong": {}, "error": text}
        models = [getattr(self.pipe, c) for c in (*self.denoisers, *self.texts)] if self.pipe else []
        touched = any(getattr(model, "peft_config", None) is not None for model in models)
        fused = any(getattr(m, "fused_projections", False) for x in models for m in x.modules() if "lokr" in form)
        if touched or fused:
            self.pipe = None
            gc.collect()  # fused projections occupy gigabytes
        return facts

    def build(self) -> Any:
        """A pipeline with the models that the loader looks at."""
        models: dict[str, Any] = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"))
        for component in (*self.denoisers, *self.texts):
            entry = catalog.component(FAMILIES[self.base.name].components[component])
            models[component] = _weightless(meta_device.build(entry.library, entry.class_name, entry.config))
        return type("Pipeline", (self.loader,), {**models, "components": {}, "hf_device_map": None})()

    def expect(self, wanted: dict[str, torch.Tensor], place: Placement, delta: Delta) -> None:
        """Write what the delta adds to the output of a layer, for the input of `_input`."""
        spec = self.base.module(place.layer)
        rows = delta.times(_input(prod(spec.shape[1:])))[slice(*place.rows or (None,))]
        target = wanted.setdefault(place.layer, torch.zeros(spec.shape[0]))
        target[slice(*place.part or (None,))] = rows.roll(len(rows) // 2) if place.swap_halves else rows

    def compare(self, wanted: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Sort the layers into loaded, missing and wrong ones."""
        adapted = {
            f"{component}.{name.removeprefix('text_model.')}": module
            for component in (*self.denoisers, *self.texts)
            for name, module in getattr(self.pipe, component).named_modules()
            if isinstance(module, BaseTunerLayer)
        }
        missing: Counter[str] = Counter()
        wrong: dict[str, set[str]] = {}
        loaded, total = 0, Counter(map(self.label, wanted))
        for layer, rows in wanted.items():
            found, label = self.output(layer, adapted), self.label(layer)
            if found is None:
                missing[label] += 1
            elif found.shape == rows.shape and (found - rows).norm() <= 1e-4 * rows.norm():
                loaded += 1
            else:
                factor = float(found @ rows / rows.norm() ** 2) if found.shape == rows.shape else 0.0
                scaled = factor and (found - factor * rows).norm() < 1e-4 * rows.norm()
                wrong.setdefault(label, set()).add(f"{factor:.4g}" if scaled else "other values")
        patterns = [p if n == total[p] else f"{p} ({n} of {total[p]})" for p, n in sorted(missing.items())]
        patterns = ["*"] if missing.total() == len(wanted) else patterns
        factors = {label: sorted(found)[:4] for label, found in sorted(wrong.items())}
        return {"layers": loaded, "of": len(wanted), "missing": patterns, "wrong": factors, "error": None}

    def output(self, layer: str, adapted: dict[str, Any]) -> torch.Tensor | None:
        """What the loaded adapter adds to the output of a layer; None without an adapter."""
        for name, rows in ((layer, slice(None)), *self.fused.get(layer, ())):
            if name in adapted and (delta := loaded_delta(adapted[name])):
                return delta.times(_input(prod(self.base.module(layer).shape[1:])))[rows]
        return None

    @cached_property
    def fused(self) -> dict[str, list[tuple[str, slice]]]:
        """Layer -> the modules that it is a part of after diffusers fuses projections, with its rows."""
        found: dict[str, list[tuple[str, slice]]] = {}
        for component in self.denoisers:
            for name, places in fused_projections(self.base.components[component]).items():
                for place in places:
                    rows = slice(*place.rows or (None,))
                    found.setdefault(f"{component}.{place.layer}", []).append((f"{component}.{name}", rows))
        return found

    def label(self, layer: str) -> str:
        """The pattern of a layer, without the component if that is the denoiser."""
        return re.sub(r"(?<![^.])\d+(?![^.])", "#", layer.removeprefix(f"{self.base.denoiser}."))


def tensors_of(module: Stored, form: str, variant: int, seed: int) -> tuple[dict[str, torch.Tensor], Delta]:
    """The tensors of a stored module in a form, and the delta that they mean."""
    generator = torch.Generator().manual_seed(seed)
    rank, alpha = (4, 2, 3)[variant % 3], (2.0, 3.0, 1.0, 6.0)[variant % 4]
    height, width, *kernel = module.shape

    def some(*shape: int) -> torch.Tensor:
        start = int(torch.randint(len(POOL) - prod(shape), (1,), generator=generator))
        return POOL[start : start + prod(shape)].view(shape)

    scale = alpha / rank if "alpha" in form else 1.0
    if form.startswith("lora"):
        down, up = ("lora_down", "lora_up") if "down" in form else ("lora_A", "lora_B")
        found = {f"{down}.weight": some(rank, width, *kernel), f"{up}.weight": some(height, rank, *(1 for _ in kernel))}
        delta = Delta(scale, found[f"{up}.weight"], [found[f"{down}.weight"]], False)
    else:
        (out_l, out_k), (in_m, in_n) = factorization(height, 16), factorization(width, 16)
        found = {"lokr_w1": some(out_l, in_m)}
        if "w2" in form and rank < max(out_k, in_n) / 2:
            found |= {"lokr_w2_a": some(out_k, rank), "lokr_w2_b": some(rank, in_n * prod(kernel))}
        else:
            scale = 1.0  # alpha has no meaning where both factors are full
            found["lokr_w2"] = some(out_k, in_n, *kernel)
        delta = Delta(scale, found["lokr_w1"], [*found.values()][1:], True)
    alphas = {f"{module.name}.alpha": torch.tensor(alpha)} if "alpha" in form else {}
    return {f"{module.name}.{key}": tensor.clone() for key, tensor in found.items()} | alphas, delta


def loaded_delta(module: Any) -> Delta | None:
    """The delta of an adapted module; None if it has no loaded weights."""
    if ADAPTER not in module.scaling:
        return None
    is_lora = isinstance(module, LoraLayer)
    names = ("lora_B", "lora_A") if is_lora else [f"lokr_w{i}{end}" for i in (1, 2) for end in ("", "_a", "_b")]
    found = {name: getattr(module, name)[ADAPTER] for name in names if ADAPTER in getattr(module, name)}
    tensors = {name: (value.weight if is_lora else value).detach() for name, value in found.items()}
    if any(tensor.is_meta for tensor in tensors.values()):
        return None
    left = [tensor for name, tensor in tensors.items() if name.startswith(("lora_B", "lokr_w1"))]
    right = [tensor for name, tensor in tensors.items() if name.startswith(("lora_A", "lokr_w2"))]
    return Delta(module.scaling[ADAPTER], left[0] if len(left) == 1 else left[0] @ left[1], right, not is_lora)


@cache
def _input(width: int) -> torch.Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(width))


def _weightless(model: torch.nn.Module) -> torch.nn.Module:
    """The model with one zero in place of each tensor."""
    for module in model.modules():
        for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            zeros = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            is_weight = isinstance(tensor, torch.nn.Parameter)
            setattr(module, name, torch.nn.Parameter(zeros, requires_grad=False) if is_weight else zeros)
    return model


if __name__ == "__main__":
    main()
