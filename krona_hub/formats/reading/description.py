"""The result of `describe`: an adapter file in plain values. Torch-free."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from krona_hub.checkpoints.header import Header
from krona_hub.errors import KronaError
from krona_hub.formats.forms.delta_form import LayerFactorization, SumFactorization
from krona_hub.formats.forms.vector_kinds import VectorKind
from krona_hub.formats.reading.read_plan import ReadPlan
from krona_hub.kron.shapes import KronShape


@dataclass(frozen=True)
class ModuleInfo:
    """One module of a file."""

    name: str  # as in the file
    layers: tuple[str, ...]  # canonical names; several if fused, none if no base model matches
    kind: str  # lora, lokr, loha, cdka, dense, diffusekrona, peft-conv1d; krona in native files
    weight_shape: tuple[int, ...]  # of the base model if known, otherwise as far as the tensors determine it
    sums: tuple[SumFactorization, ...]  # exactly one, except in native files; of a LoHa that of the equal LoRA
    rank: int | None  # the r of alpha / r
    alpha: float | None
    scale: float
    dora_axis: Literal["out", "in"] | None
    parameters: int  # in the file's tensors, without alpha and the constant [[1]] of a LoRA
    bytes: int
    dtypes: tuple[str, ...]
    part: tuple[int, int] | None = None  # rows of the layer that the module fills; None: all

    @property
    def form(self) -> LayerFactorization:
        """The factorization, for the rules about what an application or a format supports."""
        return LayerFactorization(self.weight_shape, self.sums, self.dora_axis, self.layers[0] if self.layers else "")

    @property
    def split(self) -> KronShape | None:
        """Shape of the first sum; None for a native layer without sums (a DoRA whose directions did not change)."""
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
class VectorInfo:
    """A change of biases, norms or other parameters that are not weights of layers."""

    name: str  # of the tensor in the file
    parameters: tuple[str, ...]  # canonical names; several for the bias of fused layers
    values: int
    kind: VectorKind
    whole: bool = True  # whether `values` are those of `parameters` one after the other


@dataclass(frozen=True)
class BaseFit:
    """How well the modules of a file fit a base model."""

    base: str
    matched: int  # modules of the file that the base model has, with their shapes
    modules: int  # modules of the file
    changed: int  # layers of the base model that the file changes
    layers: int  # layers of the same components of the base model
    same_layers: tuple[str, ...] = ()  # base models that no file tells apart from this one
    variants: tuple[str, ...] = ()  # base models that differ in layers that the file does not change


@dataclass(frozen=True)
class Description:
    """Description of a file, or of the files of a folder."""

    path: Path
    format: str  # a name of FORMATS
    scale_rule: str
    header: Header  # of the first file
    modules: tuple[ModuleInfo, ...]
    base: str | None  # base model that it fits; None if unknown
    candidates: tuple[str, ...]  # names of base models that fit equally well
    matched: str  # "N of M modules matched …"
    parameters: int  # in the modules and vectors, without alpha
    bytes: int  # of the files
    dtypes: Mapping[str, int]  # dtype -> tensors
    extras: tuple[str, ...] = ()  # embeddings
    vectors: tuple[VectorInfo, ...] = ()
    unmatched: Mapping[str, str] = field(default_factory=dict)  # module or key -> reason why it is not read
    trigger_words: tuple[str, ...] = ()
    training: Mapping[str, str] = field(default_factory=dict)
    licence: str | None = None
    warnings: tuple[str, ...] = ()
    schema: str | None = None  # version of a native file
    fits: tuple[BaseFit, ...] = ()  # those that fit equally well, then the next best; empty if none is known
    mismatch: KronaError | None = None  # the base model that was given is not that of the file
    plans: tuple[ReadPlan, ...] = field(default=(), repr=False)  # how its files are read; empty for a native file

    @property
    def components(self) -> tuple[str, ...]:
        """The adapted components."""
        names = [layer for m in self.modules for layer in m.layers] + [n for v in self.vectors for n in v.parameters]
        return tuple(sorted({name.partition(".")[0] for name in names}))

    @property
    def kinds(self) -> Mapping[str, int]:
        """Kind -> number of modules."""
        return dict(Counter(m.kind for m in self.modules))


def vectors_text(vectors: Iterable[VectorInfo]) -> str:
    """Format the number of vectors by kind; "" without any.

    >>> vectors_text([VectorInfo("a", ("unet.conv_in.bias",), 4, "bias")] * 2)
    '2 × bias'
    """
    counts = Counter(vector.kind for vector in vectors)
    return ", ".join(f"{n:,} × {kind}" for kind, n in sorted(counts.items()))


def factorization_text(module: ModuleInfo) -> str:
    """Format the factorization of a module: rank of a LoRA, or shape, terms and ranks of a Kronecker sum."""
    if module.kind == "loha":  # its sum is that of the equal LoRA
        return f"{module.sums[0].shape.b1}x{module.sums[0].shape.b2} r{module.rank} ∘ r{module.rank}"
    return " + ".join(_sum_text(s) for s in module.sums) or "magnitude only"


def _sum_text(s: SumFactorization) -> str:
    if (s.shape.a1, s.shape.a2) == (1, 1) and s.right_rank is not None:
        return f"{s.shape.b1}x{s.shape.b2} r{s.right_rank}"
    terms = f"{s.terms} terms of " if s.terms > 1 else ""
    ranks = [f"{side} r{rank}" for side, rank in (("A", s.left_rank), ("B", s.right_rank)) if rank is not None]
    rows = ["rows shuffled"] if s.rows == "shuffled" else []
    return ", ".join([f"{terms}{s.shape}", *ranks, *rows])


def scale_text(module: ModuleInfo) -> str:
    """Format the scale: `alpha 4 / rank 8 = 0.5`, or the scale alone without an alpha."""
    if module.alpha is None or module.rank is None:
        return f"{module.scale:g}"
    return f"alpha {module.alpha:g} / rank {module.rank} = {module.scale:g}"
