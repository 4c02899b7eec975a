"""The weighted sum of adapters is the weighted sum of their dense deltas, in no more parameters than its parts."""

import itertools

import pytest
import torch

from krona_hub.adapters.adapter import Adapter, BaseModel, LayerDelta, Provenance
from krona_hub.combining.weighted_sum import weighted_sum
from krona_hub.errors import BaseMismatchError, UnsupportedError, UsageError
from krona_hub.formats.forms.normal_forms import size_of
from krona_hub.formats.reading.reader import read
from krona_hub.kron.terms import KronTerms, LowRank, as_lora
from krona_hub.kron.to_lora import dense_sum
from tests.shared import shared

MIXED = (  # formats, shapes, row orders, alpha ≠ rank, half precision; all of the tiny base
    "diffusekrona_a1_8_a2_4.safetensors",
    "kohya_lora_dim4_a1_conv2_a1.safetensors",
    "lyc_f8_dim1_a2.safetensors",
    "lyc_fp16_dim2_a1.safetensors",
    "lyc_tucker_dim2_a1.safetensors",
    "lyclocon_dim3_a2_conv2_a1.safetensors",
    "peft_lokr_bf16_r2_a1",
    "peft_lokr_factor16_both_r3_a1",
    "diffusers_pipe_lora_dreambooth_r2_a2.safetensors",
)


def golden(name):
    return read(shared("golden", name), base=shared("golden", "base"))


def numbers(*shape):
    return torch.randn(shape, dtype=torch.float32)


def layer(*sums, weight=None):
    return LayerDelta(sums, weight or sums[0].shape.full)


def one(delta, **more):
    return Adapter({"unet.a": delta}, **more)


def exact(delta):
    """The dense delta in float64."""
    return dense_sum(delta.sums) if delta.sums else torch.zeros(delta.matrix_shape, dtype=torch.float64)


def check_is_the_sum(found, parts):
    assert found.layers.keys() == set().union(*(a.layers for a, _ in parts))
    for name, delta in found.layers.items():
        terms = [w * exact(a.layers[name]) for a, w in parts if name in a.layers]
        scale = sum(float(t.norm()) for t in terms)
        assert float((exact(delta) - sum(terms)).norm()) <= 1e-7 * scale, name


@pytest.mark.parametrize("pair", list(itertools.combinations(MIXED, 2)), ids=" + ".join)
def test_two_formats_add_up_to_the_sum_of_their_dense_deltas(pair):
    parts = [(golden(pair[0]), 0.75), (golden(pair[1]), -1.3)]
    found = weighted_sum(parts)
    check_is_the_sum(found, parts)
    assert sum(size_of(d)[0] for d in found.layers.values()) <= sum(
        size_of(d)[0] for a, _ in parts for d in a.layers.values()
    )


@pytest.mark.parametrize("weights", [(1, 1, 1), (0.3, -2, 0), (0, 0, 0.5), (-1, 1e-3, 7)])
def test_any_number_of_adapters_at_any_weights(weights):
    parts = list(zip(map(golden, MIXED[1:4]), weights, strict=True))
    check_is_the_sum(weighted_sum(parts), parts)


def test_float64_factors_keep_their_digits():
    a, b = (layer(KronTerms(numbers(2, 3, 2).double(), numbers(2, 5, 4).double())) for _ in range(2))
    found = weighted_sum([(one(a), 0.1), (one(b), -0.7)])
    assert float((exact(found["unet.a"]) - (0.1 * exact(a) - 0.7 * exact(b))).norm()) <= 1e-14 * float(exact(a).norm())


def test_sums_of_one_shape_become_one_with_all_their_terms():
    a, b, other = (layer(KronTerms(numbers(k, *s[:2]), numbers(k, *s[2:]))) for k, s in
                   ((2, (3, 2, 5, 4)), (3, (3, 2, 5, 4)), (1, (5, 4, 3, 2))))  # fmt: skip
    sums = weighted_sum([(one(a), 1), (one(b), 2), (one(other), 1)])["unet.a"].sums
    assert [(s.shape, s.terms) for s in sums] == [((3, 2, 5, 4), 5), ((5, 4, 3, 2), 1)]


def test_loras_become_one_lora_whose_rank_is_the_sum_of_theirs():
    a, b = (layer(as_lora(numbers(20, r), numbers(r, 12))) for r in (3, 5))
    (found,) = weighted_sum([(one(a), 0.5), (one(b), -1)])["unet.a"].sums
    assert found.right.rank == 8 and found.shape == (1, 1, 20, 12)


def test_interleaved_rows_stay_apart_from_plain_ones():
    left, right = numbers(1, 4, 2), numbers(1, 5, 6)
    a, b = (layer(KronTerms(left, right, rows)) for rows in ("kron", "shuffled"))
    parts = [(one(a), 1.0), (one(b), 1.0)]
    check_is_the_sum(weighted_sum(parts), parts)
    assert len(weighted_sum(parts)["unet.a"].sums) == 2


def test_factors_of_weight_one_keep_their_type_and_their_numbers():
    half = layer(KronTerms(numbers(1, 3, 2).half(), LowRank(numbers(1, 5, 2).bfloat16(), numbers(1, 2, 4).bfloat16())))
    found = weighted_sum([(one(half), 1.0), (Adapter({"unet.b": half}), 2.0)])
    assert all(x is y for x, y in zip(found["unet.a"].tensors, half.tensors, strict=True))
    assert [t.dtype for t in found["unet.b"].tensors] == [torch.float32, torch.bfloat16, torch.bfloat16]


