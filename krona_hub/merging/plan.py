"""Plan a merge from headers alone: which layers change which tensors, what does not match, and the cost.

Torch-free if the adapters are files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from krona_hub.bases.module_spec import Placement
from krona_hub.bases.weight_files import WeightPlaces, has_ema
from krona_hub.checkpoints.header import EIGHT_BITS, FLOATS, Header, TensorInfo
from krona_hub.errors import BaseMismatchError, ConflictError, UsageError, abbreviated
from krona_hub.merging.arithmetic.layer_changes import check_strengths
from krona_hub.merging.base_weights import BaseTree, open_tree, quantized
from krona_hub.merging.block_weights import BlockWeights
from krona_hub.merging.merge_input import MergeInput, matched_counts, open_input
from krona_hub.merging.output.model_folder import files_below, stale
from krona_hub.sources import resolve_base

if TYPE_CHECKING:
    from krona_hub.adapters.adapter import Adapter

OutDtype = Literal["keep", "fp32-touched", "fp16", "bf16"]
OUT_DTYPES: Mapping[OutDtype, str | None] = {"keep": None, "fp32-touched": "F32", "fp16": "F16", "bf16": "BF16"}
WHOLE = ("fp16", "bf16")  # apply to all weights of a changed component, not only to those that adapters touch
MOST_LIKELY = 3  # base models listed in a message
ROOM = 200_000_000  # bytes: torch itself and the buffers of two threads
COPIED, COMPUTED = 1.5e9, 0.9e9  # bytes per second, warm, on two cores: for an estimate only


class TensorTarget(NamedTuple):
    """A layer of an adapter that is added to a tensor."""

    adapter: int  # index
    layer: str  # canonical; for a vector the name of its parameter
    placement: Placement  # where in the tensor
    weight: float  # block weights included, never 0


class TensorPlan(NamedTuple):
    """A tensor that changes."""

    name: str
    info: TensorInfo
    out_dtype: str  # safetensors name
    targets: tuple[TensorTarget, ...]  # none if only its dtype changes

    @property
    def out_nbytes(self) -> int:
        return self.info.numel * BYTES[self.out_dtype]


BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class FilePlan:
    """A file that changes."""

    header: Header
    tensors: tuple[TensorPlan, ...]  # in the order of the file

    @property
    def path(self) -> Path:
        return self.header.path


@dataclass(frozen=True)
class AdapterPlan:
    """How one adapter matches the base."""

    source: str
    format: str | None
    weight: float
    matched: int  # modules that match, even if their strength is 0
    total: int
    missing: Mapping[str, str]  # module, or parameter of a vector -> why it is not merged
    notes: tuple[str, ...] = ()
    vectors: int = 0  # vectors that match, even if their strength is 0
    total_vectors: int = 0

    @property
    def match_summary(self) -> str:
        """How many modules and vectors matched, in words."""
        counts = matched_counts(modules=(self.matched, self.total), vectors=(self.vectors, self.total_vectors))
        return f"{counts} matched"


@dataclass(frozen=True, eq=False)
class MergePlan:
    """A planned merge."""

    tree: BaseTree
    adapters: tuple[AdapterPlan, ...]
    parts: tuple[MergeInput, ...]
    files: tuple[FilePlan, ...]
    out_dtype: OutDtype
    notes: tuple[str, ...] = ()

    @property
    def tensors(self) -> tuple[TensorPlan, ...]:
        """The tensors that adapters change."""
        return tuple(t for file in self.files for t in file.tensors if t.targets)

    @property
    def bytes_to_touch(self) -> int:
        return sum(t.info.nbytes for t in self.tensors)

    @property
    def growth(self) -> int:
        """Bytes by which the output is larger than the base."""
        return sum(t.out_nbytes - t.info.nbytes for file in self.files for t in file.tensors)

    @property
    def bytes_of_weights(self) -> int:
        """Bytes of all weight files of the output."""
        return self.tree.nbytes + self.growth

    @property
    def disk(self) -> int:
        """Bytes of the output, including copied files of a folder; headers grow by a few more kB."""
        if not self.tree.is_folder:
            return self.bytes_of_weights
        root = self.tree.root
        files = files_below(root)
        left_out = {*stale(files, {file.path.relative_to(root) for file in self.files})}
        return self.growth + sum((root / path).stat().st_size for path in files if path not in left_out)

    @property
    def memory(self) -> int:
        """Approximate memory of the merge in bytes: adapters, libraries and a few tiles."""
        return ROOM + sum(part.nbytes for part in self.parts)

    @property
    def seconds(self) -> float:
        """Approximate duration of the merge, if the files are cached in memory; a slow disk takes longer."""
        return (self.bytes_of_weights - self.bytes_to_touch) / COPIED + self.bytes_to_touch / COMPUTED


def plan_merge(
    base: str | Path | BaseTree,
    adapters: Sequence[tuple[Adapter | str | Path, float]],
    *,
    component: str | None = None,
    block_weights: Mapping[str, float] | None = None,
    out_dtype: OutDtype = "keep",
    from_format: str | None = None,
    allow_missing: bool = False,
    allow_base_mismatch: bool = False,
) -> MergePlan:
    """Plan the merge of adapters, each at its strength, into `base`. Reads headers only.

    Parameters
    ----------
    base : checkpoint file, component folder, pipeline folder, Hub id or name of a shipped base.
    adapters : pairs (adapter, file or Hub id; strength of any sign).
    component : merge only the layers of this component.
    block_weights : regular expression of canonical layer names -> factor of the strength; the first match counts.
    out_dtype : "keep", "fp32-touched" (only changed tensors), "fp16" or "bf16" (whole changed components).
    from_format : format of the adapters; default: detected.
    allow_missing, allow_base_mismatch : merge the matching modules only; accept adapters for another base model.

    Returns
    -------
    MergePlan : changed tensors by file, matches of the adapters, and estimates of disk, memory and time.

    Raises
    ------
    BaseMismatchError : modules of an adapter are not in the base, or it was made for another base.
    ConflictError, UsageError : two DoRA adapters on one layer; invalid options, or a pattern without a match.

    Examples
    --------
    >>> from importlib.resources import files
    >>> plan = plan_merge("tiny-scenes", [(files("krona_hub.assets") / "zorbi_lora_kohya.safetensors", 0.8)])
    >>> len(plan.tensors), plan.adapters[0].match_summary
    (56, '56 of 56 modules matched')
    """
    _check_options(adapters, out_dtype)
    tree = base if isinstance(base, BaseTree) else open_tree(resolve_base(base))
    factors = BlockWeights(block_weights or {})
    parts = tuple(
        open_input(source, weight, tree, component=component, from_format=from_format, label=label)
        for (source, weight), label in zip(adapters, _names(len(adapters)), strict=True)
    )
    for part in parts:
        _check_plain(part, tree, allow_missing)
        _check_base(part, tree, allow_base_mismatch)
        _check_matched(part, tree, component, allow_missing)
    targets = list(_targets(parts, tree, factors))
    factors.check_used()
    _check_doras(parts, targets)
    _check_shared(targets)
    return MergePlan(
        tree=tree,
        adapters=tuple(map(_adapter_plan, parts)),
        parts=parts,
        files=tuple(_files(tree, targets, out_dtype)),
        out_dtype=out_dtype,
        notes=tuple(_notes(tree, parts, targets)),
    )


def _check_options(adapters: Sequence[object], out_dtype: str) -> None:
    if not adapters:
        raise UsageError("Missing adapters to merge.", fix="Specify at least one, as FILE or FILE:strength.")
    if out_dtype not in OUT_DTYPES:
        raise UsageError(f"Unknown output dtype {out_dtype!r}.", fix=f"Choose one of {', '.join(OUT_DTYPES)}.")


def _names(count: int) -> list[str]:
    """Return the names of adapters in memory for messages."""
    return ["the adapter"] if count == 1 else [f"adapter {n}" for n in range(1, count + 1)]


# --- compatibility ---------------------------------------------------------------------------------------------------


def _check_base(part: MergeInput, tree: BaseTree, allowed: bool) -> None:
    known = tree.base.model
    if part.base is None or allowed or part.base.agrees_with(known):
        return
    raise BaseMismatchError(
        f"{part.label} was made for {part.base.words}, but {tree.root} is {known.words}.",
        fix="Specify the base model that it was made for, or add --allow-base-mismatch to merge layers with the same "
        "names and shapes.",
    )


def _check_plain(part: MergeInput, tree: BaseTree, allow_missing: bool) -> None:
    """Raise if weights that the adapter changes are quantized, or if quantization may explain missing layers."""
    touched = (tree.quantization(place) for _, places in _changed_by(part, tree) for place in places)
    found = next((kind for kind in touched if kind), None)
    if found is None and part.unmatched and not (allow_missing and part.matches):
        found = next(iter(tree.quantized.values()), None)
    if found:
        raise quantized(tree.root, found)


def _check_matched(part: MergeInput, tree: BaseTree, component: str | None, allowed: bool) -> None:
    if part.matches and (allowed or not part.unmatched):
        return
    where = f"{tree.root}" + (f" ({component})" if component else "")
    found = f"{part.match_summary} of {part.label} matched {where}"
    if not part.matches:
        reason = next(iter(part.unmatched.values()), "it has no modules of that component.")
        raise BaseMismatchError(
            f"{found}. Reason for the first: {reason}", fix=f"{_likely(part, tree)}Run krona inspect for details."
        )
    first = next(iter(part.unmatched.values()))
    raise BaseMismatchError(
        f"{found}; unmatched: {abbreviated(part.unmatched)}. Reason for the first: {first}",
        fix=f"{_likely(part, tree)}Add --allow-missing to merge the others, or --component NAME for one component.",
    )


def _likely(part: MergeInput, tree: BaseTree) -> str:
    """Return a hint to more likely base models, if this one is not among them."""
    if not part.candidates or {*tree.base.model.names} & {*part.candidates}:
        return ""
    return f"It looks like an adapter for {' or '.join(part.candidates[:MOST_LIKELY])}. "


def _check_doras(parts: Sequence[MergeInput], targets: Iterable[tuple[Path, str, TensorTarget]]) -> None:
    seen: dict[tuple[Path, str, str], int] = {}
    for path, tensor, target in targets:
        if target.layer not in parts[target.adapter].doras:
            continue
        first = seen.setdefault((path, tensor, target.layer), target.adapter)
        if first != target.adapter:
            raise ConflictError(
                f"{parts[first].label} and {parts[target.adapter].label} are both DoRA on {target.layer}; each sets "
                "the norm of the weight.",
                fix="Merge only one of them, or set the strength of one to 0.",
            )


def _check_shared(targets: Iterable[tuple[Path, str, TensorTarget]]) -> None:
    by_tensor: dict[tuple[Path, str], list[TensorTarget]] = {}
    for path, tensor, target in targets:
        if target.placement.shared_with:
            by_tensor.setdefault((path, tensor), []).append(target)
    for (_, tensor), own in by_tensor.items():
        check_strengths(own, tensor)


# --- changed tensors -------------------------------------------------------------------------------------------------


def _targets(
    parts: Sequence[MergeInput], tree: BaseTree, factors: BlockWeights
) -> Iterator[tuple[Path, str, TensorTarget]]:
    for i, part in enumerate(parts):
        for name, places in _changed_by(part, tree):
            weight = part.weight * factors.of(module_path(name) if name in part.vectors else name)
            for place in places if weight else ():
                yield place.path, place.tensor, TensorTarget(i, name, place.placement, weight)


def _changed_by(part: MergeInput, tree: BaseTree) -> Iterator[tuple[str, WeightPlaces]]:
    """Yield the layers, then the parameters that an adapter changes, with their locations."""
    for layer in part.layers:
        yield layer, _in_all(tree.places[layer])
    for name, variants in part.vectors.items():
        yield name, _in_all(variants)


def _in_all(variants: tuple[WeightPlaces, ...]) -> WeightPlaces:
    return tuple(place for places in variants for place in places)


def module_path(parameter: str) -> str:
    """Return the module of a weight or bias, whose block weight applies to it; a bare parameter stays as it is.

    >>> module_path("unet.conv_in.bias"), module_path("transformer.blocks.0.scale_shift_table")
    ('unet.conv_in', 'transformer.blocks.0.scale_shift_table')
    """
    return parameter.removesuffix(".bias").removesuffix(".weight")


def _files(
    tree: BaseTree, targets: Iterable[tuple[Path, str, TensorTarget]], out_dtype: OutDtype
) -> Iterator[FilePlan]:
    by_tensor: dict[tuple[Path, str], list[TensorTarget]] = {}
    for path, tensor, target in targets:
        by_tensor.setdefault((path, tensor), []).append(target)
    for path in _changed({path for path, _ in by_tensor}, tree, out_dtype):
        header = tree.headers[path]
        planned = (
            _tensor(name, info, tuple(by_tensor.get((path, name), ())), out_dtype)
            for name, info in sorted(header.tensors.items(), key=lambda item: item[1].start)
        )
        tensors = tuple(t for t in planned if t.targets or t.out_dtype != t.info.dtype)
        if tensors:
            yield FilePlan(header, tensors)


def _changed(touched: set[Path], tree: BaseTree, out_dtype: OutDtype) -> list[Path]:
    """Return the touched files; for a whole-component dtype also the other shards of their components."""
    folders = {path.parent for path in touched} if out_dtype in WHOLE and tree.is_folder else set()
    return sorted(touched | {path for path in tree.headers if path.parent in folders})


def _tensor(name: str, info: TensorInfo, targets: tuple[TensorTarget, ...], out_dtype: OutDtype) -> TensorPlan:
    """Plan a tensor with its output dtype; integers, and most untouched tensors, keep theirs."""
    wanted = OUT_DTYPES[out_dtype]
    changes = bool(targets) or (out_dtype in WHOLE and info.dtype in FLOATS)
    return TensorPlan(name, info, wanted if wanted and changes else info.dtype, targets)


def _adapter_plan(part: MergeInput) -> AdapterPlan:
    return AdapterPlan(
        source=part.label,
        format=part.format,
        weight=part.weight,
        matched=len(part.modules),
        total=part.total,
        missing=part.unmatched,
        notes=part.notes,
        vectors=len(part.vectors),
        total_vectors=part.total_vectors,
    )


def _notes(
    tree: BaseTree, parts: Sequence[MergeInput], targets: Sequence[tuple[Path, str, TensorTarget]]
) -> Iterator[str]:
    for part in parts:
        yield from (f"{part.label}: {note}" for note in part.notes)
    if not targets:
        yield "every strength is 0: the output equals the base"
    narrow = {tree.headers[path].tensors[tensor].dtype for path, tensor, _ in targets} & {*EIGHT_BITS}
    if narrow:
        yield "the base is stored in 8 bits, which loses most of an adapter; --out-dtype bf16 preserves more of it"
    several = (variants for variants in tree.places.values() if len(variants) > 1)
    variants = {place.path.parent for found in several for place in _in_all(found)}
    for folder in sorted(variants):
        yield f"{folder.name} has several variants (such as fp16); each is merged"
    for path in tree.beside if targets else ():
        yield f"{path.name} also contains a complete model, which is not merged: diffusers does not load it"
    if any(has_ema(tree.headers[path].tensors) for path, _, _ in targets[:1]):
        yield "the EMA weights (model_ema) in the file are not merged: applications do not use them to generate images"
