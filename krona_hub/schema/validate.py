"""Is this file sound? Structure, types and numbers of any file; schema, shapes and base of a native one. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from krona_hub.bases.base import Base
from krona_hub.checkpoints import finite_scan
from krona_hub.checkpoints.findings import Finding, Severity, quoted
from krona_hub.checkpoints.header import FLOATS, Header, examine
from krona_hub.errors import BaseMismatchError, DtypeError, KronaError, NonFiniteError, UnrecognisedError
from krona_hub.schema import tensor_layout
from krona_hub.schema.tensor_layout import Layer, NativeLayout

_OTHER_BASE = "Give the base that the adapter was made for, or convert the file again with --base."


def validate(path: Path | str, base: Base | None = None) -> tuple[Finding, ...]:
    """All that is wrong with a file, the worst first; () for a sound one.

    A native file is checked against its schema, and against `base` where one is given; of a file of another format
    only the structure, the types and the numbers are checked here.
    """
    try:
        header, findings = examine(path)
    except KronaError as error:
        return (Finding.of(error),)
    if findings:  # offsets that lie are no place to read numbers from
        return findings
    native = tensor_layout.is_native(header.metadata)
    own = native_findings(header, base) if native else dtype_findings(header)
    return ordered([*own, *number_findings(header)])


def ordered(findings: list[Finding]) -> tuple[Finding, ...]:
    """Errors before warnings, each in the order they were found."""
    return tuple(sorted(findings, key=lambda f: f.severity != "error"))


def number_findings(header: Header) -> Iterator[Finding]:
    """NaN and infinity, by tensor."""
    try:
        counts = finite_scan.scan(header)
    except KronaError as fault:
        yield Finding.of(fault)
        return
    for name, count in counts.items():
        error = NonFiniteError(
            f"{count:,} of its {header.tensors[name].numel:,} numbers are NaN or infinite.",
            fix="The training diverged or a cast overflowed: take an earlier checkpoint, or save it as F32 or BF16.",
        )
        yield Finding.of(error, where=quoted(name))


def dtype_findings(header: Header) -> Iterator[Finding]:
    """Tensors of types that adapters do not use; a single number, such as a counter, is only worth a warning."""
    for name, info in header.tensors.items():
        if info.dtype not in FLOATS:
            error = DtypeError(f"its type is {info.dtype}.", fix=f"Adapters hold {', '.join(FLOATS)}: save it again.")
            yield Finding.of(error, where=quoted(name), severity="warning" if info.numel == 1 else "error")


def native_findings(header: Header, base: Base | None = None) -> Iterator[Finding]:
    """What a native file breaks of its schema, and of `base`."""
    try:
        known, findings = tensor_layout.examine(header)
    except KronaError as refusal:
        yield Finding.of(refusal)
        return
    yield from findings
    if not known.layers and not findings:
        error = UnrecognisedError("the file holds no layer.", fix="Was the right file converted?")
        yield Finding.of(error, severity="warning")
    if base is not None:
        yield from base_findings(known, base)


def base_findings(known: NativeLayout, base: Base) -> Iterator[Finding]:
    """Layers that `base` does not have, or has with another shape; a base with other hashes is worth a warning."""
    yield from _fingerprint_finding(known, base)
    for name, layer in known.layers.items():
        module = base.module(name)
        if module is None:
            uncovered = name.partition(".")[0] not in base.components and base.uncovered
            severity: Severity = "warning" if uncovered else "error"
            yield Finding.of(_unknown_layer(name, base), where=quoted(name), severity=severity)
        elif not _same_weight(layer, module.shape):
            error = BaseMismatchError(
                f"its weight is {list(layer.weight_shape)}, in {base.name} it is {list(module.shape)}.",
                fix=_OTHER_BASE,
            )
            yield Finding.of(error, where=quoted(name))


def _fingerprint_finding(known: NativeLayout, base: Base) -> Iterator[Finding]:
    noted = known.header.base.fingerprint if known.header.base else None
    if noted and noted != base.fingerprint:
        error = BaseMismatchError(f"the file was made for a base with other layers than {base.name}.", fix=_OTHER_BASE)
        yield Finding.of(error, where="krona.header base.fingerprint", severity="warning")


def _same_weight(layer: Layer, shape: tuple[int, ...]) -> bool:
    """Equal, or equal but for trailing kernels of size 1: a linear layer that was once a 1x1 convolution."""
    ours, theirs = layer.weight_shape, shape
    return ours[:2] == theirs[:2] and _kernel(ours) == _kernel(theirs)


def _kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(n for n in shape[2:] if n != 1)


def _unknown_layer(name: str, base: Base) -> KronaError:
    component = name.partition(".")[0]
    if component not in base.components:
        have = ", ".join(base.components)
        return BaseMismatchError(f"{base.name} has no component {quoted(component)}; it has {have}.", fix=_OTHER_BASE)
    return BaseMismatchError(f"{base.name} has no such layer.", fix=_OTHER_BASE)
