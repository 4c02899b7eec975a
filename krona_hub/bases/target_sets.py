"""Named sets of layers to adapt, for every architecture. Torch-free.

Every component has `attn`, `attn+ff` and `all`; other names are the choices of particular trainers. A pattern is a
regular expression searched in the module path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, NamedTuple

from krona_hub.bases import ldm_names
from krona_hub.bases.base import Base
from krona_hub.bases.component import Component
from krona_hub.bases.module_spec import ModuleSpec, stored_height
from krona_hub.bases.name_table import table
from krona_hub.errors import UsageError

Kinds = Literal["all", "linear", "linear+1x1"]


class TargetSet(NamedTuple):
    """A named set of layers, by a pattern of module paths."""

    name: str
    pattern: str
    users: str = ""  # trainers that use it
    kinds: Kinds = "all"
    fused: bool = False  # modules of the original code, with fused q, k, v


ALL = TargetSet("all", "", "every Linear and convolution")
KQVO = r"attn\.to_(q|k|v|out\.0)$"
ADDED = r"attn\.(to_(q|k|v|out\.0)|add_[qkv]_proj|to_add_out)$"
CROSS = r"attn[12]\.to_(q|k|v|out\.0)$"
BLOCKS = r"transformer_blocks\."
ANY_BLOCKS = r"^(layers|noise_refiner|context_refiner)\."

UNET = (
    TargetSet("attn", CROSS, "DiffuseKronA, diffusers, SimpleTuner"),
    TargetSet("attn+ff", r"\.attentions\.", "sd-scripts, LyCORIS attn-mlp"),
    TargetSet("attn+ff+conv", r"^(down_blocks|mid_block|up_blocks)\.", "sd-scripts with conv_dim"),
    TargetSet("linear", "", "ai-toolkit", "linear+1x1"),
)
CLIP = (
    TargetSet("attn", r"self_attn\.", "diffusers --train_text_encoder"),
    TargetSet("attn+ff", r"^encoder\.layers\.", "sd-scripts"),
)
T5 = (TargetSet("attn", r"SelfAttention\."), TargetSet("attn+ff", r"^encoder\.block\."))
LANGUAGE_MODEL = (TargetSet("attn", r"self_attn\."), TargetSet("attn+ff", r"(^|\.)layers\.\d+\."))
ATTENTION = r"(^|[._])(attn\d?|attention)\."
FEED_FORWARD = (
    r"(^|[._])(ff|ffn|mlp|feed_forward|channelwise|gate_proj|up_proj|down_proj)[^.]*(\.|$)"
    r"|\.(intermediate|output)\.dense"
)
TRANSFORMER = (  # architectures without sets of their own
    TargetSet("attn", ATTENTION),
    TargetSet("attn+ff", rf"{ATTENTION}|{FEED_FORWARD}"),
    TargetSet("blocks", r"(blocks|layers?|refiner|face_adapter)\.([a-z_]+\.)?\d+\."),
)
FLUX = (
    TargetSet("kqvo", KQVO, "peft by suffix, SimpleTuner"),
    TargetSet("attn", r"\.attn\.", "SimpleTuner 'all'"),
    TargetSet("attn+ff", r"\.(attn|ff|ff_context)\.", "diffusers"),
    TargetSet("blocks", BLOCKS, "ai-toolkit"),
    TargetSet("fused", r"^(double|single)_blocks\.", "sd-scripts", fused=True),
)
ARCHITECTURES: Mapping[str, tuple[TargetSet, ...]] = {  # name of `Component.original` -> sets
    "flux1": FLUX,
    "chroma": FLUX,
    "ovis-image": FLUX[:-1],
    "longcat-image": FLUX[:-1],
    "bria": FLUX[:-1],
    "flux2": (
        TargetSet("kqvo", r"attn\.(to_(q|k|v|out\.0)|to_qkv_mlp_proj)$", "SimpleTuner"),
        TargetSet("attn", r"attn\.(to_(q|k|v|out\.0)|to_qkv_mlp_proj|to_out)$", "diffusers"),
        TargetSet("attn+ff", r"\.(attn|ff|ff_context)\."),
        TargetSet("blocks", BLOCKS, "ai-toolkit"),
    ),
    "sd3": (
        TargetSet("kqvo", r"attn2?\.to_(q|k|v|out\.0)$", "SimpleTuner"),
        TargetSet("attn", r"\.attn\.", "diffusers"),
        TargetSet("attn+ff", r"\.(attn2?|ff|ff_context)\."),
        TargetSet("blocks", BLOCKS, "sd-scripts, ai-toolkit"),
    ),
    "z-image": (
        TargetSet("attn", r"attention\.to_(q|k|v|out\.0)$", "diffusers, SimpleTuner"),
        TargetSet("attn+ff", r"\.(attention|feed_forward)\."),
        TargetSet("blocks", ANY_BLOCKS, "ai-toolkit"),
    ),
    "qwen-image": (
        TargetSet("kqvo", KQVO, "diffusers, SimpleTuner"),
        TargetSet("attn", ADDED),
        TargetSet("attn+ff", r"\.(attn|img_mlp|txt_mlp)\."),
        TargetSet("blocks", BLOCKS, "ai-toolkit"),
    ),
    "pixart": (
        TargetSet("attn", CROSS, "SimpleTuner"),
        TargetSet("attn+ff", r"\.(attn[12]|ff)\."),
        TargetSet("blocks", BLOCKS, "ai-toolkit"),
    ),
    "lumina2": (
        TargetSet("attn", KQVO, "diffusers, SimpleTuner"),
        TargetSet("attn+ff", r"\.(attn|feed_forward)\."),
        TargetSet("blocks", ANY_BLOCKS, "ai-toolkit"),
    ),
    "sana": (
        TargetSet("qkv", r"attn[12]\.to_[qkv]$", "diffusers"),
        TargetSet("attn", CROSS, "SimpleTuner"),
        TargetSet("attn+ff", r"\.(attn[12]|ff)\."),
        TargetSet("blocks", BLOCKS, "ai-toolkit", "linear"),
    ),
    "krea2": (
        TargetSet("attn", KQVO, "SimpleTuner"),
        TargetSet("attn+ff", r"\.(attn|ff)\."),
        TargetSet(
            "recommended",  # by the authors: fifteen suffixes, without the feed-forward gates
            r"(\.to_(q|k|v|out\.0|gate)|ff\.(up|down)|^img_in|_proj|linear_[12]|projector|final_layer\.linear)$",
            "diffusers",
        ),
        TargetSet("blocks", r"^transformer_blocks\.", "ai-toolkit"),
    ),
    "wan": (
        TargetSet("attn", CROSS, "SimpleTuner"),
        TargetSet("attn+ff", r"\.(attn[12]|ffn)\."),
        TargetSet("blocks", r"^blocks\.", "ai-toolkit"),
    ),
    "hunyuan-video": (
        TargetSet("attn", ADDED, "SimpleTuner"),
        TargetSet("attn+ff", r"\.(attn|ff|ff_context)\."),
        TargetSet("blocks", BLOCKS, "ai-toolkit"),
    ),
    "auraflow": (
        TargetSet("attn", ADDED, "SimpleTuner"),
        TargetSet("attn+ff", r"\.(attn|ff|ff_context)\."),
        TargetSet("blocks", BLOCKS, "ai-toolkit"),
    ),
    "hidream": (
        TargetSet("attn", r"attn1\.to_(q|k|v|out)$", "diffusers"),
        TargetSet("attn+ff", r"\.(attn1|ff_i|ff_t)\."),
        TargetSet("blocks", r"_stream_blocks\.", "experts included"),
    ),
}


def sets_of(modules: Component) -> tuple[TargetSet, ...]:
    """The named sets of a component, `all` last."""
    if ldm_names.is_unet(modules):
        return (*UNET, ALL)
    by_kind = {"clip": CLIP, "t5": T5}.get(modules.kind)
    original = modules.original
    listed = ARCHITECTURES.get(original.name) if original else None
    language_model = any(path.endswith("layers.0.self_attn.q_proj") for path in modules)
    return (*(by_kind or listed or (LANGUAGE_MODEL if language_model else TRANSFORMER)), ALL)


def choose(base: Base, component: str, targets: str) -> dict[str, ModuleSpec]:
    """Name -> module of the layers of a component that a named set or a regular expression selects.

    Names are canonical, except in a set of fused modules, which has the names of the original code.
    Raises UsageError for an invalid expression, or one that selects no layer.
    """
    modules = base.components[component]
    named = {s.name: s for s in sets_of(modules)}
    target = named.get(targets) or TargetSet(targets, targets)
    everything = _fused(base, component) if target.fused else modules
    selected = {f"{component}.{p}": m for p, m in everything.items() if _matches(target, p) and _is(m, target.kinds)}
    if not selected:
        raise UsageError(
            f"{targets!r} selects no layer of {component} in {base.name}.",
            fix=f"Choose one of {', '.join(named)}, or a regular expression such as 'attn.*to_q'.",
        )
    return selected


def _matches(target: TargetSet, path: str) -> bool:
    try:
        return re.search(target.pattern, path) is not None
    except re.error as error:
        raise UsageError(
            f"Invalid regular expression {target.pattern!r}: {error}.", fix="Escape special characters."
        ) from error


def _is(module: ModuleSpec, kinds: Kinds) -> bool:
    if kinds == "linear":
        return len(module.shape) == 2
    return kinds == "all" or not module.has_kernel


def _fused(base: Base, component: str) -> dict[str, ModuleSpec]:
    """The modules of the original code, with the total height of the layers they stack."""
    fused = {}
    for name, places in table(base).parts[component].originals.items():
        layers = [module for place in places if (module := base.module(place.layer))]
        height = stored_height(places, [p.height(m) for p, m in zip(places, layers, strict=True)])
        fused[name] = layers[0]._replace(shape=(height, *layers[0].shape[1:]))
    return fused
