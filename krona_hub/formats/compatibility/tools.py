"""Which application loads what: the table behind `--for` and behind "loads in" of `krona inspect`. Torch-free.

Sources: FORMATS.md §5, §11, §14, §15 and §17. An application may load LoRA and LoKr from two different formats; the
kind of an adapter never changes to suit the application.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from krona_hub.bases.families import FAMILIES
from krona_hub.bases.ldm_names import is_unet
from krona_hub.errors import UsageError, counted
from krona_hub.formats.compatibility.format_limits import common_peft_factor, lycoris_resumes, refusal
from krona_hub.formats.compatibility.known_failures import reservation
from krona_hub.formats.forms.delta_form import LayerFactorization, SumFactorization, channel_split, is_factored
from krona_hub.formats.forms.limits import Limit, no_dora
from krona_hub.formats.forms.vector_kinds import NORMS, Kinds
from krona_hub.formats.known.registry import by_name
from krona_hub.kron.shapes import KronShape

if TYPE_CHECKING:
    from krona_hub.formats.reading.description import Description


class ToolTarget(NamedTuple):
    """A format and the dialect of its module names."""

    format: str
    dialect: str  # a key of bases.dialects.DIALECTS, or lycoris


def only_lycoris_splits(form: LayerFactorization) -> str | None:
    """LyCORIS builds modules from its own factorization, regardless of the file (FORMATS.md §15.6)."""
    if form.lora_rank is not None or not form.sums or not form.sums[0].plain:
        return None
    shape = form.sums[0].shape
    if form.is_conv and form.weight_shape[1] % shape.a2:
        return f"the {shape.a2} columns of A do not divide the {form.weight_shape[1]} input channels"
    split = channel_split(form)
    if lycoris_resumes(split) or keeps_product_for_lycoris(form):
        return None
    return f"LyCORIS derives a shape other than {shape} for this weight"


def keeps_product_for_lycoris(form: LayerFactorization) -> bool:
    """Whether LyCORIS derives the same split with w2 as a product; for some convolutions only a dense w2 works."""
    split = channel_split(form)
    factored = form.sums and is_factored(form.sums[0].right_rank, (split.out[1], split.in_[1]))
    return bool(factored) and lycoris_resumes(split, form.kernel)


def only_peft_splits(form: LayerFactorization) -> str | None:
    """Whether a decompose_factor exists for this layer alone; the writer checks that all layers agree on one."""
    if form.lora_rank is not None or not form.sums or (form.is_conv and form.weight_shape[1] % form.sums[0].shape.a2):
        return None
    fits = common_peft_factor([channel_split(form)]) is not None
    return None if fits else f"no decompose_factor of PEFT yields the shape {form.sums[0].shape}"


def only_linear(form: LayerFactorization) -> str | None:
    return "it is a convolution, and musubi-tuner applies LoKr to linear layers only" if form.is_conv else None


class Tool(NamedTuple):
    """An application that loads adapters."""

    name: str
    title: str
    lora: ToolTarget | None
    lokr: ToolTarget | None
    rules: tuple[Limit, ...] = ()  # what it cannot load although the format can store it
    split_qkv: bool = False  # requires q, k and v as separate modules
    vectors: Kinds | None = ()  # that it loads; None: those that the format has a place for
    embeddings: bool = False  # whether it loads embeddings from the file
    note: str = ""  # shown for files written for it …
    note_on: tuple[str, ...] = ()  # … of these formats


TOOLS: Mapping[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool(
            "comfyui", "ComfyUI", ToolTarget("kohya-lora", "comfyui"), ToolTarget("lycoris-lokr", "comfyui"),
            (no_dora,), vectors=("adapted bias", "bias", "unet norm", "transformer norm"),
        ),
        Tool(
            "forge", "Forge", ToolTarget("kohya-lora", "comfyui"), ToolTarget("lycoris-lokr", "comfyui"),
            (no_dora,), vectors=("adapted bias", "bias", "unet norm"),
        ),
        Tool(
            "a1111", "AUTOMATIC1111", ToolTarget("kohya-lora", "kohya"), ToolTarget("lycoris-lokr", "kohya"),
            (no_dora,), vectors=("unet norm",), embeddings=True,
        ),
        Tool(
            "diffusers", "diffusers", ToolTarget("diffusers-lora", "diffusers"), ToolTarget("diffusers-lokr", "peft"),
            (only_peft_splits,), vectors=None,
            note="Load a LoKr with model.load_lora_adapter(file, prefix=None); the pipelines of SD, SDXL and FLUX.1 "
            "load LoRA only.",
            note_on=("diffusers-lokr",),
        ),
        Tool(
            "peft", "PEFT", ToolTarget("peft-lora", "peft"), ToolTarget("peft-lokr", "peft"), (only_peft_splits,),
            vectors=None,
        ),
        Tool("kohya", "kohya sd-scripts", ToolTarget("kohya-lora", "kohya-ldm"), None),
        Tool(
            "lycoris", "LyCORIS", ToolTarget("lycoris-locon", "lycoris"), ToolTarget("lycoris-lokr", "lycoris"),
            (only_lycoris_splits,), vectors=NORMS,
        ),
        Tool(
            "onetrainer", "OneTrainer", ToolTarget("kohya-lora", "kohya"), ToolTarget("lycoris-lokr", "kohya"),
            embeddings=True,
        ),
        Tool(
            "musubi", "musubi-tuner", ToolTarget("kohya-lora", "kohya"), ToolTarget("lycoris-lokr", "kohya"),
            (no_dora, only_linear),
        ),
        Tool("nunchaku", "Nunchaku", ToolTarget("diffusers-lora", "diffusers"), None, (no_dora,), split_qkv=True),
    )
}  # fmt: skip


def tool_named(name: str) -> Tool:
    """The application of that name. Raises UsageError, with a suggestion, for an unknown name.

    >>> tool_named("ComfyUI").lokr
    ToolTarget(format='lycoris-lokr', dialect='comfyui')
    """
    from difflib import get_close_matches

    key = name.lower().replace("automatic1111", "a1111").replace("sd-scripts", "kohya")
    if key in TOOLS:
        return TOOLS[key]
    near = get_close_matches(key, TOOLS, n=1)
    raise UsageError(
        f"Unknown application {name!r}.",
        fix=f"Did you mean {near[0]!r}?" if near else f"Choose one of {', '.join(TOOLS)}.",
    )


def target_for(tool: Tool, is_lora: bool) -> ToolTarget | None:
    """The format and dialect in which the application loads that kind of adapter; None if it does not load LoKr."""
    return tool.lora if is_lora else tool.lokr


def loads_form(
    target: str,
    size: tuple[int, ...],
    shape: KronShape,
    terms: int = 1,
    right_rank: int | None = None,
    left_rank: int | None = None,
) -> bool:
    """Whether `target`, an application or a format, accepts this factorization of a layer of weight shape `size`.

    Covers rules about single layers only; the writer checks the rule of PEFT and diffusers about all layers.

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
    """Why `target`, an application or a format, does not accept this factorization, as a clause; None if it does."""
    if target not in TOOLS:
        return refusal(form, target)
    tool = TOOLS[target]
    goal = target_for(tool, form.lora_rank is not None)
    if goal is None:
        return f"{tool.title} loads LoRA only, and {refusal(form, 'kohya-lora')}"
    return next((why for rule in tool.rules if (why := rule(form))), None) or refusal(form, goal.format)


