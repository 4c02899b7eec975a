"""Validate an adapter of any format, and optionally its fit to a base model. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from krona_hub.adapters.unknown_base import module_name
from krona_hub.bases.base import Base
from krona_hub.checkpoints.findings import Finding, quoted
from krona_hub.errors import AmbiguousError, KronaError, UnknownBaseError
from krona_hub.formats.known.format import Format
from krona_hub.formats.known.registry import detect_format
from krona_hub.formats.parsing.adapter_file import AdapterFile, open_files
from krona_hub.formats.parsing.base_match import match_base
from krona_hub.formats.reading.read_plan import make_plan, measure
from krona_hub.schema import tensor_layout
from krona_hub.schema import validate as checks
from krona_hub.schema.tensor_layout import is_native
from krona_hub.sources import resolve

OPEN = (AmbiguousError, UnknownBaseError)  # the file is valid but ambiguous; an option resolves it


@dataclass(frozen=True)
class ValidationReport:
    """Findings of `validate`; none for a valid adapter."""

    path: Path
    format: str | None  # a name of FORMATS; None if unknown
    findings: tuple[Finding, ...]  # errors first

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.severity == "error")

    @property
    def valid(self) -> bool:
        """Whether there are only warnings, or no findings."""
        return not self.errors

    @property
    def exit_code(self) -> int:
        """0, or the exit code of the first error: 2 for a broken file, 5 for one that does not fit its base."""
        return self.errors[0].error().exit_code if self.errors else 0


def validate(source: str | Path, base: str | Path | Base | None = None) -> ValidationReport:
    """Validate an adapter: file structure, dtypes, values, schema or format, and layers.

    Parameters
    ----------
    source : adapter file, PEFT folder or Hub id.
    base : base model (optional); every layer must exist in it, with its shape.

    Returns
    -------
    ValidationReport : the findings, errors first; none for a valid adapter.

    Raises
    ------
    NotFoundError, UnknownBaseError : `source` does not exist; `base` is unknown.

    Examples
    --------
    >>> from importlib.resources import files
    >>> validate(files("krona_hub.assets") / "zorbi_lokr.safetensors", base="tiny-scenes").valid
    True
    """
    path = resolve(source)
    try:
        files = open_files(path, base)
    except UnknownBaseError:
        raise
    except KronaError as error:  # a file reports all structural errors, a folder the first one
        findings = checks.validate(path) if path.is_file() else ()
        return ValidationReport(path, None, findings or (Finding.of(error),))
    formats, found = zip(*((_format(f), tuple(_findings(f))) for f in files), strict=True)
    all_findings = [_in_part(finding, f, path) for f, own in zip(files, found, strict=True) for finding in own]
    return ValidationReport(path, formats[0], checks.ordered(all_findings))


def _format(file: AdapterFile) -> str | None:
    try:
        return detect_format(file).name
    except KronaError:
        return None


def _findings(file: AdapterFile) -> Iterator[Finding]:
    """Yield the findings of one file with a valid structure."""
    if is_native(file.metadata):
        mismatch = _native_mismatch(file)
        if mismatch:
            yield Finding.of(mismatch)
        yield from checks.native_findings(file.header, None if mismatch else file.base)
    else:
        yield from _module_findings(file)
    yield from checks.number_findings(file.header)


def _native_mismatch(file: AdapterFile) -> KronaError | None:
    """Return the error of a native file for another base model; None without a base model, or if it fits."""
    if file.base is None:
        return None
    known, findings = tensor_layout.examine(file.header)
    own = any(module_name(name) is not None for name in known.layers)
    shapes = {name: layer.weight_shape for name, layer in known.layers.items()}
    return None if findings or own else match_base(shapes, {}, file.base, None).mismatch


def _module_findings(file: AdapterFile) -> Iterator[Finding]:
    """Yield the modules that a reader would reject, each with the reason."""
    try:
        format = detect_format(file)
    except KronaError as error:
        yield Finding.of(error, severity="warning" if isinstance(error, OPEN) else "error")
        yield from checks.dtype_findings(file.header)
        return
    for name, problem in _problems(file, format).items():
        open_question = not name and isinstance(problem, OPEN)
        yield Finding.of(problem, where=name and quoted(name), severity="warning" if open_question else "error")


def _problems(file: AdapterFile, format: Format) -> Mapping[str, KronaError]:
    """Return, by module or key, why it cannot be read; "" maps to an error of the whole file."""
    try:
        plan = make_plan(file, format)
        return {"": plan.match.mismatch} if plan.match.mismatch else plan.problems
    except KronaError as error:
        whole = error
    try:
        return {**measure(file, format)[2], "": whole}
    except KronaError:  # the same error, raised before any module was read
        return {"": whole}


def _in_part(finding: Finding, file: AdapterFile, whole: Path) -> Finding:
    """Return the finding with the file of the folder that it concerns."""
    if file.path == whole or file.path.parent == whole:
        return finding
    part = file.path.relative_to(whole)
    return finding._replace(where=f"{part}: {finding.where}" if finding.where else str(part))
