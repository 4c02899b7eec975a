"""Verify a written file by reading it back before it replaces the output."""

from __future__ import annotations

from pathlib import Path

import torch

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.errors import InexpressibleError, IntegrityError, KronaError
from krona_hub.formats.compatibility.verdicts import verdict
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.write_plan import WritePlan
from krona_hub.kron.norms import norm, relative_difference
from krona_hub.kron.parallel import in_parallel

WORST = 1e-5  # relative tolerance: float32 rounds at 1e-7, and any error in a name, an order or a scale exceeds 1e-3
_REPORT = "No output was kept. This is a bug in krona_hub: report it and attach the file."


def checked(plan: WritePlan, staged: Path) -> float:
    """The largest relative difference between the staged file and the adapter; raises IntegrityError above WORST."""
    components = plan.adapter.components
    component = components[0] if len(components) == 1 else None
    try:
        back = read(staged, base=plan.base, format=plan.aim.format, component=component)
    except KronaError as error:
        raise IntegrityError(f"The written file cannot be read back: {error}", fix=_REPORT) from error
    wrong = sorted(plan.adapter.layers.keys() - back.layers.keys())
    added = sorted(back.layers.keys() - plan.adapter.layers.keys())
    wrong += [layer for layer in added if _is_nonzero(back.layers[layer])]
    if wrong:
        raise IntegrityError(f"{len(wrong)} layers differ after reading back; the first is {wrong[0]}.", fix=_REPORT)
    _check_vectors(plan, back)
    worst, where = max(_differences(plan, back), default=(0.0, ""))
    if not worst <= WORST:
        raise IntegrityError(f"{where} has a relative difference of {worst:.1e} after reading back.", fix=_REPORT)
    return worst


def check_it_loads(plan: WritePlan, staged: Path) -> None:
    """Raise InexpressibleError unless `inspect` would say of the staged file that its application loads it, whole."""
    application = plan.aim.tool
    if application is None:
        return
    components = plan.adapter.components
    about = describe(staged, base=plan.base, component=components[0] if len(components) == 1 else None)
    found = verdict(application, about)
    if not found.ok:
        raise InexpressibleError(
            f"{application.title} would not load the file completely and correctly: {found.why}; nothing was written.",
            fix="Use --to lora or --to lokr for a file for no particular application; "
            f"`krona tools {application.name}` lists what it loads.",
        )


def _check_vectors(plan: WritePlan, back: Adapter) -> None:
    """Raise IntegrityError unless the file has the same vectors, apart from zeros."""
    found = {name: v for name, v in back.vectors.items() if name in plan.vectors or bool(v.any())}
    wrong = list(found.keys() ^ plan.vectors.keys())
    wrong += [n for n, v in plan.vectors.items() if n in found and not torch.equal(found[n].double(), v.double())]
    if wrong:
        raise IntegrityError(f"{len(wrong)} vectors differ after reading back; the first is {wrong[0]}.", fix=_REPORT)


def _is_nonzero(delta: LayerDelta) -> bool:
    """Whether a delta changes its layer. A fused q|k|v with only q adapted is read back with zeros for k and v."""
    return delta.magnitude is not None or norm(delta.sums) > 0


def _differences(plan: WritePlan, back: Adapter) -> list[tuple[float, str]]:
    """(difference, layer): from the adapter, or from the cast numbers, because the loss of a cast is intended."""
    meant = plan.adapter.layers if plan.dtype is None else plan.stored
    found = in_parallel(lambda layer: difference(back.layers[layer], meant[layer]), list(meant))
    return [(worst, layer) for layer, worst in found]


def difference(found: LayerDelta, meant: LayerDelta) -> float:
    """Relative Frobenius difference of two deltas or of their DoRA magnitudes, whichever is larger."""
    sums = relative_difference(found.sums, meant.sums)
    if found.magnitude is None or meant.magnitude is None:
        return sums if found.magnitude is meant.magnitude else float("inf")
    if found.magnitude_axis != meant.magnitude_axis:
        return float("inf")
    m, reference = found.magnitude.double(), meant.magnitude.double()
    return max(sums, float((m - reference).norm() / reference.norm().clamp_min(1e-300)))
