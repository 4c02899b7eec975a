"""Describe an adapter file in plain values, for `krona inspect`. Torch-free; reads no tensor except alpha."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from krona_hub.adapters.unknown_base import KEPT_NAMES, module_name
from krona_hub.bases.base import Base
from krona_hub.bases.detection import Candidate
from krona_hub.checkpoints.findings import raise_first
from krona_hub.checkpoints.header import Header, TensorInfo
from krona_hub.errors import KronaError, counted
from krona_hub.formats.forms.delta_form import SumFactorization
from krona_hub.formats.forms.vector_kinds import kind_of
from krona_hub.formats.known.native import KRONA
from krona_hub.formats.known.registry import by_name, detect_format
from krona_hub.formats.parsing import file_metadata
from krona_hub.formats.parsing.adapter_file import AdapterFile, in_file, open_files
from krona_hub.formats.parsing.base_match import match_base, places_of_kept
from krona_hub.formats.reading.description import BaseFit, Description, ModuleInfo, VectorInfo
from krona_hub.formats.reading.read_plan import ModulePlan, ReadPlan, make_plan
from krona_hub.schema import tensor_layout

LISTED = 8  # problems listed one by one


def describe(
    source: str | Path,
    *,
    base: str | Path | Base | None = None,
    format: str | None = None,
    component: str | None = None,
) -> Description:
    """Describe the adapter in a file or folder, from headers alone.

    Parameters
    ----------
    source : str or Path
        A `.safetensors` file, a PEFT folder, or a folder with one PEFT folder per component.
    base : str, Path or Base, optional
        Base model: a catalog name, a diffusers folder, a checkpoint file or a `Base`. Default: detect it.
    format, component : str, optional
        Format name (see `FORMATS`) and component (such as `unet`), for files that leave them open.

    Returns
    -------
    Description
        Format, base model, modules, sizes in parameters and bytes, and warnings. Modules that `read` rejects are in
        `unmatched` with the reason; without a known base model, layers keep the names of the file.

    Raises
    ------
    KronaError
        Only for problems of the whole file: it is broken, contains no adapter, or fits two formats equally well.

    Examples
    --------
    >>> from importlib.resources import files
    >>> about = describe(files("krona_hub.assets") / "zorbi_lora_kohya.safetensors")
    >>> about.format, about.base, about.matched
    ('kohya-lora', 'tiny-scenes', '56 of 56 modules matched tiny-scenes')
    """
    files = open_files(source, base)
    parts = [_describe_file(f, format, f.component if len(files) > 1 else component) for f in files]
    return parts[0] if len(parts) == 1 else _joined(Path(source), parts)


def _describe_file(file: AdapterFile, format: str | None, component: str | None) -> Description:
    with in_file(file.path):
        known = by_name(format) if format is not None else detect_format(file)
        return _native(file) if known is KRONA else _of_plan(make_plan(file, known, component, lost=True))


def _of_plan(plan: ReadPlan) -> Description:
    file, match = plan.file, plan.match
    modules = tuple(_module(m, plan) for m in plan.modules)
    tensors = file.header.tensors
    vectors = _vectors({v.key.key: v.parameters for v in plan.vectors}, tensors, modules, match.base)
    odd = {v.key.key for v in plan.vectors if any(t.placement.part or t.placement.shared_with for t in v.targets)}
    vectors = tuple(replace(vector, whole=vector.name not in odd) for vector in vectors)
    return Description(
        path=file.path,
        format=plan.format,
        scale_rule=plan.scale_rule,
        header=file.header,
        modules=modules,
        base=match.base.name if match.base else None,
        candidates=match.candidates,
        matched=plan.matched,
        parameters=sum(m.parameters for m in modules) + sum(v.values for v in vectors),
        bytes=file.header.file_size,
        dtypes=dict(Counter(info.dtype for info in tensors.values())),
        extras=file.keys.extras,
        vectors=vectors,
        unmatched={name: str(error) for name, error in plan.problems.items()},
        trigger_words=file_metadata.trigger_words(file.metadata),
        training=file_metadata.training_record(file.metadata),
        licence=file_metadata.license_of(file.metadata),
        warnings=(*((str(match.mismatch),) if match.mismatch else _problem_lines(plan.problems)), *plan.notes),
        fits=tuple(map(_fit, match.fits)),
        mismatch=match.mismatch,
        plans=(plan,),
    )


def _fit(c: Candidate) -> BaseFit:
    return BaseFit(c.base, c.matched, c.modules, c.covered, c.layers, c.also, c.variants)


def _module(module: ModulePlan, plan: ReadPlan) -> ModuleInfo:
    layout, base = module.layout, plan.match.base
    infos = [plan.file.header.tensors[key] for part, key in module.group.parts.items() if part != "alpha"]
    plain = next((place.layer for place in module.places if place.plain), None)
    known = base.module(plain) if base and plain else None
    return ModuleInfo(
        name=module.group.name,
        layers=tuple(p.layer for p in module.places),
        kind=layout.kind,
        weight_shape=known.shape if known else layout.weight_shape,
        sums=(SumFactorization(layout.shape, layout.terms, layout.left_rank, layout.right_rank, layout.rows),),
        rank=layout.rank,
        alpha=module.scale.alpha,
        scale=module.scale.value,
        dora_axis=layout.dora,
        parameters=sum(info.numel for info in infos),
        bytes=sum(info.nbytes for info in infos),
        dtypes=dtypes_of(infos),
        part=module.places[0].part if module.places else None,
    )


def dtypes_of(infos: list[TensorInfo]) -> tuple[str, ...]:
    return tuple(sorted({info.dtype for info in infos}))


def _native(file: AdapterFile) -> Description:
    """Describe a native file by its schema."""
    header = file.header
    known, findings = tensor_layout.examine(header)
    raise_first(findings, str(header.path))
    shapes = {name: layer.weight_shape for name, layer in known.layers.items()}
    places = {} if file.base is None else places_of_kept(shapes, file.base)
    modules = tuple(
        _native_module(name, layer, header, tuple(p.layer for p in places.get(name, ())) or (name,))
        for name, layer in known.layers.items()
    )
    vectors = _vectors({n: (name,) for name, n in known.vectors.items()}, header.tensors, modules, None)
    base, provenance = known.header.base, known.provenance(header.metadata)
    match = match_base(shapes, {}, file.base, None) if file.base and not places else None
    return Description(
        path=header.path,
        format="krona",
        scale_rule=KRONA.scale,
        header=header,
        modules=modules,
        base=base.family if base else None,
        candidates=base.candidates if base else (),
        matched=f"{len(modules)} of {len(modules)} modules read" + _beside(vectors),
        parameters=sum(m.parameters for m in modules) + sum(v.values for v in vectors),
        bytes=header.file_size,
        dtypes=dict(Counter(info.dtype for info in header.tensors.values())),
        extras=tuple(known.extras),
        vectors=vectors,
        trigger_words=provenance.trigger_words,
        training={key: str(value) for key, value in provenance.training.items()},
        licence=provenance.licence,
        warnings=_kept_names([*(layer for m in modules for layer in m.layers), *known.vectors]),
        schema=str(known.version),
        fits=tuple(map(_fit, match.fits)) if match else (),
        mismatch=match.mismatch if match else None,
    )


def _kept_names(names: Iterable[str]) -> tuple[str, ...]:
    return (KEPT_NAMES,) if any(module_name(name) is not None for name in names) else ()


def _vectors(
    named: Mapping[str, tuple[str, ...]],
    tensors: Mapping[str, TensorInfo],
    modules: Iterable[ModuleInfo],
    base: Base | None,
) -> tuple[VectorInfo, ...]:
    """Describe vectors by tensor name -> parameters."""
    layers = {layer for module in modules for layer in module.layers}
    changed = {parameter for parameters in named.values() for parameter in parameters}
    return tuple(
        VectorInfo(
            name,
            parameters,
            tensors[name].numel,
            kind_of(parameters[0], len(tensors[name].shape), layers, changed, base),
        )
        for name, parameters in named.items()
    )


def _beside(vectors: Sequence[VectorInfo]) -> str:
    return f" and {counted(len(vectors), 'vector')}" if vectors else ""


def _native_module(name: str, layer: tensor_layout.Layer, header: Header, layers: tuple[str, ...]) -> ModuleInfo:
    names = [n for s in layer.sums for n in _counted(s)]
    infos = [header.tensors[n] for n in names + ([layer.magnitude] if layer.magnitude else [])]
    return ModuleInfo(
        name=name,
        layers=layers,
        kind="krona",
        weight_shape=layer.weight_shape,
        sums=tuple(_native_sum(s, header) for s in layer.sums),
        rank=None,
        alpha=None,
        scale=1.0,
        dora_axis=layer.magnitude_axis if layer.magnitude else None,
        parameters=sum(info.numel for info in infos),
        bytes=sum(info.nbytes for info in infos),
        dtypes=dtypes_of(infos),
    )


def _counted(s: tensor_layout.Sum) -> tuple[str, ...]:
    """The tensors of a sum that count as parameters: all but alpha and the constant A = [[1]] of a LoRA."""
    is_lora = s.shape[:2] == (1, 1) and len(s.right.names) > 1
    return s.right.names if is_lora else (*s.left.names, *s.right.names)


def _native_sum(s: tensor_layout.Sum, header: Header) -> SumFactorization:
    left, right = (header.tensors[f.names[0]].shape[2] if len(f.names) > 1 else None for f in (s.left, s.right))
    return SumFactorization(s.shape, s.left.shape[0], left, right, s.rows)


def _problem_lines(problems: Mapping[str, KronaError]) -> tuple[str, ...]:
    """One line per problem, and the number of the others."""
    lines = [f"{name}: {error.cause}" for name, error in problems.items()]
    rest = len(lines) - LISTED
    return (*lines[:LISTED], f"and {rest} more modules that cannot be read") if rest > 0 else tuple(lines)


def _joined(path: Path, parts: list[Description]) -> Description:
    """The descriptions of the files of a folder as one."""
    first = parts[0]
    dtypes: Counter[str] = Counter()
    for part in parts:
        dtypes.update(part.dtypes)
    return Description(
        path=path,
        format=first.format,
        scale_rule=first.scale_rule,
        header=first.header,
        modules=tuple(m for part in parts for m in part.modules),
        base=first.base,
        candidates=tuple(c for c in first.candidates if all(c in part.candidates for part in parts)),
        matched="; ".join(part.matched for part in parts),
        parameters=sum(part.parameters for part in parts),
        bytes=sum(part.bytes for part in parts),
        dtypes=dict(dtypes),
        extras=tuple(e for part in parts for e in part.extras),
        vectors=tuple(v for part in parts for v in part.vectors),
        unmatched={name: reason for part in parts for name, reason in part.unmatched.items()},
        trigger_words=tuple(dict.fromkeys(w for part in parts for w in part.trigger_words)),
        training=first.training,
        licence=first.licence,
        warnings=tuple(dict.fromkeys(w for part in parts for w in part.warnings)),
        fits=first.fits,
        mismatch=next((part.mismatch for part in parts if part.mismatch), None),
        plans=tuple(plan for part in parts for plan in part.plans),
    )
