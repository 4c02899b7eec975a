"""Pack modules into the files of a format: keys, tensors, metadata, configuration. One function per layout."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.adapters.unknown_base import UNKNOWN
from krona_hub.checkpoints.file_names import PEFT_CONFIG, PEFT_WEIGHTS
from krona_hub.errors import InexpressibleError
from krona_hub.formats.compatibility.applications import Application
from krona_hub.formats.forms.delta_form import ChannelSplit
from krona_hub.formats.forms.normal_forms import form_of, lora_of, padded, with_lora
from krona_hub.formats.known.registry import storage_of
from krona_hub.formats.parsing.own_names import WRAPPER
from krona_hub.formats.writing.encode import CONVENTION, Convention, tensors_of
from krona_hub.formats.writing.kohya_metadata import kohya_metadata
from krona_hub.formats.writing.peft_config import LokrModule, keeps_left_products, lokr_config, lora_config
from krona_hub.kron.terms import KronTerms, LowRank, stored_rank


class FileModule(NamedTuple):
    """One module of the file to be written, in the normal form of its format."""

    name: str  # as in the file, without the parameter
    component: str  # unet, transformer, text_encoder, …
    path: str  # within the component, as in the loaded model
    delta: LayerDelta
    bias: Tensor | None = None  # stored as lora_B.bias


@dataclass(frozen=True)
class Context:
    """What the metadata of the file depend on besides the tensors."""

    family: str | None = None  # catalog name of the base model
    base_id: str | None = None  # Hub id or path of the base model
    metadata: Mapping[str, str] = field(default_factory=dict)  # metadata of the source file
    trigger_words: tuple[str, ...] = ()
    others: Mapping[str, Collection[str]] = field(default_factory=dict)  # component -> module paths of the base
    beside: Mapping[str, Tensor] = field(default_factory=dict)  # key -> tensor that belongs to no layer
    application: Application | None = None  # that loads the file


class Tensors(NamedTuple):
    """Content of a safetensors file."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


@dataclass(frozen=True)
class FileSet:
    """Files to write: relative name -> content; the name "" stands for the output path itself."""

    files: Mapping[str, Tensors]
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_file(self) -> bool:
        return "" in self.files


def pack(format_name: str, modules: Sequence[FileModule], context: Context) -> FileSet:
    """Pack modules into the files of `format_name`."""
    return PACKERS[storage_of(format_name).layout](format_name, modules, context)


def _kohya(format_name: str, modules: Sequence[FileModule], context: Context) -> FileSet:
    tensors = _keyed(format_name, [(m.name, m) for m in modules], _convention(modules, context.application))
    ranks = [int(t) for key, t in tensors.items() if key.endswith(".alpha")]
    metadata = kohya_metadata(format_name, ranks, context.family, context.metadata, context.trigger_words)
    return FileSet({"": Tensors({**tensors, **context.beside}, metadata)})


def _plain(format_name: str, modules: Sequence[FileModule], context: Context) -> FileSet:
    return FileSet({"": Tensors(_keyed(format_name, [(m.name, m) for m in modules]), {"format": "pt"})})


def _diffusers_lora(format_name: str, modules: Sequence[FileModule], context: Context) -> FileSet:
    """As save_lora_weights writes: `unet.….lora_A.weight`, and a configuration per component in the metadata."""
    config = {
        key if component == UNKNOWN else f"{component}.{key}": value
        for component, members in _by_component(modules).items()
        for key, value in _lora_config(format_name, members, context).items()
    }
    tensors = _keyed(format_name, [(m.name, m) for m in modules])
    return FileSet({"": Tensors(tensors, _adapter_metadata(config))})


def _diffusers_lokr(format_name: str, modules: Sequence[FileModule], context: Context) -> FileSet:
    """As save_lora_adapter writes: keys without a component, so only one component is possible."""
    members = _only_component(modules, "A diffusers LoKr file")
    keyed = _keyed(format_name, [(m.path, m) for m in members], Convention(flat_conv3d=False))
    return FileSet({"": Tensors(keyed, _adapter_metadata(_lokr_config(members, context)))})


def _peft(format_name: str, modules: Sequence[FileModule], context: Context) -> FileSet:
    """A folder; for several components, one subfolder each."""
    groups = _by_component(modules)
    files, texts = {}, {}
    for component, members in groups.items():
        folder = f"{component}/" if len(groups) > 1 else ""
        if storage_of(format_name).kind == "kronecker":
            config = _lokr_config(members, context)
        else:
            config = _lora_config(format_name, members, context)
        named = [(f"{WRAPPER}{m.path.removeprefix(WRAPPER)}", m) for m in members]
        keyed = _keyed(format_name, named, Convention(flat_conv3d=False))
        files[f"{folder}{PEFT_WEIGHTS}"] = Tensors(keyed, {"format": "pt"})
        config = {**config, "base_model_name_or_path": context.base_id}
        texts[f"{folder}{PEFT_CONFIG}"] = json.dumps(config, indent=2, sort_keys=True) + "\n"
    return FileSet(files, texts)


PACKERS: Mapping[str, Callable[[str, Sequence[FileModule], Context], FileSet]] = {  # layout of a format -> packer
    "kohya": _kohya,
    "diffusers-lora": _diffusers_lora,
    "diffusers-lokr": _diffusers_lokr,
    "peft-lora": _peft,
    "peft-lokr": _peft,
    "plain": _plain,
}