@dataclass(frozen=True)
class Verdict:
    """Whether an application loads a file correctly, and if not, why."""

    ok: bool
    why: str = ""


UNKNOWN_BASE = "the base model is unknown, and which names an application expects depends on it"
UNKNOWN_RUN = "whether it runs this base model and knows these names is not recorded"
RECORDED = (  # base models for which the formats that applications load are recorded
    "sd15", "sd21-base", "sd21", "sdxl", "sdxl-refiner", "sd3-medium", "sd35-medium", "sd35-large", "flux1-dev",
    "flux1-schnell", "chroma", "flux2-dev", "flux2-klein-4b", "flux2-klein-9b", "z-image", "qwen-image",
    "pixart-sigma-xl", "lumina2", "sana-1600m", "hidream-i1", "wan21-t2v-1.3b", "wan21-t2v-14b", "hunyuan-video",
    "krea2", "auraflow", "tiny-scenes",
)  # fmt: skip
OPEN = (UNKNOWN_BASE, UNKNOWN_RUN)  # reasons that leave the question open
_NO_FOLDER = "PEFT loads only folders with an adapter_config.json"
_NATIVE = "only krona_hub reads its native format"
_LORA_ONLY = "it loads LoRA only"
_NO_KRONA = "current diffusers mistakes the keys for LoRA and fails"
_OLD = "sd-scripts supports plain LoRA keys only, without Tucker, DoRA or .diff"
# format -> application -> why it does not load the format; applications that are not listed do
REJECTS: Mapping[str, Mapping[str, str]] = {
    "krona": dict.fromkeys(TOOLS, _NATIVE),
    "kohya-lora": {"peft": _NO_FOLDER},
    "lycoris-locon": {"peft": _NO_FOLDER, "diffusers": "its converters reject lycoris_* names", "kohya": _OLD},
    "lycoris-lokr": {
        "peft": _NO_FOLDER, "kohya": _LORA_ONLY, "nunchaku": _LORA_ONLY,
    },
    "lycoris-loha": {
        "peft": _NO_FOLDER, "diffusers": "its loaders require 'lora' in all names", "kohya": _OLD,
        "nunchaku": _LORA_ONLY,
    },
    "peft-loha": dict.fromkeys([t for t in TOOLS if t != "peft"], "only PEFT reads PEFT LoHa folders"),
    "peft-lora": {
        **dict.fromkeys([t for t in TOOLS if t != "peft"], "it does not read PEFT folders"),
        "diffusers": "its pipelines require a file written by save_lora_weights",
    },
    "peft-lokr": dict.fromkeys([t for t in TOOLS if t != "peft"], "only PEFT reads PEFT LoKr folders"),
    "diffusers-lora": {
        "peft": _NO_FOLDER, "kohya": "it supports kohya names only", "lycoris": "it supports its own names only",
        "a1111": "it supports kohya names only", "musubi": "it supports kohya names only",
    },
    "diffusers-lokr": {
        **dict.fromkeys([t for t in TOOLS if t != "diffusers"], "the keys are module paths of diffusers models"),
        "peft": _NO_FOLDER, "kohya": _LORA_ONLY, "nunchaku": _LORA_ONLY,
    },
    "diffusekrona": {**dict.fromkeys(TOOLS, "only DiffuseKronA itself reads this format"), "diffusers": _NO_KRONA},
    "cloneofsimo": dict.fromkeys(TOOLS, "no current application reads modules identified by position"),
}  # fmt: skip


