"""Verify a merged checkpoint: every tensor against round(base + Σ w·ΔW), or against the base if untouched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from krona_hub.adapters.adapter import Adapter
from krona_hub.aliases import Progress
from krona_hub.checkpoints.reader import load
from krona_hub.errors import BaseMismatchError
from krona_hub.kron.parallel import in_parallel
from krona_hub.merging.arithmetic.layer_changes import patches_of
from krona_hub.merging.plan import MergePlan, plan_merge
from krona_hub.sources import resolve_base
from krona_hub.verification.check_tensors import Patches, TensorOutcome, check_touched, check_untouched
from krona_hub.verification.report import MergeCheck, TensorCheck
from krona_hub.verification.tensor_pairs import LocatedTensor, TensorPair, headers_of, pairs

Targets = Mapping[tuple[str, str], Patches]  # (file, tensor) -> its patches


def contains(
    merged: str | Path,
    base: str | Path,
    adapters: Sequence[tuple[Adapter | str | Path, float]],
    *,
    exact: bool = False,
    component: str | None = None,
    block_weights: Mapping[str, float] | None = None,
    allow_missing: bool = False,
    progress: Progress | None = None,
) -> MergeCheck:
    """Check whether `merged` equals the merge of the adapters into `base`, tensor by tensor.

    Raises what `plan_merge` raises, and BaseMismatchError if the two checkpoints have no tensors in common.
    """
    plan = plan_merge(
        base,
        adapters,
        component=component,
        block_weights=block_weights,
        allow_missing=allow_missing,
        allow_base_mismatch=True,
    )
    path, targets, weights = resolve_base(merged), _targets(plan), [float(weight) for _, weight in adapters]
    compared = list(pairs(headers_of(plan.tree.root), headers_of(path)))
    if not any(pair.base and pair.merged for pair in compared):
        raise BaseMismatchError(
            f"{merged} and {base} have no tensors in common.",
            fix="Compare checkpoints of one layout: two diffusers folders, or two checkpoint files.",
        )
    total, done, outcomes = sum(pair.nbytes for pair in compared), 0, []
    for pair, outcome in in_parallel(lambda pair: _check(pair, targets, weights, exact), compared):
        outcomes.append(outcome)
        done += pair.nbytes
        if progress:
            progress(done, total)
    return MergeCheck(
        merged=path,
        base=plan.tree.root,
        adapters=tuple(_label(i, source) for i, (source, _) in enumerate(adapters, 1)),
        weights=tuple(weights),
        matched=tuple(adapter.match_summary for adapter in plan.adapters),
        tensors=tuple(outcome.check for outcome in outcomes),
        strengths=_overall(outcomes),
        notes=(*plan.notes, *_notes(outcomes)),
        skipped=tuple(name for adapter in plan.adapters for name in adapter.missing),
    )


def _label(number: int, source: Adapter | str | Path) -> str:
    return f"adapter {number}" if isinstance(source, Adapter) else str(source)


# --- one tensor ------------------------------------------------------------------------------------------------------


def _check(pair: TensorPair, targets: Targets, weights: Sequence[float], exact: bool) -> TensorOutcome:
    stored = pair.present[0]
    patches = targets.get((stored.file, stored.tensor), ()) if pair.base else ()
    touched = any(patch.weight for own in patches for patch in own)
    check = TensorCheck(stored.tensor, stored.file, "same", touched, stored.info.numel)
    if pair.base is None or pair.merged is None:
        return TensorOutcome(replace(check, state="missing" if pair.base else "added"))
    if pair.base.info.shape != pair.merged.info.shape:
        return TensorOutcome(replace(check, state="other shape"))
    weight, merged = _tensor(pair.base), _tensor(pair.merged)
    if touched:
        return check_touched(check, weight, merged, patches, weights, exact)
    return check_untouched(check, weight, merged, exact)


def _tensor(stored: LocatedTensor) -> Tensor:
    """Memory-map the tensor from its file."""
    return load(stored.header, [stored.tensor])[stored.tensor]


def _overall(outcomes: Sequence[TensorOutcome]) -> tuple[float, ...]:
    """Return the mean strengths over all touched tensors that differ, weighted by ‖ΔW‖²; () for none."""
    found = [(o.numbers.gram.diagonal(), o.check.strengths) for o in outcomes if o.numbers is not None]
    if not found:
        return ()
    weights = torch.stack([weight for weight, _ in found])
    strengths = torch.tensor([s for _, s in found], dtype=torch.float64).nan_to_num()
    mean = (weights * strengths).sum(0) / weights.sum(0)  # 0 / 0 is NaN for an adapter without a delta in any of them
    return tuple(mean.tolist())


def _notes(outcomes: Sequence[TensorOutcome]) -> Iterator[str]:
    missing = [o.check.tensor for o in outcomes if o.check.state == "missing"]
    if len(missing) > len(outcomes) // 2:
        yield "most tensors of the base are missing in the merged checkpoint; it may contain only one component"


# --- expected changes ------------------------------------------------------------------------------------------------


def _targets(plan: MergePlan) -> Targets:
    """Return the patches of every tensor that the merge would change."""
    adapters = [part.load() for part in plan.parts]
    targets: dict[tuple[str, str], Patches] = {}
    for file in plan.files:
        for tensor in file.tensors:
            own = [[t for t in tensor.targets if t.adapter == i] for i in range(len(adapters))]
            patches = [patches_of(some, lambda i, layer: adapters[i].delta(layer), tensor.name) for some in own]
            targets[_relative(file.path, plan.tree.root), tensor.name] = patches
    return targets


def _relative(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix() if root.is_dir() else path.name