LOKR_CONFIGS = ("diffusers-lokr", "peft-lokr")  # layouts with one PEFT configuration for all LoKr modules


def full_alpha(modules: Sequence[FileModule]) -> float:
    """The alpha of layers with two full factors, for OneTrainer: the rank of the factored ones, which it divides by."""
    ranks = (r for m in modules for s in m.delta.sums for r in (stored_rank(s.left), stored_rank(s.right)) if r)
    return float(next(ranks, 1))


def _convention(modules: Sequence[FileModule], application: Application | None) -> Convention:
    """The convention of LoKr tensors for an application: alpha of full factors as OneTrainer needs it."""
    if application is None:
        return CONVENTION
    alpha = full_alpha(modules) if "one-lokr-dim" in application.rules else 1.0
    return Convention(
        alpha, unit_alpha="unit-rank" not in application.rules, flat_conv3d="deep-conv" not in application.rules
    )


def with_one_rank(modules: Sequence[FileModule], application: Application | None) -> list[FileModule]:
    """The modules with the highest rank in all LoRAs, padded with zeros, for an application that loads one rank."""
    if application is None or "one-rank" not in application.rules:
        return list(modules)
    pairs = {m.name: lora for m in modules if (lora := lora_of(m.delta)) is not None}
    rank = max((len(lora.down) for lora in pairs.values()), default=0)
    return [
        m if m.name not in pairs else m._replace(delta=with_lora(m.delta, padded(pairs[m.name], rank))) for m in modules
    ]


def _keyed(
    format_name: str, named: Sequence[tuple[str, FileModule]], convention: Convention = CONVENTION
) -> dict[str, Tensor]:
    return {
        f"{name}.{parameter}": tensor.contiguous()
        for name, module in named
        for parameter, tensor in (tensors_of(module.delta, format_name, convention) | _bias(module)).items()
    }


def _bias(module: FileModule) -> dict[str, Tensor]:
    return {} if module.bias is None else {"lora_B.bias": module.bias}


def _by_component(modules: Sequence[FileModule]) -> dict[str, list[FileModule]]:
    groups: dict[str, list[FileModule]] = {}
    for m in modules:
        groups.setdefault(m.component, []).append(m)
    return groups


def _only_component(modules: Sequence[FileModule], what: str) -> list[FileModule]:
    groups = _by_component(modules)
    if len(groups) != 1:
        raise InexpressibleError(
            f"{what} supports a single component, but the adapter has {', '.join(groups)}.",
            fix="Choose another format, such as peft-lokr (one folder per component) or lycoris-lokr.",
        )
    return next(iter(groups.values()))


def _adapter_metadata(config: Mapping[str, Any]) -> dict[str, str]:
    return {"format": "pt", "lora_adapter_metadata": json.dumps(config, indent=2, sort_keys=True)}


def _lora_config(format_name: str, modules: Sequence[FileModule], context: Context) -> dict[str, Any]:
    doras = [m.delta.magnitude is not None for m in modules]
    if any(doras) and not all(doras):
        plain = next(m.name for m in modules if m.delta.magnitude is None)
        raise InexpressibleError(
            f"{format_name} has one use_dora setting for all layers, but {plain} is not a DoRA and others are.",
            fix="Use --to lycoris-locon, which supports both kinds in one file.",
        )
    ranks = {_unwrapped(m): m.delta.sums[0].right.rank for m in modules if isinstance(m.delta.sums[0].right, LowRank)}
    biased = any(m.bias is not None for m in modules)
    return lora_config(ranks, dora=any(doras), biased=biased, others=_others(modules, context))


def with_common_factors(format_name: str, modules: Sequence[FileModule]) -> list[FileModule]:
    """The modules with w1 dense in a whole component if PEFT's decompose_both cannot apply to all of them."""
    if storage_of(format_name).layout not in LOKR_CONFIGS:
        return list(modules)
    groups = _by_component(modules)
    dense = {name for name, members in groups.items() if not keeps_left_products(_lokr_modules(members))}
    return [m._replace(delta=_left_dense(m.delta)) if m.component in dense else m for m in modules]


def _lokr_config(modules: Sequence[FileModule], context: Context) -> dict[str, Any]:
    return lokr_config(_lokr_modules(modules), others=_others(modules, context))


def _lokr_modules(modules: Sequence[FileModule]) -> dict[str, LokrModule]:
    return {_unwrapped(m): _lokr_module(m.delta) for m in modules}


def _lokr_module(delta: LayerDelta) -> LokrModule:
    term, kernel = delta.sums[0], form_of(delta).kernel
    left, right = map(stored_rank, (term.left, term.right))
    shape = term.shape
    return LokrModule(ChannelSplit((shape.a1, shape.b1), (shape.a2, shape.b2 // kernel)), left, right)


def _left_dense(delta: LayerDelta) -> LayerDelta:
    return replace(delta, sums=tuple(_dense_left(s) for s in delta.sums))


def _dense_left(s: KronTerms) -> KronTerms:
    return replace(s, left=s.left.dense()) if isinstance(s.left, LowRank) else s


def _unwrapped(module: FileModule) -> str:
    """The path without `text_model.`; PEFT matches path endings, so it fits old and new text encoders."""
    return module.path.removeprefix(WRAPPER).removeprefix("text_model.")


def _others(modules: Sequence[FileModule], context: Context) -> Collection[str]:
    return context.others.get(modules[0].component, ())
