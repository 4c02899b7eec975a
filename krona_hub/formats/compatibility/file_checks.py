"""Failures of diffusers on whole files of formats that it supports. Torch-free.

Each check takes a description and returns the reason as a clause, or None. Sources: FORMATS.md §5 and runs of diffusers
0.42.1, which `tests/formats/test_loads_in.py` repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from krona_hub.formats.reading.description import Description

FileCheck = Callable[[Description], str | None]
SINGLE_CLIP = ("q_proj", "k_proj", "v_proj")


def mixed_eras(description: Description) -> str | None:
    """diffusers decides by the first key how to read all keys (FORMATS.md §5.1)."""
    keys = description.header.tensors
    old = [k for k in keys if ".lora.down." in k or "_lora.down." in k]
    new = [k for k in keys if ".lora_A." in k and not k.startswith("text_encoder")]
    return "it mixes old and new key names, and diffusers reads only one kind" if old and new else None


def mixed_prefixes(description: Description) -> str | None:
    """Its converters of transformers take the names of a file for those of one program."""
    heads = {m.name.partition(".")[0] for m in description.modules}
    mixed = {"transformer", "diffusion_model"} <= heads
    return "it mixes names of two programs, transformer. and diffusion_model., of which one is read" if mixed else None


def kohya_embeddings(description: Description) -> str | None:
    """It recognizes a kohya file by the prefixes of all its keys."""
    found = description.format == "kohya-lora" and description.extras
    return "it does not recognize kohya names beside embeddings, and refuses the file" if found else None


def uneven_alphas(description: Description) -> str | None:
    """diffusers 0.42.1 stores the alphas of U-Net attention under names that match no module."""
    if description.format != "kohya-lora":
        return None
    alphas = {m.alpha for m in description.modules if m.layers and m.layers[0].startswith("unet.")}
    return "diffusers loses the alphas of attention layers if they differ between modules" \
        if len(alphas) > 1 else None  # fmt: skip


def nested_alphas(description: Description) -> str | None:
    """diffusers 0.42.1 gives PEFT the alphas of `transformer.` layers by path, which PEFT takes for the end of another.

    Its converters of other names multiply the factors by alpha / rank instead.
    """
    if description.format != "diffusers-lora":
        return None
    modules = [m for m in description.modules if m.name.startswith("transformer.") and m.alpha is not None]
    alphas = {layer.partition(".")[2]: m.alpha for m in modules for layer in m.layers}
    for path, alpha in alphas.items():
        steps = path.split(".")
        outer = next((o for i in range(1, len(steps)) if (o := ".".join(steps[i:])) in alphas), path)
        if alphas[outer] != alpha:
            return f"diffusers can confuse the alpha of {path} with that of {outer}, which differs"
    return None


def text_without_out_proj(description: Description) -> str | None:
    """diffusers 0.42.1 infers the version of kohya text-encoder keys from the presence of out_proj."""
    if description.format != "kohya-lora":
        return None
    text = [layer for m in description.modules for layer in m.layers if layer.startswith("text_encoder")]
    attention = any(layer.endswith(SINGLE_CLIP) for layer in text)
    lost = attention and not any(layer.endswith("out_proj") for layer in text)
    return "diffusers loses the attention layers of a text encoder whose out_proj is not adapted" if lost else None


FILE_CHECKS: Mapping[str, tuple[FileCheck, ...]] = {
    "diffusers": (mixed_eras, mixed_prefixes, kohya_embeddings, uneven_alphas, nested_alphas, text_without_out_proj),
}
