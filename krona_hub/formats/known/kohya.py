"""Formats of kohya's sd-scripts and of LyCORIS: LoRA, LoCon (FORMATS §6), LoKr (§3) and LoHa, with alpha inside."""

from __future__ import annotations

import json

from krona_hub.formats.forms.limits import no_dora, no_locon, no_lora, no_single_term
from krona_hub.formats.forms.vector_kinds import LYCORIS
from krona_hub.formats.known.format import Format, Storage
from krona_hub.formats.parsing.adapter_file import AdapterFile

LYCORIS_PARTS = {"mid", "dora_scale", "diff"}  # sd-scripts itself never writes these


def is_kohya_lora(file: AdapterFile) -> bool:
    return "kohya" in file.keys.grammars


def is_lycoris_locon(file: AdapterFile) -> bool:
    """Whether the file has `lycoris_` names, or parts that plain kohya LoRA lacks."""
    if not file.keys.modules:
        return bool(file.keys.vectors)
    if not {"kohya", "dense", "value"} & file.keys.grammars:
        return False
    if file.keys.vectors or "value" in file.keys.grammars:
        return True
    own = any(m.name.startswith("lycoris_") or LYCORIS_PARTS & set(m.parts) for m in file.keys.modules)
    return own or "lycoris" in file.metadata.get("ss_network_module", "")


def is_lycoris_lokr(file: AdapterFile) -> bool:
    """Whether the file has LoKr modules (formats listed earlier are ruled out), or CDKA sums of a LyCORIS fork."""
    return bool({"lokr", "cdka"} & file.keys.kinds)


def is_lycoris_loha(file: AdapterFile) -> bool:
    """Whether the file has LoHa modules, also beside LoRA modules; files with LoKr modules, too, are LyCORIS LoKr."""
    return "loha" in file.keys.kinds


def kohya_notes(file: AdapterFile) -> tuple[str, ...]:
    """Note on split_qkv: sd-scripts joins separately trained q, k and v without adapting alpha."""
    try:
        arguments = json.loads(file.metadata.get("ss_network_args", "{}"))
    except (ValueError, RecursionError):
        arguments = {}
    split = arguments.get("split_qkv") if isinstance(arguments, dict) else None
    if str(split).lower() != "true":
        return ()
    return (
        "trained with split_qkv: q, k and v were joined with alpha unchanged, so the file has a third (a quarter with"
        " mlp) of the trained strength; krona reads it as stored",
    )


KOHYA_LORA = Format(
    name="kohya-lora",
    summary="kohya sd-scripts LoRA, with diffusers, ldm or BFL module names",
    recognizes=is_kohya_lora,
    scale="alpha / rank; 1 without alpha",
    storage=Storage(
        kind="low-rank",
        layout="kohya",
        dialect="kohya-ldm",
        limits=(no_dora, no_lora),
        alpha=True,
        embeddings=True,
        network_module="networks.lora",
    ),
    notes=kohya_notes,
)
LYCORIS_LOCON = Format(
    name="lycoris-locon",
    summary="LyCORIS LoCon: LoRA with convolutions, Tucker cores, DoRA or full matrices",
    recognizes=is_lycoris_locon,
    scale="alpha / rank; 1 without alpha",
    storage=Storage(
        kind="low-rank",
        layout="kohya",
        dialect="kohya",
        limits=(no_locon,),
        alpha=True,
        vectors=LYCORIS,
        embeddings=True,
        network_module="lycoris.kohya",
        algorithm="locon",
    ),
)
LYCORIS_LOHA = Format(
    name="lycoris-loha",
    summary="LyCORIS LoHa, elementwise products of two low-rank matrices",
    recognizes=is_lycoris_loha,
    scale="alpha / rank; 1 without alpha",
    storage=None,
)
LYCORIS_LOKR = Format(
    name="lycoris-lokr",
    summary="LyCORIS LoKr, also written by OneTrainer, ai-toolkit, SimpleTuner and musubi-tuner",
    recognizes=is_lycoris_lokr,
    scale="alpha / rank (read from the tensors); 1 if both factors are full, regardless of alpha",
    storage=Storage(
        kind="kronecker",
        layout="kohya",
        dialect="kohya",
        limits=(no_single_term,),
        alpha=True,
        vectors=LYCORIS,
        embeddings=True,
        network_module="lycoris.kohya",
        algorithm="lokr",
    ),
)
