"""Is this adapter sound, and does it fit its base? One answer for every format. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from krona_hub.bases.base import Base
from krona_hub.bases.locate import load_base
from krona_hub.checkpoints.findings import Finding
from krona_hub.schema import validate as checks
from krona_hub.sources import resolve


@dataclass(frozen=True)
class ValidationReport:
    """What `validate` found; () for a sound adapter."""

    path: Path
    findings: tuple[Finding, ...]  # errors first

    @property
    def errors(self) -> tuple[Finding, ...]:
        return tuple(f for f in self.findings if f.severity == "error")

    @property
    def valid(self) -> bool:
        """Whether there is no error; warnings do not count."""
        return not self.errors

    @property
    def exit_code(self) -> int:
        """0, or that of the first error: 2 for a broken file, 5 for one that does not fit its base, 7 for none."""
        return self.errors[0].error().exit_code if self.errors else 0


def validate(source: str | Path, base: str | Path | Base | None = None) -> ValidationReport:
    """All that is wrong with the adapter at `source`: structure, types, numbers, schema, and layers against `base`.

    Raises UnknownBaseError where `base` names none, NotFoundError where `source` does not exist.
    """
    path = resolve(source)
    known = base if base is None or isinstance(base, Base) else load_base(base)
    return ValidationReport(path, checks.validate(path, known))
