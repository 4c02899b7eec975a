"""What `describe` returns: an adapter file in plain values. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from krona_hub.checkpoints.header import Header
from krona_hub.formats.forms.delta_form import LayerFactorization, SumFactorization
from krona_hub.formats.reading.read_plan import ReadPlan
from krona_hub.kron.shapes import KronShape


@dataclass(frozen=True)
class ModuleInfo:
    """One module of a file."""

    name: str  # as the file spells it
    layers: tuple[str, ...]  # canonical names; several where it is fused, none where no base explains it
    kind: str  # lora, lokr, cdka, dense, diffusekrona, peft-conv1d; krona in native files
    weight_shape: tuple[int, ...]  # of the base where it is known, else as far as the tensors tell
    sums: tuple[SumFactorization, ...]  # one, but for native files
    rank: int | None  # the r of alpha / r
    alpha: float | None
    scale: float
    dora_axis: Literal["out", "in"] | None
    parameters: int  # of the file's own tensors; alpha and the constant [[1]] of a LoRA are not counted
    bytes: int
    dtypes: tuple[str, ...]

    @property
    def form(self) -> LayerFactorization:
        """Its sizes, for the rules about what a tool or a format can hold."""
        return LayerFactorization(self.weight_shape, self.sums, self.dora_axis, self.layers[0] if self.layers else "")

    @property
    def split(self) -> KronShape | None:
        """Of the first sum; None for a native layer without sums (a DoRA whose directions did not move)."""
        return self.sums[0].shape if self.sums else None

    @property
    def terms(self) -> int:
        return sum(s.terms for s in self.sums)

    @property
    def left_rank(self) -> int | None:
        return self.sums[0].left_rank if self.sums else None

    @property
    def right_rank(self) -> int | None:
        return self.sums[0].right_rank if self.sums else None

    @property
    def rows(self) -> Literal["kron", "shuffled"]:
        return self.sums[0].rows if self.sums else "kron"


@dataclass(frozen=True)
class Description:
    """A file, or the files of a folder, described."""

    path: Path
    format: str  # a name of FORMATS
    scale_rule: str
    header: Header  # of the first file
    modules: tuple[ModuleInfo, ...]
    base: str | None  # that it fits; None where it is unknown
    candidates: tuple[str, ...]  # catalogue names that fit equally well
    matched: str  # "N of M modules matched …"
    parameters: int  # of the modules, alpha not counted
    bytes: int  # of the files
    dtypes: Mapping[str, int]  # dtype -> tensors
    extras: tuple[str, ...] = ()  # embeddings, norms, biases
    unmatched: Mapping[str, str] = field(default_factory=dict)  # module or key -> why it is not read
    trigger_words: tuple[str, ...] = ()
    training: Mapping[str, str] = field(default_factory=dict)
    licence: str | None = None
    warnings: tuple[str, ...] = ()
    schema: str | None = None  # version of a native file
    plans: tuple[ReadPlan, ...] = field(default=(), repr=False)  # how its files are read; none for a native file

    @property
    def components(self) -> tuple[str, ...]:
        """The components that it adapts."""
        return tuple(sorted({layer.partition(".")[0] for m in self.modules for layer in m.layers}))

    @property
    def kinds(self) -> Mapping[str, int]:
        """Kind -> number of modules."""
        return dict(Counter(m.kind for m in self.modules))


def factorization_text(module: ModuleInfo) -> str:
    """The form of a module as the tables show it: rank of a LoRA, split, terms and ranks of a Kronecker sum."""
    return " + ".join(_sum_in_words(s) for s in module.sums) or "magnitude only"


def _sum_in_words(s: SumFactorization) -> str:
    if (s.shape.a1, s.shape.a2) == (1, 1) and s.right_rank is not None:
        return f"{s.shape.b1}x{s.shape.b2} r{s.right_rank}"
    terms = f"{s.terms} terms of " if s.terms > 1 else ""
    ranks = [f"{side} r{rank}" for side, rank in (("A", s.left_rank), ("B", s.right_rank)) if rank is not None]
    rows = ["rows shuffled"] if s.rows == "shuffled" else []
    return ", ".join([f"{terms}{s.shape}", *ranks, *rows])


def scale_text(module: ModuleInfo) -> str:
    """`alpha 4 / rank 8 = 0.5`, or the scale alone where no alpha is involved."""
    if module.alpha is None or module.rank is None:
        return f"{module.scale:g}"
    return f"alpha {module.alpha:g} / rank {module.rank} = {module.scale:g}"
