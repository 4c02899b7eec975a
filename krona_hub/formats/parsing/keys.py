"""Grammars of adapter keys, as tables: key of any file → its module and part. Torch-free.

Files mix grammars (FORMATS §5.1), so each key is parsed on its own and the parts are grouped afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from krona_hub.errors import ConflictError, IncompleteError


class KeyPart(NamedTuple):
    """The part of a module that a key names."""

    kind: str  # lora, lokr, loha, cdka, dense, value; "" for parts of any kind; vector; foreign
    name: str  # canonical name of the part
    grammar: str  # family of applications that writes such keys


TAILS: Mapping[str, KeyPart] = {  # end of a key, after the module name -> part
    "lokr_w1": KeyPart("lokr", "w1", "lokr"),
    "lokr_w1_a": KeyPart("lokr", "w1_a", "lokr"),
    "lokr_w1_b": KeyPart("lokr", "w1_b", "lokr"),
    "lokr_w2": KeyPart("lokr", "w2", "lokr"),
    "lokr_w2_a": KeyPart("lokr", "w2_a", "lokr"),
    "lokr_w2_b": KeyPart("lokr", "w2_b", "lokr"),
    "lokr_t2": KeyPart("lokr", "t2", "lokr"),
    "hada_w1_a": KeyPart("loha", "w1_a", "loha"),
    "hada_w1_b": KeyPart("loha", "w1_b", "loha"),
    "hada_w2_a": KeyPart("loha", "w2_a", "loha"),
    "hada_w2_b": KeyPart("loha", "w2_b", "loha"),
    "hada_t1": KeyPart("loha", "t1", "loha"),
    "hada_t2": KeyPart("loha", "t2", "loha"),
    "lora_down.weight": KeyPart("lora", "down", "kohya"),
    "lora_up.weight": KeyPart("lora", "up", "kohya"),
    "lora_mid.weight": KeyPart("lora", "mid", "kohya"),
    "lora_A.weight": KeyPart("lora", "down", "peft"),
    "lora_B.weight": KeyPart("lora", "up", "peft"),
    "lora.down.weight": KeyPart("lora", "down", "diffusers"),
    "lora.up.weight": KeyPart("lora", "up", "diffusers"),
    "lora_linear_layer.down.weight": KeyPart("lora", "down", "diffusers"),
    "lora_linear_layer.up.weight": KeyPart("lora", "up", "diffusers"),
    "lora_layer.down.weight": KeyPart("lora", "down", "processor"),
    "lora_layer.up.weight": KeyPart("lora", "up", "processor"),
    "_lora.down.weight": KeyPart("lora", "down", "processor"),
    "_lora.up.weight": KeyPart("lora", "up", "processor"),
    "cdka_a": KeyPart("cdka", "cdka_a", "cdka"),
    "cdka_b": KeyPart("cdka", "cdka_b", "cdka"),
    "diff": KeyPart("dense", "diff", "dense"),
    "alpha": KeyPart("", "alpha", ""),
    "lora.alpha": KeyPart("", "alpha", ""),
    "_lora.alpha": KeyPart("", "alpha", ""),
    "dora_scale": KeyPart("", "dora_scale", ""),
    "lora_magnitude_vector": KeyPart("", "magnitude", ""),
    "lora_magnitude_vector.weight": KeyPart("", "magnitude", ""),
    "magnitude": KeyPart("", "magnitude", ""),  # ai-toolkit
    "diff_b": KeyPart("vector", "bias", ""),
    "w_norm": KeyPart("vector", "weight", ""),
    "b_norm": KeyPart("vector", "bias", ""),
    "diff_m": KeyPart("vector", "modulation", ""),
    "lora_up.bias": KeyPart("scaled vector", "bias", ""),
    "lora_B.bias": KeyPart("scaled vector", "bias", ""),
    "set_weight": KeyPart("value", "weight", "value"),
}
PEFT_TAILS: Mapping[str, KeyPart] = {  # parameters that PEFT trains and stores as they are: bias=, modules_to_save=
    "base_layer.bias": KeyPart("value", "bias", "peft"),
    "bias": KeyPart("value", "bias", "peft"),
    "weight": KeyPart("value", "weight", "peft"),
}
FOREIGN: Mapping[str, str] = {  # end of a key -> its algorithm, explained in `foreign`
    **dict.fromkeys(("q_layer.weight", "p_layer.weight", "lambda_layer"), "T-LoRA"),
    **dict.fromkeys(("base_q", "base_p", "base_lambda"), "T-LoRA"),
    **dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"), "GLoRA"),
    **dict.fromkeys(("glora_A", "glora_B", "glora_C", "glora_D", "glora_E"), "GLoRA"),
    **dict.fromkeys(("oft_blocks", "oft_diag", "oft_r", "oft_s", "oft_R", "oft_R.weight", "rescale"), "OFT or BOFT"),
    **dict.fromkeys(("boft_R", "boft_s"), "BOFT"),
    **dict.fromkeys(("ia3_l", "on_input"), "IA3"),
    **dict.fromkeys(("lora_E", "ranknum"), "AdaLoRA"),
    **dict.fromkeys(("lora_embedding_A", "lora_embedding_B"), "LoRA of an embedding"),
    **dict.fromkeys(("vera_lambda_b", "vera_lambda_d"), "VeRA"),
    **dict.fromkeys(("pvera_lambda_b", "pvera_lambda_d"), "PVeRA"),
    **dict.fromkeys(("randlora_lambda", "randlora_gamma"), "RandLoRA"),
    **dict.fromkeys(("hira_A", "hira_B"), "HiRA"),
    **dict.fromkeys(("gralora_A", "gralora_B", "gralora_A_general", "gralora_B_general"), "GraLoRA"),
    **dict.fromkeys(("delora_A", "delora_B", "delora_lambda"), "DeLoRA"),
    **dict.fromkeys(("road_theta", "road_alpha"), "RoAd"),
    **dict.fromkeys(("lora_down", "lora_up", "proj_down", "proj_up"), "Nunchaku"),
    **dict.fromkeys(("wscales", "wtscale", "wcscales", "smooth", "smooth_orig"), "Nunchaku"),
    **dict.fromkeys(("smooth_factor", "smooth_factor_orig"), "Nunchaku"),
    **dict.fromkeys(("qweight", "qzeros"), "GPTQ, AWQ or Nunchaku"),
    "reshape_weight": "control LoRA",
    "lokr_t1": "LoKr with lokr_t1, which no trainer writes",
    "shira_weight": "SHiRA",
    "waveft_spectrum": "WaveFT",
    "trainable_tokens_delta": "trainable tokens",
    "c3a_kernel": "C3A",
    "hra_u": "HRA",
    "fourierft_spectrum": "FourierFT",
    "miss_block": "MiSS",
    "bone_block": "Bone",
    "vblora_vector_bank": "VB-LoRA",
}
POSITIONAL = re.compile(r"(unet|text_encoder):([0-9]{1,6}):(up|down)")  # cloneofsimo: modules are numbered
XLABS = re.compile(r"(.+\.processor\.(?:qkv|proj)_lora[12])\.(down|up)\.weight")  # x-flux, double blocks
ADAPTER_NAME = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.(?!weight$|bias$)[^.]+(\.weight|\.bias)?$")
COPIES = re.compile(r"\.(?:modules_to_save|original_module)\.")  # PEFT stores their biases twice with bias="all"
EMBEDDINGS = ("bundle_emb.", "emb_params")  # textual-inversion embeddings in the same file (OneTrainer)
OPTIONAL = ("mid", "alpha", "dora_scale", "magnitude")


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors of one module of a file."""

    name: str  # as in the file, without the part
    kind: str  # lora, lokr, loha, cdka, dense, or value: the tensor replaces the weight
    parts: Mapping[str, str]  # part -> key of the tensor
    grammars: frozenset[str]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.parts.values())


