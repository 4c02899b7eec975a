"""Do adapters belong to the same base? Two that do not cannot be added."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from krona_hub.adapters.provenance import BaseModel
from krona_hub.errors import BaseMismatchError


def common_base(bases: Sequence[BaseModel | None], *, allow_mismatch: bool = False) -> BaseModel | None:
    """The base that all of them may be, as narrowly as they say it; None where none of them says anything.

    Unknown bases agree with everything. Raises BaseMismatchError for two that differ, unless `allow_mismatch`: then the
    first one counts.

    >>> common_base([BaseModel("sd21", candidates=("sd21", "sd21-base")), None, BaseModel("sd21-base")]).family
    'sd21-base'
    """
    known = [base for base in bases if base is not None]
    if not known:
        return None
    common = known[0]
    for other in known[1:]:
        if common.agrees_with(other):
            common = _narrowed(common, other)
        elif not allow_mismatch:
            raise BaseMismatchError(
                f"one adapter is for {common.words} and another for {other.words}.",
                fix="Combine adapters of one base. --allow-base-mismatch adds what has the same names and shapes.",
            )
    return common


def _narrowed(a: BaseModel, b: BaseModel) -> BaseModel:
    """What both allow, with the fields that only one of them knows."""
    family, candidates = a.family or b.family, a.candidates or b.candidates
    if a.family and b.family:
        names = sorted({*a.names} & {*b.names}) or [a.family]
        family = a.family if a.family in names else names[0]
        candidates = tuple(names) if len(names) > 1 else ()
    same = a.hub_id == b.hub_id
    return replace(
        a,
        family=family,
        candidates=candidates,
        fingerprint=a.fingerprint or b.fingerprint,
        hub_id=a.hub_id or b.hub_id,
        revision=a.revision if same and a.revision == b.revision else None,
    )
