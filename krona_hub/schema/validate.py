"""Validation: structure, dtypes and values of any file; schema, shapes and base of a native file. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

from krona_hub.adapters.unknown_base import module_name
from krona_hub.bases.base import Base
from krona_hub.bases.name_table import table
from krona_hub.checkpoints import finite_scan
from krona_hub.checkpoints.findings import Finding, Severity, quoted
from krona_hub.checkpoints.header import FLOATS, Header, examine
from krona_hub.errors import BaseMismatchError, DtypeError, KronaError, NonFiniteError, UnrecognisedError
from krona_hub.schema import tensor_layout
from krona_hub.schema.tensor_layout import Layer, NativeLayout

_OTHER_BASE = "Specify the base model that the adapter was made for, or convert the file again with --base."


def validate(path: Path | str, base: Base | None = None) -> tuple[Finding, ...]:
    """Return the findings of a file, errors before warnings; () for a valid file.

    A native file is checked against its schema, and against `base` if given; for a file of another format only the
    structure, the dtypes and the values are checked here.
    """
    try:
        header, findings = examine(path)
    except KronaError as error:
        return (Finding.of(error),)
    if findings:  # values cannot be read at invalid offsets
        return findings
    native = tensor_layout.is_native(header.metadata)
    own = native_findings(header, base) if native else dtype_findings(header)
    return ordered([*own, *number_findings(header)])


def ordered(findings: list[Finding]) -> tuple[Finding, ...]:
    """Sort errors before warnings, otherwise in the order of discovery."""
    return tuple(sorted(findings, key=lambda f: f.severity != "error"))


def number_findings(header: Header) -> Iterator[Finding]:
    """Yield a finding for every tensor with NaN or infinite values."""
    try:
        counts = finite_scan.scan(header)
    except KronaError as fault:
        yield Finding.of(fault)
        return
    for name, count in counts.items():
        error = NonFiniteError(
            f"{count:,} of its {header.tensors[name].numel:,} values are NaN or infinite.",
            fix="Use an earlier checkpoint, or save it as F32 or BF16: training diverged or a cast overflowed.",
        )
        yield Finding.of(error, where=quoted(name))


def dtype_findings(header: Header) -> Iterator[Finding]:
    """Yield a finding for every dtype that adapters do not use; only a warning for scalars, such as counters."""
    for name, info in header.tensors.items():
        if info.dtype not in FLOATS:
            error = DtypeError(f"unsupported dtype {info.dtype}.", fix=f"Save it as one of {', '.join(FLOATS)}.")
            yield Finding.of(error, where=quoted(name), severity="warning" if info.numel == 1 else "error")


def native_findings(header: Header, base: Base | None = None) -> Iterator[Finding]:
    """Yield the findings of a native file against its schema, and against `base` if given."""
    try:
        known, findings = tensor_layout.examine(header)
    except KronaError as refusal:
        yield Finding.of(refusal)
        return
    yield from findings
    if not (known.layers or known.vectors or findings):
        error = UnrecognisedError("the file contains no layers.", fix="Check that the right file was converted.")
        yield Finding.of(error, severity="warning")
    if base is not None:
        yield from base_findings(known, base)
        shapes = {name: header.tensors[tensor].shape for name, tensor in known.vectors.items()}
        yield from _vector_findings(shapes, base)


def base_findings(known: NativeLayout, base: Base) -> Iterator[Finding]:
    """Yield a finding for every layer missing from `base` or of another shape; a warning if the base differs."""
    yield from _fingerprint_finding(known, base)
    for name, layer in known.layers.items():
        module, own = base.module(name), module_name(name)
        if own is not None:
            found = table(base).find(own) or ()
            module = base.module(found[0].layer) if len(found) == 1 and found[0].plain else None
        if module is None:
            uncovered = name.partition(".")[0] not in base.components and base.uncovered
            severity: Severity = "warning" if uncovered else "error"
            yield Finding.of(_unknown_layer(name, base), where=quoted(name), severity=severity)
        elif not _same_weight(layer, module.shape, by_size=own is not None):
            error = BaseMismatchError(
                f"its weight has shape {list(layer.weight_shape)}, but {list(module.shape)} in {base.name}.",
                fix=_OTHER_BASE,
            )
            yield Finding.of(error, where=quoted(name))


def _vector_findings(shapes: Mapping[str, tuple[int, ...]], base: Base) -> Iterator[Finding]:
    """Yield a finding for every vector whose parameter is missing from `base` or has another shape."""
    for name, shape in shapes.items():
        found = base.parameter(name)
        if found is None:
            uncovered = name.partition(".")[0] not in base.components and base.uncovered
            severity: Severity = "warning" if uncovered else "error"
            error = BaseMismatchError(f"parameter not found in {base.name}.", fix=_OTHER_BASE)
            yield Finding.of(error, where=quoted(name), severity=severity)
        elif found != shape:
            error = BaseMismatchError(
                f"the vector has shape {list(shape)}, but the parameter has {list(found)} in {base.name}.",
                fix=_OTHER_BASE,
            )
            yield Finding.of(error, where=quoted(name))


def _fingerprint_finding(known: NativeLayout, base: Base) -> Iterator[Finding]:
    recorded = known.header.base.fingerprint if known.header.base else None
    if recorded and recorded != base.fingerprint:
        error = BaseMismatchError(
            f"the file was made for a base model with other layers than {base.name}.", fix=_OTHER_BASE
        )
        yield Finding.of(error, where="krona.header base.fingerprint", severity="warning")


def _same_weight(layer: Layer, shape: tuple[int, ...], *, by_size: bool = False) -> bool:
    """Return whether the shapes are equal apart from kernels of size 1, so that linear fits 1x1 convolution.

    With `by_size`, kernels may also be flattened into the columns, as some files do not tell them.
    """
    ours, theirs = layer.weight_shape, shape
    if by_size and (ours[0], prod(ours[1:])) == (theirs[0], prod(theirs[1:])):
        return True
    return ours[:2] == theirs[:2] and _kernel(ours) == _kernel(theirs)


def _kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape[2:] if n != 1)


def _unknown_layer(name: str, base: Base) -> KronaError:
    component = name.partition(".")[0]
    if component not in base.components:
        available = ", ".join(base.components)
        cause = f"{base.name} has no component {quoted(component)}; it has {available}."
        return BaseMismatchError(cause, fix=_OTHER_BASE)
    return BaseMismatchError(f"layer not found in {base.name}.", fix=_OTHER_BASE)
