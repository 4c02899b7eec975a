"""Rules of applications about all modules of a file together. Torch-free.

Each returns why an application refuses the file, or changes all of it, as a clause, or None.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from krona_hub.bases.base import Base
from krona_hub.bases.ldm_names import is_sdxl_like, is_unet
from krona_hub.formats.compatibility.form_rules import lycoris_settings
from krona_hub.formats.compatibility.format_limits import common_peft_factor
from krona_hub.formats.compatibility.module_rules import StoredModule
from krona_hub.formats.forms.delta_form import channel_split, is_factored

TOGETHER = (
    (".attn.to_q", ".attn.to_k", ".attn.to_v"),
    (".attn.add_q_proj", ".attn.add_k_proj", ".attn.add_v_proj"),
    (".ff.net.0.proj", ".ff.net.2"),
    (".ff_context.net.0.proj", ".ff_context.net.2"),
)
SPELLINGS = {
    "authors": ("input_blocks", "middle_block", "output_blocks"),
    "diffusers": ("down_blocks", "mid_block", "up_blocks"),
}
PROBED = re.compile(r"attn2\.to_[kv]$|^text_encoder.*self_attn")


def one_peft_factor(modules: Sequence[StoredModule], base: Base) -> str | None:
    splits = [channel_split(m.info.form) for m in modules if m.info.kind == "lokr"]
    return None if not splits or common_peft_factor(splits) else "no single lokr_factor gives the shapes of all layers"


def whole_qkv(modules: Sequence[StoredModule], base: Base) -> str | None:
    """Nunchaku composes q, k and v of a block, and the two layers of a feed-forward, only together."""
    return _lacking(modules, TOGETHER)


def whole_fused(modules: Sequence[StoredModule], base: Base) -> str | None:
    """stable-diffusion.cpp stacks the parts of a fused weight, and stops at the first that is missing."""
    return _lacking(modules, TOGETHER[:2])


def _lacking(modules: Sequence[StoredModule], groups: Sequence[tuple[str, ...]]) -> str | None:
    """The clause for the first layer whose group is not adapted as a whole."""
    layers = {layer for m in modules for layer in m.info.layers}
    for group in groups:
        for layer in sorted(layers):
            for end in group:
                stem = layer.removesuffix(end)
                lacking = [other for other in group if f"{stem}{other}" not in layers]
                if stem != layer and lacking:
                    return f"{layer} is adapted, but {stem.rpartition('.')[2]}{lacking[0]} is not, which fails"
    return None


def one_spelling(modules: Sequence[StoredModule], base: Base) -> str | None:
    """InvokeAI reads the names of a U-Net in one spelling only."""
    names = [m.info.name for m in modules if any(layer.startswith("unet.") for layer in m.info.layers)]
    found = {next((s for s, heads in SPELLINGS.items() if any(h in n for h in heads)), "") for n in names}
    return "its U-Net modules have names of two spellings, which are refused" if len(found - {""}) > 1 else None


def some_denoiser(modules: Sequence[StoredModule], base: Base) -> str | None:
    layers = [layer for m in modules for layer in m.info.layers]
    alone = all(layer.startswith("text_") for layer in layers)
    return "a file of text encoders alone is not recognized" if layers and alone else None


def invokeai_probe(modules: Sequence[StoredModule], base: Base) -> str | None:
    """Its probe knows the base model of a LoKr by full factors, but for SDXL and FLUX.1."""
    lokrs = [m for m in modules if m.info.kind == "lokr"]
    modules_of = base.components[base.denoiser] if base.denoiser else {}
    if not lokrs or "single_transformer_blocks.0.attn.to_q" in modules_of or is_sdxl_like(modules_of):
        return None
    full = [m for m in lokrs if m.info.left_rank is None and m.info.right_rank is None]
    if is_unet(modules_of):
        full = [m for m in full if any(PROBED.search(layer) for layer in m.info.layers)]
        return None if full else "it recognizes a LoKr by two full factors in attn2.to_k, attn2.to_v or a text encoder"
    return None if any("w1" in m.parts or "w2" in m.parts for m in lokrs) else "it recognizes a LoKr by a full w1 or w2"


def one_kind(modules: Sequence[StoredModule], base: Base) -> str | None:
    kinds = sorted({m.info.kind for m in modules})
    return f"it has modules of the kinds {' and '.join(kinds)}, and one is loaded" if len(kinds) > 1 else None


def one_rank(modules: Sequence[StoredModule], base: Base) -> str | None:
    ranks = sorted({m.info.rank for m in modules if m.info.kind == "lora" and m.info.rank is not None})
    if len(ranks) < 2:
        return None
    return f"its modules have ranks of {ranks[0]} to {ranks[-1]}, and one rank is loaded for all layers"


def one_lokr_dim(modules: Sequence[StoredModule], base: Base) -> str | None:
    """OneTrainer builds all layers from one lokr_dim and one factor, and divides every alpha by lokr_dim."""
    lokrs = [m for m in modules if m.info.kind == "lokr"]
    if not lokrs:
        return None
    ranks = sorted({r for m in lokrs for r in (m.info.left_rank, m.info.right_rank) if r is not None})
    if len(ranks) > 1:
        return f"its modules have ranks of {ranks[0]} to {ranks[-1]}, and one lokr_dim is loaded for all layers"
    if not lycoris_settings(m.info.form for m in lokrs):
        return "no single factor of its settings gives the shapes of all layers"
    full = [m for m in lokrs if m.info.left_rank is None and m.info.right_rank is None]
    odd = [m for m in full if ranks and is_factored(ranks[0], _sides(m))]
    if odd:
        return f"w2 of {odd[0].info.name} is full, where lokr_dim {ranks[0]} makes it a product"
    alphas = {m.info.alpha for m in full}
    if full and (len(alphas) > 1 or None in alphas or (ranks and alphas != {float(ranks[0])})):
        return f"the alpha of {full[0].info.name} is divided by lokr_dim, although both factors are full"
    return None


def _sides(module: StoredModule) -> tuple[int, int]:
    """The output and input channels of w2."""
    split = channel_split(module.info.form)
    return split.out[1], split.in_[1]


def one_dora(modules: Sequence[StoredModule], base: Base) -> str | None:
    axes = {m.info.dora_axis for m in modules}
    return "some layers are DoRA and others are not, or along another axis; one setting is for all" \
        if len(axes) > 1 else None  # fmt: skip


def whole_text_encoders(modules: Sequence[StoredModule], base: Base) -> str | None:
    """OneTrainer adapts all linear layers of a text encoder, and refuses a file that lacks one."""
    layers = {layer for m in modules for layer in m.info.layers}
    for component in base.text_encoders:
        every = [layer for layer, _ in base.layers(component)]
        lacking = [layer for layer in every if layer not in layers]
        if lacking and len(lacking) < len(every):
            return f"it needs every layer of {component}, and {lacking[0]} is not adapted"
    return None
