"""DiffuseKronA's checkpoints: Kronecker products with interleaved rows (FORMATS §8).

Their keys are those of old diffusers LoRA; shapes tell the two apart.
"""

from __future__ import annotations

from collections.abc import Mapping

from krona_hub.bases import detection
from krona_hub.errors import AmbiguousError
from krona_hub.formats.forms.limits import no_diffusekrona
from krona_hub.formats.known.format import Format, Storage
from krona_hub.formats.parsing.adapter_file import AdapterFile
from krona_hub.formats.parsing.keys import ModuleTensors

Matrix = tuple[int, ...]


def recognizes(file: AdapterFile) -> bool:
    """Whether the pairs down/up are Kronecker factors and no LoRA.

    A LoRA's halves share their rank; where that is so for every pair, the bases of the catalogue decide which of the
    two products has the sizes of a real layer. Raises AmbiguousError where both readings, or neither, fit one.
    """
    if file.keys.grammars != {"processor"}:  # a file that mixes eras is diffusers'
        return False
    pairs = {m.name: pair for m in file.keys.modules if (pair := _pair(m, file)) is not None}
    if any(down[0] != up[1] for down, up in pairs.values()):
        return True
    as_krona = {name: (down[1] * up[0], down[0] * up[1]) for name, (down, up) in pairs.items()}
    as_lora = {name: (up[0], down[1]) for name, (down, up) in pairs.items()}
    krona, lora = (_fits(file, sizes) for sizes in (as_krona, as_lora))
    if krona == lora and pairs:
        raise AmbiguousError(
            "old diffusers LoRA and DiffuseKronA have the same keys, and the shapes of this file allow both.",
            fix="Say which with --from diffusers-lora or --from diffusekrona, or name the base with --base.",
        )
    return krona


def _pair(module: ModuleTensors, file: AdapterFile) -> tuple[Matrix, Matrix] | None:
    """The shapes of down and up, where both are there and are matrices."""
    if "down" not in module.parts or "up" not in module.parts:
        return None
    down, up = (file.header.tensors[module.parts[part]].shape for part in ("down", "up"))
    return (down, up) if len(down) == len(up) == 2 else None


def _fits(file: AdapterFile, sizes: Mapping[str, Matrix]) -> bool:
    """Whether every module of these sizes is one of a single base: the one given, or any of the catalogue."""
    found = detection.fit(file.base, sizes) if file.base else detection.candidates(sizes, file.metadata)
    return any(c.matched == len(sizes) for c in found)


DIFFUSEKRONA = Format(
    name="diffusekrona",
    summary="DiffuseKronA's checkpoints: Kronecker products with interleaved rows",
    recognizes=recognizes,
    scale="1",
    storage=Storage(kind="kronecker", layout="plain", dialect="processor", limits=(no_diffusekrona,)),
    kinds={"lora": "diffusekrona"},
)
