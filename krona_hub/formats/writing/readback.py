"""Reading back what was written, before it counts."""

from __future__ import annotations

from pathlib import Path

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.errors import IntegrityError, KronaError
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.write_plan import WritePlan, gathered
from krona_hub.kron.norms import norm, relative_difference
from krona_hub.kron.parallel import in_parallel

WORST = 1e-5  # relative: float32 products round at 1e-7, and no mistake in a name, an order or a scale is below 1e-3
_REPORT = "Nothing was kept. This is a bug of krona_hub: please report it with the file."


def checked(plan: WritePlan, staged: Path) -> float:
    """The worst relative difference of the staged file from what was meant; IntegrityError above WORST."""
    components = plan.adapter.components
    component = components[0] if len(components) == 1 else None
    try:
        back = read(staged, base=plan.base, format=plan.aim.format, component=component)
    except KronaError as error:
        raise IntegrityError(f"the file that was written cannot be read back: {error}", fix=_REPORT) from error
    lost = sorted(plan.adapter.layers.keys() - back.layers.keys())
    lost += [layer for layer in sorted(back.layers.keys() - plan.adapter.layers.keys()) if _says(back.layers[layer])]
    if lost:
        raise IntegrityError(f"{len(lost)} layers were not read back as written, {lost[0]} first.", fix=_REPORT)
    worst, where = max(_differences(plan, back), default=(0.0, ""))
    if not worst <= WORST:
        raise IntegrityError(f"{where} was read back with a relative difference of {worst:.1e}.", fix=_REPORT)
    return worst


def _says(delta: LayerDelta) -> bool:
    """Whether a delta changes anything. A fused q|k|v of which q is adapted is read back with zeros for the rest."""
    return delta.magnitude is not None or norm(delta.sums) > 0


def _differences(plan: WritePlan, back: Adapter) -> list[tuple[float, str]]:
    """(difference, name): against the adapter itself, or against the tensors as cast, for half precision is meant."""
    if plan.dtype is None:
        pairs = [(x, back.layers[x], delta) for x, delta in plan.adapter.layers.items()]
    else:
        found = gathered(back.layers, plan.homes)
        pairs = [(m.name, found[m.name], m.delta) for m in plan.modules]
    return [(worst, pair[0]) for pair, worst in in_parallel(lambda pair: difference(*pair[1:]), pairs)]


def difference(found: LayerDelta, meant: LayerDelta) -> float:
    """Relative Frobenius difference of two deltas and of their DoRA magnitudes, the larger of both."""
    sums = relative_difference(found.sums, meant.sums)
    if found.magnitude is None or meant.magnitude is None:
        return sums if found.magnitude is meant.magnitude else float("inf")
    if found.magnitude_axis != meant.magnitude_axis:
        return float("inf")
    m, reference = found.magnitude.double(), meant.magnitude.double()
    return max(sums, float((m - reference).norm() / reference.norm().clamp_min(1e-300)))