class VectorKey(NamedTuple):
    """The key of a tensor that changes a bias, a norm or another parameter that is not the weight of a layer."""

    key: str
    module: str  # as in the file
    parameter: str  # weight, bias or modulation
    is_value: bool  # the tensor is the new parameter rather than a difference
    is_scaled: bool  # multiplied by the scale of the module


@dataclass(frozen=True)
class Keys:
    """Every tensor of a file, by role."""

    modules: tuple[ModuleTensors, ...]
    vectors: tuple[VectorKey, ...] = ()
    extras: tuple[str, ...] = ()  # embeddings: kept, but not changes of parameters
    foreign: Mapping[str, str] | None = None  # module -> an unsupported algorithm
    unknown: tuple[str, ...] = ()  # keys of no grammar
    orphans: tuple[str, ...] = ()  # modules with an alpha or a magnitude, but no delta

    @property
    def grammars(self) -> frozenset[str]:
        return frozenset(g for module in self.modules for g in module.grammars)

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(module.kind for module in self.modules)


def split_key(key: str, peft: bool = False) -> tuple[str, KeyPart] | None:
    """Split a key into its module and part; None if no grammar matches. PEFT folders also store plain parameters.

    >>> split_key("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight")
    ('lora_unet_mid_block_attentions_0_proj_in', KeyPart(kind='lora', name='down', grammar='kohya'))
    >>> split_key("unet.mid_block.attn1.processor.to_out_lora.up.weight")[0]
    'unet.mid_block.attn1.processor.to_out'
    >>> split_key("base_model.model.to_q.lora_A.default.weight")[0]
    'base_model.model.to_q'
    >>> split_key("unet:3:up")
    ('unet:3', KeyPart(kind='lora', name='up', grammar='cloneofsimo'))
    """
    if match := POSITIONAL.fullmatch(key):
        return f"{match[1]}:{match[2]}", KeyPart("lora", match[3], "cloneofsimo")
    if match := XLABS.fullmatch(key):
        return match[1], KeyPart("lora", match[2], "processor")
    key = ADAPTER_NAME.sub(r".\1\2", key)
    for tail in _tails(key):
        if tail in TAILS:
            return _module(key, tail), TAILS[tail]
        if tail in FOREIGN:
            return _module(key, tail), KeyPart("foreign", FOREIGN[tail], "")
    plain = [tail for tail in PEFT_TAILS if peft and key.endswith(f".{tail}")]
    return (_module(key, plain[0]), PEFT_TAILS[plain[0]]) if plain else None


