"""Known failures of applications on files whose format they support. Torch-free.

Each check takes a description and returns the reason as a clause, or None. Sources: FORMATS.md §5, §11, §12.3 and §15,
and runs of the applications themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from krona_hub.formats.forms.delta_form import channel_split

if TYPE_CHECKING:
    from krona_hub.formats.reading.description import Description, ModuleInfo

LOKR_PIPELINES = ("flux2", "z-image")  # families whose diffusers pipelines load LoKr
KOHYA = ("kohya-lora", "lycoris-locon", "lycoris-lokr", "lycoris-loha")


def dora_of(axis: str, why: str) -> Callable[[Description], str | None]:
    """A check for DoRA on that axis (`any` for both)."""

    def check(description: Description) -> str | None:
        found = any(m.dora_axis and axis in ("any", m.dora_axis) for m in description.modules)
        return why if found else None

    return check


def lacks_text_model(description: Description) -> str | None:
    """ComfyUI, Forge and A1111 look for `text_model_` and silently ignore other names."""
    bare = _first(description, lambda m: m.name.startswith("lora_te") and "_encoder_layers" in m.name
                  and "text_model_" not in m.name)  # fmt: skip
    return f"it ignores {bare}, whose name lacks text_model_" if bare else None


def unknown_prefix(description: Description) -> str | None:
    """ComfyUI finds LoKr modules of a U-Net under lora_unet_, lycoris_ and diffusion_model. names only."""
    wrong = _first(description, lambda m: m.kind == "lokr" and m.name.startswith("unet."))
    return f"it ignores {wrong}: it expects lora_unet_ or lycoris_ names" if wrong else None


def alpha_outside_metadata(description: Description) -> str | None:
    """diffusers takes the scale of lora_A/lora_B keys from the metadata and ignores `.alpha`."""
    if "lora_adapter_metadata" in description.header.metadata:
        return None
    scaled = _first(description, lambda m: m.alpha is not None and m.scale != 1)
    return f"it ignores the alpha of {scaled}" if scaled else None


def mixed_eras(description: Description) -> str | None:
    """diffusers decides by the first key how to read all keys (FORMATS.md §5.1)."""
    keys = description.header.tensors
    old = [k for k in keys if ".lora.down." in k or "_lora.down." in k]
    new = [k for k in keys if ".lora_A." in k and not k.startswith("text_encoder")]
    return "it mixes old and new key names, and diffusers reads only one kind" if old and new else None


def uneven_alphas(description: Description) -> str | None:
    """diffusers 0.42.1 stores the alphas of U-Net attention under names that match no module."""
    alphas = {m.alpha for m in description.modules if m.layers and m.layers[0].startswith("unet.")}
    return "diffusers loses the alphas of attention layers if they differ between modules" \
        if len(alphas) > 1 else None  # fmt: skip


def text_without_out_proj(description: Description) -> str | None:
    """diffusers 0.42.1 infers the version of kohya text-encoder keys from the presence of out_proj."""
    text = [layer for m in description.modules for layer in m.layers if layer.startswith("text_encoder")]
    attention = any(layer.endswith(("q_proj", "k_proj", "v_proj")) for layer in text)
    lost = attention and not any(layer.endswith("out_proj") for layer in text)
    return "diffusers loses the attention layers of a text encoder whose out_proj is not adapted" if lost else None


def no_lokr_pipeline(description: Description) -> str | None:
    taken = (description.base or "").startswith(LOKR_PIPELINES)
    return None if taken else "its pipelines for this base model reject LoKr"


def tucker(description: Description) -> str | None:
    core = any(key.endswith(".lokr_t2") for key in description.header.tensors)
    return "LyCORIS fails to load its own Tucker files" if core else None


def uneven_products(description: Description) -> str | None:
    """LyCORIS keeps w1 as a product only beside a w2 of the same rank."""
    bad = _first(description, lambda m: m.kind == "lokr" and m.left_rank is not None and m.left_rank != m.right_rank)
    return f"LyCORIS cannot build {bad}: w1 is a product, but w2 is not a product of the same rank" if bad else None


def conv_of(why: str) -> Callable[[Description], str | None]:
    def check(description: Description) -> str | None:
        conv = _first(description, lambda m: m.form.is_conv and m.kind == "lokr")
        return f"{conv} is a convolution, {why}" if conv else None

    return check


def kernel_split(description: Description) -> str | None:
    """Whether A extends into a kernel; trainers cannot build such modules."""
    bad = _first(description, lambda m: m.kind == "lokr" and m.form.is_conv
                 and channel_split(m.form).in_[0] * channel_split(m.form).in_[1] != m.weight_shape[1])  # fmt: skip
    return f"A of {bad} splits the kernel" if bad else None


def refused_loha(description: Description) -> str | None:
    found = _first(description, lambda m: m.kind == "loha")
    return f"it does not support LoHa, such as {found}" if found else None


def unknown_loha(description: Description) -> str | None:
    found = _first(description, lambda m: m.kind == "loha")
    return f"whether it loads LoHa, such as {found}, is unknown" if found else None


class Check(NamedTuple):
    tools: Sequence[str]
    formats: Sequence[str]  # () for all
    check: Callable[[Description], str | None]


_INTERFACES = ("comfyui", "forge", "a1111")
LOHA_UNKNOWN = (*_INTERFACES, "onetrainer", "musubi")  # neither run nor read completely
CHECKS = (
    Check(
        ("comfyui", "forge"),
        (),
        dora_of("out", "it computes DoRA norms without the delta, a few percent off"),
    ),
    Check(("a1111",), (), dora_of("out", "it applies a per-output DoRA magnitude to input columns")),
    Check(("diffusers",), KOHYA, dora_of("any", "diffusers drops dora_scale")),
    Check(("nunchaku", "musubi"), (), dora_of("any", "it does not support DoRA")),
    Check(_INTERFACES, KOHYA, lacks_text_model),
    Check(_INTERFACES, ("lycoris-lokr",), unknown_prefix),
    Check(("diffusers",), ("diffusers-lora",), alpha_outside_metadata),
    Check(("diffusers",), ("diffusers-lora",), mixed_eras),
    Check(("diffusers",), ("kohya-lora",), uneven_alphas),
    Check(("diffusers",), ("kohya-lora",), text_without_out_proj),
    Check(("diffusers",), ("lycoris-lokr",), no_lokr_pipeline),
    Check(("lycoris",), ("lycoris-lokr",), tucker),
    Check(("lycoris",), ("lycoris-lokr",), uneven_products),
    Check(("lycoris",), ("lycoris-lokr",), kernel_split),
    Check(("lycoris",), KOHYA, dora_of("in", "LyCORIS fails to load DoRA per input column")),
    Check(LOHA_UNKNOWN, (), unknown_loha),
    Check(("diffusers", "kohya", "nunchaku"), (), refused_loha),
    Check(("musubi",), ("lycoris-lokr",), conv_of("and musubi-tuner applies LoKr to linear layers only")),
)


def reservation(tool: str, description: Description) -> str | None:
    """Why this application loads this file incorrectly or not at all, as a clause; None if no failure is known."""
    found = (
        c.check(description) for c in CHECKS if tool in c.tools and (not c.formats or description.format in c.formats)
    )
    return next((why for why in found if why), None)


def _first(description: Description, test: Callable[[ModuleInfo], bool]) -> str | None:
    return next((m.name for m in description.modules if test(m)), None)
