"""The error of a conversion by its definition: dense and in float64, from two adapters that were read independently."""

from functools import cache
from math import hypot, inf

import torch


def true_errors(before, after, weights=None):
    """Relative error of every layer, and of all together.

    `weights` returns the base weight of a layer, for DoRA. Without one, a DoRA layer has the error 0 if it is the same
    to the last bit, and otherwise none; then there is no total either.
    """
    errors, lost, measured = {}, 0.0, True
    for layer, delta in before.layers.items():
        other, base = after[layer], weights(layer) if weights else None
        if is_same(delta, other):
            errors[layer] = 0.0
        elif base is None and (delta.magnitude is not None or other.magnitude is not None):
            measured = False
        else:
            difference = float((dense(other, base) - dense(delta, base)).norm())
            errors[layer], lost = relative(difference, size(delta, base)), hypot(lost, difference)
    if not lost or not measured:
        return errors, 0.0 if measured else None
    return errors, relative(lost, hypot(*(size(d, weights(n) if weights else None) for n, d in before.layers.items())))


def dense(delta, base=None):
    return delta.map(lambda t: t.double()).dense(None if base is None else base.double()).reshape(delta.matrix_shape)


@cache
def size(delta, base):
    return float(dense(delta, base).norm())


def relative(difference, norm):
    return difference / norm if norm else inf if difference else 0.0


def is_same(one, other):
    """Whether two deltas have the same factors to the last bit, so that no product is needed to compare them."""
    (forms, numbers), (others, values) = (
        ([(s.shape, s.rows, type(s.left), type(s.right)) for s in d.sums], [t.double() for t in d.tensors])
        for d in (one, other)
    )
    return (
        (forms, len(numbers), one.magnitude_axis) == (others, len(values), other.magnitude_axis)
        and (one.magnitude is None) == (other.magnitude is None)
        and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(numbers, values, strict=True))
    )


def agrees(reported, true):
    """Whether a reported error is the true one, as far as float32 allows."""
    return abs(reported - true) <= 1e-5 + 0.02 * true
