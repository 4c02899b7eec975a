"""Does this checkpoint contain exactly that? Every tensor of it against round(base + Σ w·ΔW), or against the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from krona_hub.adapter import Adapter
from krona_hub.checkpoints.reader import load
from krona_hub.errors import BaseMismatchError
from krona_hub.formats.files import read
from krona_hub.kron.parallel import in_parallel
from krona_hub.merging.base_tree import open_tree
from krona_hub.merging.patches import Patch
from krona_hub.sources import resolve
from krona_hub.verification.pairs import Pair, Stored, headers_of, pairs
from krona_hub.verification.report import MergeCheck, TensorCheck
from krona_hub.verification.tensors import Outcome, check_touched, check_untouched
from krona_hub.verification.verify_files import Progress

Patches = tuple[tuple[Patch, ...], ...]  # of one tensor: those of each adapter
Targets = Mapping[tuple[str, str], Patches]  # (file, tensor) -> its patches


def contains(
    merged: str | Path,
    base: str | Path,
    adapters: Sequence[tuple[Adapter | str | Path, float]],
    exact: bool = False,
    component: str | None = None,
    allow_missing: bool = False,
    progress: Progress | None = None,
) -> MergeCheck:
    """Whether `merged` is `base` with the adapters at their strengths, tensor by tensor.

    Raises BaseMismatchError where modules of an adapter are not in the base (unless `allow_missing`), or where the two
    checkpoints have no tensor in common.
    """
    places = resolve(merged), resolve(base)
    compared = list(pairs(headers_of(places[1]), headers_of(places[0])))
    if not any(pair.base and pair.merged for pair in compared):
        raise BaseMismatchError(
            f"{merged} and {base} have no tensor in common.",
            fix="Compare checkpoints of one layout: a diffusers folder with a diffusers folder, a file with a file.",
        )
    targets, matched = _targets(places[1], adapters, component, allow_missing)
    total, done, outcomes = sum(pair.nbytes for pair in compared), 0, []
    for pair, outcome in in_parallel(lambda pair: _check(pair, targets, exact), compared):
        outcomes.append(outcome)
        done += pair.nbytes
        if progress:
            progress(done, total)
    return MergeCheck(
        merged=places[0],
        base=places[1],
        adapters=tuple(_said(i, source) for i, (source, _) in enumerate(adapters, 1)),
        weights=tuple(float(weight) for _, weight in adapters),
        matched=matched,
        tensors=tuple(outcome.check for outcome in outcomes),
        strengths=_overall(outcomes),
        notes=tuple(_notes(outcomes)),
    )


def _said(place: int, source: Adapter | str | Path) -> str:
    return f"adapter {place}" if isinstance(source, Adapter) else str(source)


# --- one tensor ------------------------------------------------------------------------------------------------------


def _check(pair: Pair, targets: Targets, exact: bool) -> Outcome:
    stored = pair.present[0]
    patches = targets.get((stored.file, stored.tensor), ()) if pair.base else ()
    touched = any(patch.weight for own in patches for patch in own)
    check = TensorCheck(stored.tensor, stored.file, "same", touched, stored.info.numel)
    if pair.base is None or pair.merged is None:
        return Outcome(replace(check, state="missing" if pair.base else "added"))
    if pair.base.info.shape != pair.merged.info.shape:
        return Outcome(replace(check, state="other shape"))
    weight, merged = _tensor(pair.base), _tensor(pair.merged)
    if touched:
        return check_touched(check, weight, merged, patches, exact)
    return check_untouched(check, weight, merged, exact)


def _tensor(stored: Stored) -> Tensor:
    """Mapped from its file."""
    return load(stored.header, [stored.tensor])[stored.tensor]


def _overall(outcomes: Sequence[Outcome]) -> tuple[float, ...]:
    """The strengths over all touched tensors that differ: the mean of those found, weighted by ‖ΔW‖²; () for none."""
    found = [(o.numbers.gram.diagonal(), o.check.strengths) for o in outcomes if o.numbers is not None]
    if not found:
        return ()
    weights = torch.stack([weight for weight, _ in found])
    strengths = torch.tensor([s for _, s in found], dtype=torch.float64).nan_to_num()
    mean = (weights * strengths).sum(0) / weights.sum(0)  # 0 / 0 is NaN: an adapter without a delta in any of them
    return tuple(mean.tolist())


def _notes(outcomes: Sequence[Outcome]) -> Iterator[str]:
    missing = [o.check.tensor for o in outcomes if o.check.state == "missing"]
    if len(missing) > len(outcomes) // 2:
        yield "most tensors of the base are not in the merged checkpoint: is it a checkpoint of one component?"


# --- what should be there --------------------------------------------------------------------------------------------


def _targets(
    base: Path,
    adapters: Sequence[tuple[Adapter | str | Path, float]],
    component: str | None,
    allow_missing: bool,
) -> tuple[Targets, tuple[str, ...]]:
    """The patches of every tensor of the base, and per adapter how many of its layers matched."""
    tree, targets, matched = open_tree(base), dict[tuple[str, str], list[list[Patch]]](), []
    for i, (source, weight) in enumerate(adapters):
        adapter = source if isinstance(source, Adapter) else read(resolve(source), base=tree.base, component=component)
        known = [layer for layer in adapter.layers if layer in tree.places]
        if len(known) < len(adapter) and not (known and allow_missing):
            lost = next(layer for layer in adapter.layers if layer not in tree.places)
            raise BaseMismatchError(
                f"{len(known)} of {len(adapter)} layers of the adapter are in {base}; {lost} is not.",
                fix="Give the base it was made for; --allow-missing compares the others.",
            )
        for layer, place in ((name, place) for name in known for place in tree.places[name]):
            key = (place.path.relative_to(base).as_posix() if base.is_dir() else place.path.name, place.tensor)
            patch = Patch(adapter.layers[layer], float(weight), place.placement)
            targets.setdefault(key, [[] for _ in adapters])[i].append(patch)
        matched.append(f"{len(known)} of {len(adapter)} layers")
    return {key: tuple(tuple(own) for own in patches) for key, patches in targets.items()}, tuple(matched)
