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

    kind: str  # lora, lokr, loha, cdka, dense; "" for parts of any kind; bias, norm; foreign
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
    "diff_b": KeyPart("bias", "diff_b", ""),
    "lora_up.bias": KeyPart("bias", "bias", ""),
    "lora_B.bias": KeyPart("bias", "bias", ""),
    "w_norm": KeyPart("norm", "w_norm", ""),
    "b_norm": KeyPart("norm", "b_norm", ""),
}
FOREIGN: Mapping[str, str] = {  # end of a key -> its algorithm, none of them a Kronecker or low-rank product
    **dict.fromkeys(("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight"), "GLoRA"),
    **dict.fromkeys(("oft_blocks", "oft_diag", "oft_r", "oft_s", "oft_R.weight", "rescale"), "OFT or BOFT"),
    **dict.fromkeys(("boft_R", "boft_s"), "BOFT"),
    **dict.fromkeys(("ia3_l", "on_input"), "IA3"),
    **dict.fromkeys(("lora_E", "ranknum"), "AdaLoRA"),
    **dict.fromkeys(("lora_embedding_A", "lora_embedding_B"), "LoRA of an embedding"),
    **dict.fromkeys(("vera_lambda_b", "vera_lambda_d"), "VeRA"),
    "lokr_t1": "LoKr with lokr_t1, which no trainer writes",
    "c3a_kernel": "C3A",
    "hra_u": "HRA",
    "fourierft_spectrum": "FourierFT",
    "miss_block": "MiSS",
    "bone_block": "Bone",
    "vblora_vector_bank": "VB-LoRA",
}
POSITIONAL = re.compile(r"(unet|text_encoder):([0-9]{1,6}):(up|down)")  # cloneofsimo: modules are numbered
ADAPTER_NAME = re.compile(r"\.(lora_[AB]|lora_magnitude_vector)\.(?!weight$|bias$)[^.]+(\.weight|\.bias)?$")
EMBEDDINGS = ("bundle_emb.", "emb_params")  # textual-inversion embeddings in the same file (OneTrainer)
OPTIONAL = ("mid", "alpha", "dora_scale", "magnitude")


@dataclass(frozen=True)
class ModuleTensors:
    """The tensors of one module of a file."""

    name: str  # as in the file, without the part
    kind: str  # lora, lokr, loha, cdka or dense
    parts: Mapping[str, str]  # part -> key of the tensor
    grammars: frozenset[str]

    @property
    def keys(self) -> tuple[str, ...]:
        return tuple(self.parts.values())


@dataclass(frozen=True)
class Keys:
    """Every tensor of a file, by role."""

    modules: tuple[ModuleTensors, ...]
    extras: tuple[str, ...] = ()  # embeddings, norms, biases: kept, but not deltas of weights
    foreign: Mapping[str, str] | None = None  # module -> an unsupported algorithm
    unknown: tuple[str, ...] = ()  # keys of no grammar
    orphans: tuple[str, ...] = ()  # modules with an alpha or a magnitude, but no delta

    @property
    def grammars(self) -> frozenset[str]:
        return frozenset(g for module in self.modules for g in module.grammars)

    @property
    def kinds(self) -> frozenset[str]:
        return frozenset(module.kind for module in self.modules)


def split_key(key: str) -> tuple[str, KeyPart] | None:
    """Split a key into its module and part; None if no grammar matches.

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
    key = ADAPTER_NAME.sub(r".\1\2", key)
    for tail in _tails(key):
        if tail in TAILS:
            return _module(key, tail), TAILS[tail]
        if tail in FOREIGN:
            return _module(key, tail), KeyPart("foreign", FOREIGN[tail], "")
    return None


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


def sort_keys(names: Iterable[str], metadata: Mapping[str, str], vectors: Container[str] = ()) -> Keys:
    """Group the tensors of a file by module; `vectors` are the one-dimensional ones, whose `.diff` belongs to a norm.

    Raises ConflictError if two keys are the same part of a module, IncompleteError if one module has two kinds of
    delta.
    """
    modules: dict[str, dict[str, tuple[str, KeyPart]]] = {}
    foreign: dict[str, str] = {}
    extras, unknown = [], []
    for key in sorted(names):
        found = split_key(key)
        if _is_embedding(key, metadata) or (found and _is_extra(found[1], key in vectors)):
            extras.append(key)
        elif found is None:
            unknown.append(key)
        elif found[1].kind == "foreign":
            foreign[found[0]] = found[1].name
        else:
            _add(modules.setdefault(found[0], {}), key, found)
    groups = {name: _group(name, parts) for name, parts in modules.items() if name not in foreign}
    orphans = tuple(name for name, group in groups.items() if group is None)
    return Keys(tuple(g for g in groups.values() if g), tuple(extras), foreign, tuple(unknown), orphans)


def _is_embedding(key: str, metadata: Mapping[str, str]) -> bool:
    return key.startswith(EMBEDDINGS) or metadata.get(key) == "<embed>" or (key[:1] == "<" and key[-1:] == ">")


def _is_extra(part: KeyPart, vector: bool) -> bool:
    return part.kind in ("bias", "norm") or (part.kind == "dense" and vector)


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
