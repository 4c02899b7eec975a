"""Merge DoRA layers with their base weights into plain deltas, for targets without a magnitude."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.bases.loading import read as read_weight
from krona_hub.bases.loading import weight_files
from krona_hub.conversion.methods import Keep, Method
from krona_hub.conversion.target import ConversionTarget
from krona_hub.errors import UnknownBaseError, one_of
from krona_hub.formats.compatibility.applications import APPLICATIONS
from krona_hub.formats.compatibility.factorizations import why_not_form
from krona_hub.formats.forms.normal_forms import form_of
from krona_hub.kron.terms import KronTerms


def bake_dora(
    adapter: Adapter, target: ConversionTarget, method: Method, base: str | Path | None
) -> dict[str, LayerDelta]:
    """Return the DoRA layers that the method or the target requires as plain deltas W′ − W; often none.

    A DoRA layer that only changes its name keeps its magnitude and needs no base weights. Raises UnknownBaseError if
    base weights are needed and `base` is None.
    """
    names = [name for name, delta in adapter.layers.items() if delta.magnitude is not None]
    refused: Mapping[str, str] = {}
    if isinstance(method, Keep):
        refused = target.refusals({name: adapter.layers[name] for name in names})
        names = list(refused)
    if not names:
        return {}
    if base is None:
        raise UnknownBaseError(
            f"{len(names)} DoRA layers (first: {names[0]}) require the base weights to compute their delta.",
            fix="Specify the base model with --base (a diffusers folder or a checkpoint file with weights).",
        )
    try:
        return plain_deltas({name: adapter.layers[name] for name in names}, base)
    except UnknownBaseError as error:
        if not refused:
            raise
        kept = one_of(_keeping(adapter.layers[names[0]]), most=len(APPLICATIONS))
        raise UnknownBaseError(
            f"{target.tool or target.format} cannot hold the DoRA of {names[0]} ({refused[names[0]]}), and to make a "
            f"plain delta of it takes the base weights: {error.cause}",
            fix=f"{error.fix} Applications that may load the DoRA as it is: {kept}.",
        ) from error


def _keeping(delta: LayerDelta) -> list[str]:
    """The applications whose rules allow the DoRA of a layer."""
    form = form_of(delta)
    return [name for name in APPLICATIONS if why_not_form(form, name) is None]


def plain_deltas(layers: Mapping[str, LayerDelta], base: str | Path) -> dict[str, LayerDelta]:
    """Return DoRA layers as what they add to the weights of `base`. Raises UnknownBaseError if a weight is missing."""
    places = weight_files(base)
    missing = [name for name in layers if name not in places]
    if missing:
        raise UnknownBaseError(
            f"{base} does not contain the weight of {missing[0]} (and of {len(missing) - 1} other DoRA layers).",
            fix="Specify a diffusers folder with weights, or the checkpoint file, with --base.",
        )
    return {name: _baked(delta, read_weight(places[name])) for name, delta in layers.items()}


def _baked(delta: LayerDelta, weight: Tensor) -> LayerDelta:
    dense = delta.dense(weight).reshape(1, *delta.matrix_shape)
    return replace(delta, sums=(KronTerms(torch.ones(1, 1, 1), dense),), magnitude=None)