def rejection(format_name: str, tool: str) -> str | None:
    """Why the application does not load files of that format; None if it does, as far as the format is concerned."""
    if format_name not in REJECTS:
        return "support for this format is unknown"
    return REJECTS[format_name].get(tool)


def is_recorded(base: str | None) -> bool:
    """Whether the formats that applications load are recorded for this base model, or it is none of the catalog."""
    return base not in FAMILIES or base in RECORDED


def loads_in(description: Description) -> Mapping[str, Verdict]:
    """For every application, whether it loads the described file correctly."""
    return {name: _verdict(tool, description) for name, tool in TOOLS.items()}


def _verdict(tool: Tool, description: Description) -> Verdict:
    why = rejection(description.format, tool.name)
    if why is None and (description.base is None or _is_unlisted(description)):
        return Verdict(False, UNKNOWN_BASE)
    if why is None and not is_recorded(description.base):
        return Verdict(False, UNKNOWN_RUN)
    why = why or reservation(tool.name, description)
    if why is None and tool.name == "lycoris":  # a LyCORIS file can have splits that LyCORIS does not derive
        refused = ((m.name, only_lycoris_splits(m.form)) for m in description.modules if m.kind == "lokr")
        why = next((f"{name}: {clause}" for name, clause in refused if clause), None)
    why = why or _ignored_vectors(tool, description)
    return Verdict(why is None, why or "")


def _is_unlisted(description: Description) -> bool:
    """Whether the base model was given by its files, and has an architecture that the catalog does not list."""
    bases = [plan.match.base for plan in description.plans if plan.match.base is not None]
    parts = [base.components[base.denoiser] for base in bases if base.denoiser and base.family is None]
    return any(not (is_unet(part) or part.original) for part in parts)


def held_vectors(format_name: str, tool: Tool | None) -> Kinds:
    """The kinds of vectors that a file of the format can hold, and that the application loads from it."""
    storage = by_name(format_name).storage
    held = storage.vectors if storage else ()
    return held if tool is None or tool.vectors is None else tool.vectors


def _ignored_vectors(tool: Tool, description: Description) -> str | None:
    """Why the application does not apply all vectors of the file; None if it does, or if there are none."""
    if tool.name == "peft":  # a PEFT folder holds only vectors that PEFT wrote, and loads
        return None
    held = held_vectors(description.format, tool)
    lost = sum(v.kind not in held for v in description.vectors)
    return f"it ignores {counted(lost, 'vector')} (biases, norms)" if lost else None