def test_an_adapter_less_itself_is_a_delta_of_nothing_and_says_so():
    adapter = golden(MIXED[2])
    nothing = weighted_sum([(adapter, 1.0), (golden(MIXED[2]), -1.0)])
    assert nothing.parameters == 0 and nothing.layers.keys() == adapter.layers.keys()
    assert all(float(exact(delta).abs().max()) == 0 for delta in nothing.layers.values())
    assert f"{len(adapter)} of {len(adapter)} layers are zero" in nothing.provenance.notes[0]


def test_an_adapter_and_itself_is_itself_at_the_sum_of_the_weights():
    adapter = golden(MIXED[3])
    twice = weighted_sum([(adapter, 0.5), (adapter, 0.25)])
    assert twice.parameters == adapter.parameters
    check_is_the_sum(twice, [(adapter, 0.75)])


def test_a_convolution_known_as_a_matrix_in_one_file_stays_a_convolution():
    s = KronTerms(numbers(1, 2, 3), numbers(1, 4, 2))
    both = weighted_sum([(one(layer(s)), 1), (one(layer(s, weight=(8, 6, 1, 1))), 1)])
    assert both["unet.a"].weight_shape == (8, 6, 1, 1)


def test_dora_is_refused_with_advice_unless_it_is_alone_at_full_strength():
    dora, plain = golden("lyc_dora_out_dim2_a1.safetensors"), golden(MIXED[2])
    kept = weighted_sum([(dora, 1.0), (plain, 0.0)])
    assert all(kept[name].magnitude is delta.magnitude for name, delta in dora.layers.items())
    for parts in ([(dora, 1.0), (plain, 1.0)], [(dora, 0.5)], [(dora, 1.0), (dora, 1.0)]):
        with pytest.raises(UnsupportedError, match="--exact --base"):
            weighted_sum(parts)


def test_adapters_of_different_bases_are_refused_and_of_different_sizes_always():
    a, b = (layer(as_lora(numbers(8, 2), numbers(2, n))) for n in (6, 4))
    sdxl, sd15 = (Provenance(), BaseModel("sdxl")), (Provenance(), BaseModel("sd15"))
    parts = [(one(a, base=sdxl[1]), 1), (one(a, base=sd15[1]), 1)]
    with pytest.raises(BaseMismatchError, match="for sdxl and another for sd15"):
        weighted_sum(parts)
    assert weighted_sum(parts, allow_base_mismatch=True).base == sdxl[1]
    with pytest.raises(BaseMismatchError, match=r"unet\.a: .*\(8, 4\) and \(8, 6\)"):
        weighted_sum([(one(a), 1), (one(b), 1)], allow_base_mismatch=True)


def test_bases_that_are_unknown_or_have_a_name_in_common_agree():
    a = layer(as_lora(numbers(8, 2), numbers(2, 6)))
    wide, narrow = BaseModel("sd21", candidates=("sd21", "sd21-base")), BaseModel("sd21-base", fingerprint="f")
    assert weighted_sum([(one(a), 1), (one(a, base=wide), 1)]).base == wide
    both = weighted_sum([(one(a, base=wide), 1), (one(a, base=narrow), 1)]).base
    assert (both.family, both.candidates, both.fingerprint) == ("sd21-base", (), "f")
    with pytest.raises(BaseMismatchError, match="fingerprint"):
        weighted_sum([(one(a, base=BaseModel(fingerprint=x)), 1) for x in ("f", "g")])


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_must_be_a_number(weight):
    with pytest.raises(UsageError, match="Invalid weight"):
        weighted_sum([(one(layer(as_lora(numbers(8, 2), numbers(2, 6)))), weight)])
    with pytest.raises(UsageError, match="Missing adapters"):
        weighted_sum([])


def test_the_first_of_two_embeddings_of_one_name_is_kept_and_reported():
    a = layer(as_lora(numbers(8, 2), numbers(2, 6)))
    first = one(a, extras={"emb_params": torch.zeros(3), "only": torch.ones(1)})
    second = one(a, extras={"emb_params": torch.ones(3)})
    found = weighted_sum([(first, 1.0), (second, -0.5)])
    assert found.extras["emb_params"].tolist() == [0.0] * 3 and "only" in found.extras
    assert any("emb_params" in note and "first is kept" in note for note in found.provenance.notes)


def test_what_the_files_say_of_themselves_is_kept_where_they_agree():
    a = layer(as_lora(numbers(8, 2), numbers(2, 6)))
    x = Provenance(licence="MIT", trigger_words=("cat",), metadata={"ss_v2": "False", "ss_seed": "1"})
    y = Provenance(licence="Apache-2.0", trigger_words=("dog", "cat"), metadata={"ss_v2": "False", "ss_seed": "2"})
    found = weighted_sum([(one(a, provenance=x), 1), (one(a, provenance=y), 1)]).provenance
    assert (found.licence, found.trigger_words) == ("MIT AND Apache-2.0", ("cat", "dog"))
    assert found.metadata == {"ss_v2": "False"}
