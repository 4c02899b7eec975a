"""combine() on files: what is written means the sum, its error is the true error, and recompression is optimal."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.checkpoints.header import read_header
from krona_hub.combining import combine
from krona_hub.combining.recompression import to_terms, within
from krona_hub.conversion.target import ConversionTarget
from krona_hub.errors import ConflictError, InexpressibleError, LossyError, UsageError
from krona_hub.formats.forms.normal_forms import size_of
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.writer import write
from krona_hub.kron.terms import KronTerms, LowRank, as_lora, nearest_kron
from krona_hub.kron.to_lora import dense_sum
from tests.shared import shared

LOKR, LORA = "lyc_f8_dim1_a2.safetensors", "kohya_lora_dim4_a1_conv2_a1.safetensors"
BASE = {"base": shared("golden", "base")}


def golden(*names):
    return [shared("golden", name) for name in names]


def exact(delta):
    return dense_sum(delta.sums) if delta.sums else torch.zeros(delta.matrix_shape, dtype=torch.float64)


def true_error(found, meant):
    return float((exact(found) - exact(meant)).norm() / exact(meant).norm())


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def the_sum(*weighted):
    """Layer -> Σ weight · dense delta in float64, from the files themselves."""
    total = {}
    for path, weight in weighted:
        for name, delta in read(path, **BASE).layers.items():
            total[name] = total.get(name, 0) + weight * exact(delta)
    return total


@pytest.mark.parametrize("to", ["krona", "lora", "lycoris-locon", "peft-lora", "diffusers-lora"])
def test_two_loras_are_one_lora_in_every_format_that_holds_one(to, tmp_path):
    a, b = golden(LORA, "lyclocon_dim3_a2_conv2_a1.safetensors")
    report = combine([(a, 0.75), (b, -0.5)], tmp_path / "c.safetensors", to=to, **BASE)
    assert report.written and report.parameters_after == report.parameters_before
    rounded = 0.0 if to == "krona" else torch.finfo(torch.float32).eps  # weights are multiplied into `up`
    assert report.relative_error <= rounded
    found, meant = read(tmp_path / "c.safetensors", **BASE), the_sum((a, 0.75), (b, -0.5))
    assert found.layers.keys() == meant.keys()
    for name, dense in meant.items():
        assert float((exact(found[name]) - dense).norm()) <= 1e-6 * float(dense.norm()), name


def test_a_lokr_and_a_lora_are_kept_apart_inside_one_native_file(tmp_path):
    a, b = golden(LOKR, LORA)
    report = combine([(a, 1.0), (b, 0.5)], tmp_path / "c.safetensors", **BASE)
    parts = [read(path, **BASE) for path in (a, b)]
    assert report.parameters_after == sum(size_of(d)[0] for x in parts for d in x.layers.values())
    assert [(p.source, p.weight, p.format) for p in report.parts] == [
        (str(a), 1.0, "lycoris-lokr"),
        (str(b), 0.5, "kohya-lora"),
    ]
    found = read(tmp_path / "c.safetensors")
    for name, dense in the_sum((a, 1.0), (b, 0.5)).items():
        assert float((exact(found[name]) - dense).norm()) <= 1e-6 * float(dense.norm()), name


def test_the_file_says_what_it_was_made_of(tmp_path):
    report = combine([(golden(LOKR)[0], 0.8), (golden(LORA)[0], -1)], tmp_path / "c.safetensors", **BASE)
    method = read(tmp_path / "c.safetensors").provenance.method
    assert f"0.8 · {LOKR} (sha256 {report.parts[0].sha256})" in method and f"-1 · {LORA} (sha256" in method


def test_what_a_format_cannot_hold_is_refused_with_what_can_be_done(tmp_path):
    pair = [(path, 1.0) for path in golden(LOKR, LORA)]
    with pytest.raises(InexpressibleError, match=r"--to krona, which stores any sum") as refusal:
        combine(pair, tmp_path / "c.safetensors", to="lokr", **BASE)
    assert refusal.value.exit_code == 3 and not list(tmp_path.iterdir())
    report = combine(pair, tmp_path / "c.safetensors", to="lokr", max_error=0.2, **BASE)
    assert report.written and all(x.relative_error <= 0.2 + 1e-6 for x in report.layers)


def test_an_adapter_less_itself_is_written_as_zero_and_read_as_zero(tmp_path):
    (path,) = golden(LOKR)
    for to in ("krona", "lora", "lokr"):
        report = combine([(path, 1.0), (path, -1.0)], tmp_path / f"{to}.safetensors", to=to, **BASE)
        assert "layers are zero" in report.notes[0]
        back = read(tmp_path / f"{to}.safetensors", **BASE)
        assert back.layers.keys() == read(path, **BASE).layers.keys()
        assert all(float(exact(d).abs().max()) == 0 for d in back.layers.values())


@pytest.mark.parametrize(
    "options", [{"terms": 1}, {"terms": 2}, {"max_error": 0.3}, {"max_error": 0.5}, {"dtype": "bf16"}]
)
def test_the_error_that_is_reported_is_the_error_of_the_file(options, tmp_path):
    names = LOKR, "lyc_unbalanced_f4_dim3_a1.safetensors", "lyc_f4_dim2_a1.safetensors"
    pair = list(zip(golden(*names), (1, -0.6, 0.5), strict=True))
    report = combine(pair, tmp_path / "c.safetensors", **options, allow_loss=True, **BASE)
    found, meant = read(tmp_path / "c.safetensors", **BASE), the_sum(*pair)
    assert any(x.relative_error > 0 for x in report.layers)
    lost = whole = 0.0
    for x in report.layers:
        difference = float((exact(found[x.layer]) - meant[x.layer]).norm())
        assert x.relative_error * float(meant[x.layer].norm()) == pytest.approx(difference, rel=1e-4, abs=1e-6)
        lost, whole = lost + difference**2, whole + float(meant[x.layer].norm()) ** 2
    assert report.relative_error == pytest.approx((lost / whole) ** 0.5, rel=1e-4)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("weight", [-0.7, 3e-7])
@pytest.mark.parametrize(("name", "to"), [(LOKR, "lokr"), (LOKR, "krona"), (LORA, "lora"), (LORA, "peft-lora")])
def test_the_error_of_half_precision_is_the_error_of_the_file_in_every_form(name, to, weight, dtype, tmp_path):
    (path,) = golden(name)
    report = combine([(path, weight)], tmp_path / "c.safetensors", to=to, dtype=dtype, **BASE)
    trial = combine([(path, weight)], tmp_path / "t.safetensors", to=to, dtype=dtype, dry_run=True, **BASE)
    found, meant = read(tmp_path / "c.safetensors", **BASE), the_sum((path, weight))
    for x, y in zip(report.layers, trial.layers, strict=True):
        true = float((exact(found[x.layer]) - meant[x.layer]).norm() / meant[x.layer].norm())
        assert x.relative_error == y.relative_error == pytest.approx(true, rel=1e-3, abs=1e-6)
        assert x.relative_error < 0.02  # without a balance, float16 would lose the small ones


def test_too_lossy_a_sum_is_refused_and_nothing_is_written(tmp_path):
    pair = [(path, 1.0) for path in golden(LORA, "lyclocon_dim3_a2_conv2_a1.safetensors")]
    with pytest.raises(LossyError, match="nothing was written"):
        combine(pair, tmp_path / "c.safetensors", terms=1, **BASE)
    assert not list(tmp_path.iterdir())
    assert combine(pair, tmp_path / "c.safetensors", terms=1, allow_loss=True, **BASE).written


def test_options_and_places_are_checked_before_any_file_is_read(tmp_path):
    (tmp_path / "there.safetensors").touch()
    (broken,) = [tmp_path / "broken.safetensors"]
    broken.write_bytes(b"no adapter")
    for options in (
        {"terms": 2, "max_error": 0.1},
        {"terms": 0},
        {"max_error": 1.5},
        {"to": "cloneofsimo"},
        {"dtype": "x"},
    ):
        with pytest.raises(UsageError):
            combine([(broken, 1.0)], tmp_path / "c.safetensors", **options)
    with pytest.raises(ConflictError):
        combine([(broken, 1.0)], tmp_path / "there.safetensors")


def test_without_an_output_nothing_is_written_and_everything_is_measured():
    report = combine([(path, 1.0) for path in golden(LOKR, LORA)], terms=4, allow_loss=True, **BASE)
    assert not report.written and report.out is None and 0 < report.relative_error < 1


def test_equal_input_gives_equal_bytes(tmp_path):
    for name in "ab":
        combine([(path, 0.5) for path in golden(LOKR, LORA)], tmp_path / name, max_error=0.1, **BASE)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert read_header(tmp_path / "a").metadata["krona.schema"]


def test_adapters_in_memory_are_combined_as_well():
    adapter = Adapter({"unet.a": LayerDelta((as_lora(numbers(8, 2), numbers(2, 6)),), (8, 6))})
    report = combine([(adapter, 2.0)])
    assert report.parts[0].source == "adapter 1" and report.parts[0].sha256 is None


# --- recompression ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(0, 99), st.booleans())
def test_terms_of_one_shape_are_the_dense_optimum(terms, seed, low_rank):
    right = LowRank(numbers(3, 12, 2, seed=seed), numbers(3, 2, 10, seed=seed + 1))
    sums = (
        KronTerms(numbers(3, 4, 3, seed=seed + 2), right if low_rank else right.dense()),
        KronTerms(numbers(2, 4, 3, seed=seed + 3), numbers(2, 12, 10, seed=seed + 4)),
    )
    delta = LayerDelta(sums, (48, 30))
    found = to_terms({"x": delta}, terms)["x"].delta
    best = nearest_kron(exact(delta), (4, 3), terms).relative_error
    assert true_error(found, delta) == pytest.approx(best, rel=1e-5, abs=1e-6)
    assert sum(s.terms for s in found.sums) == min(terms, 5)


def test_of_several_shapes_the_one_that_loses_least_is_taken():
    delta = LayerDelta(
        (KronTerms(3 * numbers(2, 4, 3), numbers(2, 12, 10)), KronTerms(numbers(1, 6, 5), numbers(1, 8, 6))), (48, 30)
    )
    found = to_terms({"x": delta}, 2)["x"].delta
    errors = {shape: nearest_kron(exact(delta), shape, 2).relative_error for shape in ((4, 3), (6, 5))}
    assert true_error(found, delta) == pytest.approx(min(errors.values()), rel=1e-5)
    assert found.sums[0].shape[:2] == min(errors, key=errors.get)


def test_the_terms_of_a_lora_are_its_rank_and_the_result_is_the_dense_optimum():
    delta = LayerDelta(
        (as_lora(numbers(40, 3), numbers(3, 24)), as_lora(numbers(40, 5, seed=1), numbers(5, 24, seed=2))), (40, 24)
    )
    found = to_terms({"x": delta}, 4)["x"].delta
    sigma = torch.linalg.svdvals(exact(delta))
    assert true_error(found, delta) == pytest.approx(float(sigma[4:].norm() / sigma.norm()), rel=1e-5)
    assert found.sums[0].right.rank == 4


def test_products_stay_products_where_that_is_smaller():
    parts = tuple(
        KronTerms(numbers(1, 2, 2, seed=s), LowRank(numbers(1, 64, 2, seed=s + 9), numbers(1, 2, 48, seed=s + 5)))
        for s in (0, 1)
    )
    found = to_terms({"x": LayerDelta(parts, (128, 96))}, 1)["x"].delta
    assert isinstance(found.sums[0].right, LowRank) and found.sums[0].right.rank == 4
    assert size_of(found)[0] == 4 + 4 * (64 + 48)


def test_layers_with_few_enough_terms_are_not_touched():
    delta = LayerDelta((KronTerms(numbers(2, 4, 3), numbers(2, 12, 10)),), (48, 30))
    assert to_terms({"x": delta}, 2)["x"].delta is delta


@pytest.mark.parametrize("max_error", [0.0, 0.02, 0.3])
def test_within_an_error_a_full_rank_sum_takes_the_fewest_terms_that_suffice(max_error):
    """Ten terms, of which two are large; the rank is full, so that shapes are those of the parts."""
    scales = torch.tensor([10, 8] + [0.3] * 8)[:, None, None]
    delta = LayerDelta(
        tuple(KronTerms(scales[i : i + 5] * numbers(5, 4, 3, seed=i), numbers(5, 12, 10, seed=i + 50)) for i in (0, 5)),
        (48, 30),
    )
    found = within({"x": delta}, max_error, ConversionTarget("krona"))["x"].delta
    assert true_error(found, delta) <= max(max_error, 1e-6)
    errors = [nearest_kron(exact(delta), (4, 3), k).relative_error for k in range(1, 11)]
    fewest = next(k for k, error in enumerate(errors, 1) if error <= max(max_error, 1e-9))
    assert size_of(found)[0] == fewest * (12 + 120)


def test_what_two_parts_have_in_common_is_stored_once_within_an_error_of_zero():
    one = KronTerms(numbers(2, 4, 3).double(), numbers(2, 12, 10).double())
    again = KronTerms(one.left.flip(0) * 2, one.right.flip(0) / 2)  # the same delta, written otherwise
    delta = LayerDelta((one, again), (48, 30))
    found = within({"x": delta}, 0.0, ConversionTarget("krona"))["x"].delta
    assert sum(s.terms for s in found.sums) == 2 and true_error(found, delta) < 1e-7


def test_thin_sums_are_searched_over_all_shapes():
    """A Kronecker product of rank 1 factors hides in the sum of two LoRAs: no part has its shape."""
    a, b = torch.kron(numbers(8, 1), numbers(16, 1, seed=1)), torch.kron(numbers(1, 8, seed=2), numbers(1, 16, seed=3))
    parts = (as_lora(a[:, :1], b[:1]), as_lora(a[:, :1] * 0.5, b[:1]))
    delta = LayerDelta(parts, (128, 128))
    found = within({"x": delta}, 0.01, ConversionTarget("krona"))["x"].delta
    assert true_error(found, delta) <= 0.01 and size_of(found)[0] < 256


def test_zero_layers_and_lone_doras_pass_through_every_wish(tmp_path):
    dora = shared("golden", "lyc_dora_out_dim2_a1.safetensors")
    report = combine([(dora, 1.0)], tmp_path / "c.safetensors", max_error=0.1, **BASE)
    assert report.relative_error == 0
    zero = Adapter({"unet.a": LayerDelta((), (8, 6))})
    write(zero, tmp_path / "zero.safetensors")
    for options in ({"terms": 1}, {"max_error": 0.1}):
        assert combine([(tmp_path / "zero.safetensors", 1.0)], **options).layers[0].after == "zero"
