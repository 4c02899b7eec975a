"""DiffuseKronA checkpoints: Kronecker products with interleaved rows (FORMATS §8).

They use the keys of old diffusers LoRA; the tensor shapes distinguish the two formats.
"""

from __future__ import annotations

from collections.abc import Sequence

from krona_hub.bases import detection
from krona_hub.errors import AmbiguousError
from krona_hub.formats.forms.limits import no_diffusekrona
from krona_hub.formats.known.format import Format, Storage
from krona_hub.formats.parsing.adapter_file import AdapterFile
from krona_hub.formats.parsing.keys import ModuleTensors

Matrix = tuple[int, ...]


def recognizes(file: AdapterFile) -> bool:
    """Whether the pairs down/up are Kronecker factors rather than a LoRA.

    The two halves of a LoRA share their rank. If every pair does, the catalog of base models decides which of the
    two products has the shape of a real layer. Raises AmbiguousError if both readings fit, or neither does.
    """
    if file.keys.grammars != {"processor"}:  # a file that mixes key names of several versions is diffusers LoRA
        return False
    pairs = {m.name: pair for m in file.keys.modules if (pair := _pair(m, file)) is not None}
    if any(down[0] != up[1] for down, up in pairs.values()):
        return True
    as_krona = {name: (down[1] * up[0], down[0] * up[1]) for name, (down, up) in pairs.items()}
    as_lora = {name: (up[0], down[1]) for name, (down, up) in pairs.items()}
    krona, lora = (file.base is not None and _whole(detection.fit(file.base, s)) for s in (as_krona, as_lora))
    if not (krona or lora):  # without a base model, or with a wrong one, which another error says
        krona, lora = (_whole(detection.candidates(s, file.metadata)) for s in (as_krona, as_lora))
    if krona == lora and pairs:
        raise AmbiguousError(
            "Ambiguous format: keys and shapes match both old diffusers LoRA and DiffuseKronA.",
            fix="Choose --from diffusers-lora or --from diffusekrona, or specify the base model with --base.",
        )
    return krona


def _pair(module: ModuleTensors, file: AdapterFile) -> tuple[Matrix, Matrix] | None:
    """The shapes of down and up; None unless both exist and are matrices."""
    if "down" not in module.parts or "up" not in module.parts:
        return None
    down, up = (file.header.tensors[module.parts[part]].shape for part in ("down", "up"))
    return (down, up) if len(down) == len(up) == 2 else None


def _whole(found: Sequence[detection.Candidate]) -> bool:
    """Whether a single base model has every module."""
    return any(c.complete for c in found)


DIFFUSEKRONA = Format(
    name="diffusekrona",
    summary="DiffuseKronA checkpoints: Kronecker products with interleaved rows",
    recognizes=recognizes,
    scale="1",
    storage=Storage(kind="kronecker", layout="plain", dialect="processor", limits=(no_diffusekrona,)),
    kinds={"lora": "diffusekrona"},
)