def _tails(key: str) -> Iterable[str]:
    """The last three, two and one segments of a key; of a segment that ends in `_lora`, only that suffix."""
    segments = key.split(".")
    for count in (3, 2, 1):
        if len(segments) > count:
            yield ".".join(segments[-count:])
        if len(segments) >= count and segments[-count].endswith("_lora"):
            yield ".".join(["_lora", *segments[len(segments) - count + 1 :]])


def _module(key: str, tail: str) -> str:
    return key[: -len(tail)].removesuffix(".")


def sort_keys(
    names: Iterable[str], metadata: Mapping[str, str], flat: Container[str] = (), *, peft: bool = False
) -> Keys:
    """Group the tensors of a file by module; `flat` are the one-dimensional ones, whose `.diff` belongs to a norm.

    Raises ConflictError if two keys are the same part of a module, IncompleteError if one module has two kinds of
    delta.
    """
    modules: dict[str, dict[str, tuple[str, KeyPart]]] = {}
    foreign: dict[str, str] = {}
    vectors, extras, unknown = [], [], []
    present = set(names)
    for key in sorted(present):
        if peft and COPIES.sub(".", key) in present - {key}:
            continue
        found = split_key(key, peft)
        if _is_embedding(key, metadata):
            extras.append(key)
        elif found is None:
            unknown.append(key)
        elif vector := _vector(key, *found, flat=key in flat):
            vectors.append(vector)
        elif found[1].kind == "foreign":
            foreign[found[0]] = found[1].name
        else:
            _add(modules.setdefault(found[0], {}), key, found)
    unknown = [key for key in unknown if key.rpartition(".")[0] not in foreign]  # `weight` of IA3
    groups = {name: _group(name, parts) for name, parts in modules.items() if name not in foreign}
    orphans = tuple(name for name, group in groups.items() if group is None)
    return Keys(tuple(g for g in groups.values() if g), tuple(vectors), tuple(extras), foreign, tuple(unknown), orphans)


def _is_embedding(key: str, metadata: Mapping[str, str]) -> bool:
    return key.startswith(EMBEDDINGS) or metadata.get(key) == "<embed>" or (key[:1] == "<" and key[-1:] == ">")


def _vector(key: str, module: str, part: KeyPart, *, flat: bool) -> VectorKey | None:
    """The vector of a key; None for a part of a layer's delta."""
    if part.kind in ("vector", "scaled vector"):
        return VectorKey(key, module, part.name, is_value=False, is_scaled=part.kind == "scaled vector")
    if part.kind == "value" and (flat or part.name == "bias"):
        return VectorKey(key, module, part.name, is_value=True, is_scaled=False)
    if part.kind == "dense" and flat:
        return VectorKey(key, module, "weight", is_value=False, is_scaled=False)
    return None


def _add(parts: dict[str, tuple[str, KeyPart]], key: str, found: tuple[str, KeyPart]) -> None:
    module, part = found
    if part.name in parts:
        raise ConflictError(
            f"{module}: {parts[part.name][0]} and {key} are both the part {part.name!r}.",
            fix="The file contains two adapters; save them separately with the application that wrote it.",
        )
    parts[part.name] = (key, part)


def _group(name: str, parts: Mapping[str, tuple[str, KeyPart]]) -> ModuleTensors | None:
    kinds = sorted({part.kind for _, part in parts.values()} - {""})
    if len(kinds) > 1:
        raise IncompleteError(
            f"{name} mixes tensors of {' and '.join(kinds)}.",
            fix="Save the adapter again with the application that wrote it.",
        )
    if not kinds:
        return None
    grammars = frozenset(part.grammar for _, part in parts.values()) - {""}
    return ModuleTensors(name, kinds[0], {part: key for part, (key, _) in parts.items()}, grammars)
