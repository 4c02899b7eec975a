"""Adapters to write and read, random and hand-made."""

from collections.abc import Mapping

import torch
from hypothesis import strategies as st
from torch import Tensor

from krona_hub.adapters.adapter import Adapter, BaseModel, LayerDelta, Provenance
from krona_hub.kron.terms import Factor, KronTerms, LowRank

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
sizes = st.integers(1, 4)
plain_text = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**53)
    | st.floats(allow_nan=False, allow_infinity=False)
    | plain_text,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(plain_text, inner, max_size=3),
    max_leaves=6,
)
objects = st.dictionaries(plain_text, json_values, max_size=3)
texts = st.dictionaries(plain_text, plain_text, max_size=3)
texts = texts.filter(lambda d: not any(k.startswith(("krona.", "format", "modelspec.")) for k in d))
FIELDS = {"base", "layers", "provenance", "training", "licence", "trigger_words"}
KERNELS = [(), (3,), (3, 3), (1, 1), (2, 1, 3)]


@st.composite
def numbers(draw: st.DrawFn, *shape: int) -> Tensor:
    seed = draw(st.integers(0, 99))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(draw(st.sampled_from(DTYPES)))


@st.composite
def factors(draw: st.DrawFn, terms: int, p: int, q: int) -> Factor:
    if draw(st.booleans()):
        return draw(numbers(terms, p, q))
    rank = draw(sizes)
    return LowRank(draw(numbers(terms, p, rank)), draw(numbers(terms, rank, q)))


def divisor_of(n: int) -> st.SearchStrategy[int]:
    return st.sampled_from([d for d in range(1, n + 1) if n % d == 0])


@st.composite
def deltas(draw: st.DrawFn) -> LayerDelta:
    weight = (
        draw(st.integers(1, 12)),
        draw(st.integers(1, 12)),
        *draw(st.sampled_from([(), (3,), (3, 3), (1, 1), (2, 1, 3)])),
    )
    out, in_ = weight[0], int(torch.Size(weight[1:]).numel())
    sums = []
    for _ in range(draw(st.integers(0, 3))):
        a1, a2, terms = draw(divisor_of(out)), draw(divisor_of(in_)), draw(st.integers(1, 3))
        left, right = draw(factors(terms, a1, a2)), draw(factors(terms, out // a1, in_ // a2))
        sums.append(KronTerms(left, right, draw(st.sampled_from(["kron", "shuffled"]))))
    axis = draw(st.sampled_from([None, "out", "in"]))
    if axis is None:
        return LayerDelta(tuple(sums), weight)
    return LayerDelta(tuple(sums), weight, draw(numbers(weight[0 if axis == "out" else 1])), axis)


layer_names = st.sampled_from(
    [
        "unet.mid.to_q",
        "unet.mid.to_q.kron_a.0",
        "unet.magnitude",
        "transformer.x.0",
        "text_encoder.encoder.layers.0.mlp.fc1",
        "text_encoder_3.ü.\n",
    ]
)
bases = st.none() | st.builds(
    BaseModel, st.none() | plain_text, st.none() | plain_text, st.none() | plain_text,
    st.none() | st.just("ab" * 32), st.lists(plain_text, max_size=2).map(tuple),
)  # fmt: skip


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    layers = draw(st.dictionaries(layer_names, deltas(), max_size=4))
    errors = {name: draw(st.sampled_from([0.0, 0.25, 0.012345])) for name in layers if draw(st.booleans())}
    unknown = draw(objects.filter(lambda o: not o.keys() & FIELDS))
    if layers and draw(st.booleans()):
        unknown = unknown | {"layers": {min(layers): {"temper": draw(json_values)}}, "provenance": {"seal": 1}}
    provenance = Provenance(
        created_by=draw(st.none() | plain_text),
        source_format=draw(st.none() | st.just("lycoris-lokr")),
        source_sha256=draw(st.none() | st.just("0f" * 32)),
        method=draw(st.none() | plain_text),
        relative_error=draw(st.none() | st.sampled_from([0, 0.5, 1e-7])),
        layer_errors=errors,
        training=draw(objects),
        licence=draw(st.none() | plain_text),
        trigger_words=tuple(draw(st.lists(plain_text, max_size=2))),
        metadata=draw(texts),
        unknown=unknown,
    )  # fmt: skip
    extras = draw(st.dictionaries(plain_text.filter(bool), numbers(2, 3), max_size=2))
    vectors = draw(st.dictionaries(layer_names, numbers(5) | numbers(1, 2, 3), max_size=2))
    return Adapter(layers, draw(bases), provenance, extras, vectors)


def assert_same_tensor(found: Tensor, wanted: Tensor) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape and torch.equal(found, wanted)


def assert_same_adapter(found: Adapter, wanted: Adapter) -> None:
    assert found.base == wanted.base and found.provenance == wanted.provenance
    assert_same_tensors(found.extras, wanted.extras)
    assert_same_tensors(found.vectors, wanted.vectors)
    assert list(found.layers) == list(wanted.layers)
    for name, delta in found.layers.items():
        assert_same_delta(delta, wanted.layers[name])


def assert_same_tensors(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert_same_tensor(tensor, wanted[name])


def assert_same_delta(found: LayerDelta, wanted: LayerDelta) -> None:
    assert found.weight_shape == wanted.weight_shape
    assert [(s.rows, s.shape, len(s.tensors)) for s in found.sums] == [
        (s.rows, s.shape, len(s.tensors)) for s in wanted.sums
    ]
    assert (found.magnitude is None) == (wanted.magnitude is None)
    assert found.magnitude is None or found.magnitude_axis == wanted.magnitude_axis
    for one, other in zip(found.tensors, wanted.tensors, strict=True):
        assert_same_tensor(one, other)
