"""A small base whose authors' names join, share, swap and number layers in every way that a table can express."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import torch
from torch import Tensor

from krona_hub.bases import component, loading
from krona_hub.bases.base import Base
from krona_hub.bases.component import Component
from krona_hub.bases.detection import Candidate
from krona_hub.bases.module_spec import ModuleSpec, OtherParameters
from krona_hub.bases.name_rules import lookup_of, parse
from krona_hub.formats.compatibility import base_support
from krona_hub.formats.compatibility.applications import APPLICATIONS
from krona_hub.formats.compatibility.naming import ComponentNamings

TABLE = """
    stages.{}.{}.mlp.(up|gate)   stages.{}.{}.ff.proj
    stages.{}.{}.mlp.down        stages.{}.{}.ff.out
    stages.{}.{}.attention.wq    stages.{}.{}.(attn1|attn2).to_v
    stages.{}.{}.attention.wo    stages.{}.{}.(attn1.to_q&attn2.to_q)
    stages.{}.{}.mix             stages.{}.{}.glu.proj halves
    stages.{}.{}.norm_q          stages.{}.{}.(attn1.norm_q&attn2.norm_q)
"""
HALF, IN = 12, 10
MODULES = {"ff.proj": (2 * HALF, IN), "ff.out": (IN, HALF), "attn1.to_q": (8, IN), "attn2.to_q": (8, IN),
           "attn1.to_v": (6, IN), "attn2.to_v": (4, IN), "glu.proj": (16, 6)}  # fmt: skip
NORMS = ("attn1.norm_q", "attn2.norm_q")
BLOCKS = ("stages.0.1", "stages.1.0")
UP, GATE = (f"diffusion_model.stages.0.1.mlp.{name}" for name in ("up", "gate"))
PROJ = "transformer.stages.0.1.ff.proj"
QUERIES = tuple(f"transformer.stages.0.1.{attn}.to_q" for attn in ("attn1", "attn2"))


def joined_base(monkeypatch) -> Base:
    """The base, found by its names in checkpoints, too; another base has no such table."""
    rules = parse(TABLE)
    lookup = lookup_of(rules)
    original = SimpleNamespace(
        name="joined",
        in_files=True,
        spellings={"authors": "joined"},
        unclear=(),
        rules=lambda _: rules,
        lookup=lambda _: lookup,
    )
    of_catalog = component.original_of
    monkeypatch.setattr(
        component, "original_of", lambda modules: original if "stages.0.1.ff.proj" in modules else of_catalog(modules)
    )
    modules = {f"{block}.{name}": ModuleSpec(shape) for block in BLOCKS for name, shape in MODULES.items()}
    norms = {f"{block}.{name}": ModuleSpec((4,), False) for block in BLOCKS for name in NORMS}
    base = Base("joined", "joined", {"transformer": Component(modules, lambda: OtherParameters(norms))})
    n = len(modules)
    found = [Candidate("joined", "transformer", n, n, n, 1.0, n, n)]
    monkeypatch.setattr(loading, "detection", SimpleNamespace(candidates=lambda _: found))
    monkeypatch.setattr(loading, "catalog", SimpleNamespace(get=lambda _: base, find=lambda _: None))
    monkeypatch.setattr(loading, "catalog_index", SimpleNamespace(bases_with=lambda _: ()))
    return base


def known_to_comfyui(monkeypatch) -> None:
    """State in ComfyUI's table that it runs the base and finds the authors' names, whole."""
    comfyui, of_catalog = APPLICATIONS["comfyui"], base_support._architectures
    namings = {"denoiser": ComponentNamings(["diffusion_model. authors", "lora_unet_ authors"], {})}
    own = replace(comfyui.by_base["sd15"], bases=("joined",), names=namings)
    monkeypatch.setitem(APPLICATIONS, "comfyui", replace(comfyui, families=(*comfyui.families, own)))
    monkeypatch.setattr(
        base_support, "_architectures", lambda bases: frozenset(bases) if bases == own.bases else of_catalog(bases)
    )


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def checkpoint(dtype: torch.dtype = torch.float32) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a checkpoint in the names of its authors; canonical parameter -> value, by hand."""
    stored, values = {}, {}
    for i, block in enumerate(BLOCKS):
        parts = {name: numbers(10 * i + n, *shape).to(dtype) for n, (name, shape) in enumerate(MODULES.items())}
        parts["attn2.to_q"] = parts["attn1.to_q"]
        biases = {name: numbers(99 + 10 * i + n, shape[0]).to(dtype) for n, (name, shape) in enumerate(MODULES.items())}
        biases["attn2.to_q"] = biases["attn1.to_q"]
        for end, of in (("weight", parts), ("bias", biases)):
            values |= {f"transformer.{block}.{name}" + ".bias" * (end == "bias"): t for name, t in of.items()}
            own = {
                "mlp.up": of["ff.proj"][:HALF], "mlp.gate": of["ff.proj"][HALF:], "mlp.down": of["ff.out"],
                "attention.wq": torch.cat([of["attn1.to_v"], of["attn2.to_v"]]), "attention.wo": of["attn1.to_q"],
                "mix": torch.cat([of["glu.proj"][8:], of["glu.proj"][:8]]),
            }  # fmt: skip
            stored |= {f"{block}.{name}.{end}": t.clone() for name, t in own.items()}
        norm = numbers(7 + i, 4).to(dtype)
        stored[f"{block}.norm_q.weight"] = norm
        values |= {f"transformer.{block}.{name}.weight": norm for name in NORMS}
    return stored, values
