"""Which tool loads what: the table behind `--for TOOL` and behind "loads in" of `krona inspect`. Torch-free.

The facts are those of FORMATS.md §5, §11, §14, §15 and §17. A tool that is asked for a LoRA and for a LoKr may want
two formats; the kind of an adapter is never changed to please it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from krona_hub.errors import UsageError
from krona_hub.formats.compatibility.format_limits import common_peft_factor, lycoris_resumes, refusal
from krona_hub.formats.compatibility.known_failures import reservation
from krona_hub.formats.forms.delta_form import LayerFactorization, SumFactorization, channel_split, is_factored
from krona_hub.formats.forms.limits import Limit, no_dora
from krona_hub.kron.shapes import KronShape

if TYPE_CHECKING:
    from krona_hub.formats.reading.description import Description


class ToolTarget(NamedTuple):
    """A format and the names that the keys of its modules take."""

    format: str
    dialect: str  # one of bases.names.DIALECTS


def only_lycoris_splits(form: LayerFactorization) -> str | None:
    """LyCORIS builds its modules from its own factorization, whatever the file holds (FORMATS.md §15.6)."""
    if form.lora_rank is not None or not form.sums or not form.sums[0].plain:
        return None
    shape = form.sums[0].shape
    if form.is_conv and form.weight_shape[1] % shape.a2:
        return f"A has {shape.a2} columns, which do not divide the {form.weight_shape[1]} input channels"
    split = channel_split(form)
    if lycoris_resumes(split) or keeps_product_for_lycoris(form):
        return None
    return f"LyCORIS derives other sizes than {shape} from this weight"


def keeps_product_for_lycoris(form: LayerFactorization) -> bool:
    """Whether LyCORIS finds its split again with w2 as a product; of some convolutions it does with a dense w2 only."""
    split = channel_split(form)
    factored = form.sums and is_factored(form.sums[0].right_rank, (split.out[1], split.in_[1]))
    return bool(factored) and lycoris_resumes(split, form.kernel)


def only_peft_splits(form: LayerFactorization) -> str | None:
    """One layer alone: is there a decompose_factor for it? Several layers must agree, which the writer checks."""
    if form.lora_rank is not None or not form.sums or (form.is_conv and form.weight_shape[1] % form.sums[0].shape.a2):
        return None
    fits = common_peft_factor([channel_split(form)]) is not None
    return None if fits else f"no decompose_factor of PEFT gives {form.sums[0].shape}"


def only_linear(form: LayerFactorization) -> str | None:
    return "it is a convolution, and musubi-tuner applies LoKr to linear layers only" if form.is_conv else None


class Tool(NamedTuple):
    """A program that loads adapters."""

    name: str
    title: str
    lora: ToolTarget | None
    lokr: ToolTarget | None
    rules: tuple[Limit, ...] = ()  # what it cannot load though the format could hold it
    split_qkv: bool = False  # wants q, k and v as modules of their own
    note: str = ""  # said beside files written for it …
    note_on: tuple[str, ...] = ()  # … of these formats


TOOLS: Mapping[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool(
            "comfyui", "ComfyUI", ToolTarget("kohya-lora", "comfyui"), ToolTarget("lycoris-lokr", "comfyui"),
            (no_dora,),
        ),
        Tool(
            "forge", "Forge", ToolTarget("kohya-lora", "comfyui"), ToolTarget("lycoris-lokr", "comfyui"),
            (no_dora,),
        ),
        Tool(
            "a1111", "AUTOMATIC1111", ToolTarget("kohya-lora", "kohya"), ToolTarget("lycoris-lokr", "kohya"),
            (no_dora,),
        ),
        Tool(
            "diffusers", "diffusers", ToolTarget("diffusers-lora", "diffusers"), ToolTarget("diffusers-lokr", "peft"),
            (only_peft_splits,),
            note="A LoKr loads with model.load_lora_adapter(file, prefix=None); the pipelines of SD, SDXL and FLUX.1 "
            "take LoRA only.",
            note_on=("diffusers-lokr",),
        ),
        Tool("peft", "PEFT", ToolTarget("peft-lora", "peft"), ToolTarget("peft-lokr", "peft"), (only_peft_splits,)),
        Tool("kohya", "kohya sd-scripts", ToolTarget("kohya-lora", "kohya-ldm"), None),
        Tool(
            "lycoris", "LyCORIS", ToolTarget("lycoris-locon", "lycoris"), ToolTarget("lycoris-lokr", "lycoris"),
            (only_lycoris_splits,),
        ),
        Tool("onetrainer", "OneTrainer", ToolTarget("kohya-lora", "kohya"), ToolTarget("lycoris-lokr", "kohya")),
        Tool(
            "musubi", "musubi-tuner", ToolTarget("kohya-lora", "kohya"), ToolTarget("lycoris-lokr", "kohya"),
            (no_dora, only_linear),
        ),
        Tool("nunchaku", "Nunchaku", ToolTarget("diffusers-lora", "diffusers"), None, (no_dora,), split_qkv=True),
    )
}  # fmt: skip


def tool_named(name: str) -> Tool:
    """The tool of that name; UsageError with the nearest one.

    >>> tool_named("ComfyUI").lokr
    ToolTarget(format='lycoris-lokr', dialect='comfyui')
    """
    from difflib import get_close_matches

    key = name.lower().replace("automatic1111", "a1111").replace("sd-scripts", "kohya")
    if key in TOOLS:
        return TOOLS[key]
    near = get_close_matches(key, TOOLS, n=1)
    raise UsageError(
        f"no tool {name!r} is known.",
        fix=f"Did you mean {near[0]}?" if near else f"Known are {', '.join(TOOLS)}.",
    )


def target_for(tool: Tool, is_lora: bool) -> ToolTarget | None:
    """Where an adapter of that kind goes for the tool; None where the tool takes no LoKr."""
    return tool.lora if is_lora else tool.lokr


def loads_form(
    target: str,
    size: tuple[int, ...],
    shape: KronShape,
    terms: int = 1,
    right_rank: int | None = None,
    left_rank: int | None = None,
) -> bool:
    """Whether `target`, a tool or a format, loads a layer of weight shape `size` in this form; for the shape search.

    The rule is that of one layer by itself. PEFT and diffusers add one over all layers, which the writer checks.

    >>> size, wide, lora = (320, 768), KronShape(64, 4, 5, 192), KronShape(1, 1, 320, 768)
    >>> loads_form("comfyui", size, wide), loads_form("peft", size, wide), loads_form("nunchaku", size, wide)
    (True, False, False)
    >>> loads_form("comfyui", size, wide, terms=7), loads_form("krona", size, wide, terms=7)
    (False, True)
    >>> loads_form("nunchaku", size, lora, right_rank=4)
    True
    """
    form = LayerFactorization(size, (SumFactorization(shape, terms, left_rank, right_rank),))
    return why_not_form(form, target) is None


def why_not_form(form: LayerFactorization, target: str) -> str | None:
    """Why `target`, a tool or a format, does not take this form, as a clause; None where it does."""
    if target not in TOOLS:
        return refusal(form, target)
    tool = TOOLS[target]
    goal = target_for(tool, form.lora_rank is not None)
    if goal is None:
        return f"{tool.title} loads LoRA only, and {refusal(form, 'kohya-lora')}"
    return next((why for rule in tool.rules if (why := rule(form))), None) or refusal(form, goal.format)


@dataclass(frozen=True)
class Verdict:
    """Whether a tool loads a file rightly, and why not (or with what reservation)."""

    ok: bool
    why: str = ""


_NO_FOLDER = "PEFT loads folders with an adapter_config.json"
_NATIVE = "only krona_hub reads its native format"
_LORA_ONLY = "it loads LoRA only"
_NO_KRONA = "current diffusers takes the keys for a LoRA and fails"
_OLD = "sd-scripts knows plain LoRA keys only, without Tucker, DoRA or .diff"
# format -> tool -> why the tool does not load it. Tools that are not listed do.
REJECTS: Mapping[str, Mapping[str, str]] = {
    "krona": dict.fromkeys(TOOLS, _NATIVE),
    "kohya-lora": {"peft": _NO_FOLDER},
    "lycoris-locon": {"peft": _NO_FOLDER, "diffusers": "its converters reject lycoris_* names", "kohya": _OLD},
    "lycoris-lokr": {
        "peft": _NO_FOLDER, "kohya": _LORA_ONLY, "nunchaku": _LORA_ONLY,
    },
    "peft-lora": {
        **dict.fromkeys([t for t in TOOLS if t != "peft"], "it does not read PEFT folders"),
        "diffusers": "its pipelines want the file that save_lora_weights writes",
    },
    "peft-lokr": dict.fromkeys([t for t in TOOLS if t != "peft"], "only PEFT reads its LoKr folders"),
    "diffusers-lora": {
        "peft": _NO_FOLDER, "kohya": "it knows kohya names only", "lycoris": "it knows its own names only",
        "a1111": "it knows kohya names only", "musubi": "it knows kohya names only",
    },
    "diffusers-lokr": {
        **dict.fromkeys([t for t in TOOLS if t != "diffusers"], "the names are those of diffusers models"),
        "peft": _NO_FOLDER, "kohya": _LORA_ONLY, "nunchaku": _LORA_ONLY,
    },
    "diffusekrona": {**dict.fromkeys(TOOLS, "only DiffuseKronA's own loader reads it"), "diffusers": _NO_KRONA},
    "cloneofsimo": dict.fromkeys(TOOLS, "modules are known by position only, which no current tool reads"),
}  # fmt: skip


def rejection(format_name: str, tool: str) -> str | None:
    """Why the tool loads no file of that format; None where it loads them, as far as the format goes."""
    if format_name not in REJECTS:
        return "it is not known whether it loads this format"
    return REJECTS[format_name].get(tool)


def loads_in(description: Description) -> Mapping[str, Verdict]:
    """For every tool, whether it loads the described file with the meaning that the file has."""
    return {name: _verdict(tool, description) for name, tool in TOOLS.items()}


def _verdict(tool: Tool, description: Description) -> Verdict:
    why = rejection(description.format, tool.name) or reservation(tool.name, description)
    if why is None and tool.name == "lycoris":  # its own files may still have splits that it does not derive
        refused = ((m.name, only_lycoris_splits(m.form)) for m in description.modules if m.kind == "lokr")
        why = next((f"{name}: {clause}" for name, clause in refused if clause), None)
    return Verdict(why is None, why or "")
