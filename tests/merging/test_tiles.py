"""Merged tensors, against W + w·ΔW in float64 rounded once."""

import pytest
import torch
from torch import Tensor

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.bases.module_spec import Placement
from krona_hub.errors import BaseMismatchError, ConflictError, NonFiniteError
from krona_hub.kron.terms import KronTerms
from krona_hub.merging.arithmetic import kernels, tiles
from krona_hub.merging.arithmetic.patches import Patch
from krona_hub.merging.arithmetic.rounding import Rounding, Survival
from tests.merging.cases import FORMS, kron, lora, numbers
from tests.merging.oracle import (
    BRAIN,
    DOUBLE,
    E4M3,
    E5M2,
    HALF,
    SINGLE,
    merged,
    rounded,
    summed,
    ulps_apart,
)

EXACT = Rounding(exact=True)


@pytest.fixture(autouse=True)
def random() -> None:
    torch.manual_seed(3)


@pytest.fixture(params=[64, 500, 1 << 18], ids=["tiny tiles", "odd tiles", "one tile"])
def tile_size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few rows, of parts of blocks, and of a whole tensor; factors kept or widened row by row."""
    for module in (tiles, kernels):
        monkeypatch.setattr(module, "TILE", request.param)
    monkeypatch.setattr(kernels, "KEPT", request.param)


def patch(form: str, shape: tuple[int, ...], weight: float = 0.7, **placement: object) -> Patch:
    matrix = shape[0], int(torch.tensor(shape[1:]).prod())
    return Patch(LayerDelta(FORMS[form](matrix), shape), weight, Placement("unet.x", **placement))  # type: ignore[arg-type]


def check(weight: Tensor, patches: list[Patch], out_dtype: torch.dtype | None = None) -> None:
    """Exact rounding gives the float64 sum rounded once, the usual one the same but for rare neighbours."""
    total = summed(weight, patches)
    wanted = rounded(total, out_dtype or weight.dtype)
    assert torch.equal(merged(weight, patches, out_dtype, EXACT)[0], wanted)
    near, _ = merged(weight, patches, out_dtype)
    if near.dtype == SINGLE:  # as wide as the sums: what cancels shows their rounding
        assert torch.allclose(near.double(), total, rtol=3e-7, atol=3e-7)
        return
    apart = ulps_apart(near, wanted)
    assert int(apart.max()) <= 1 and int((apart > 0).sum()) <= 1 + apart.numel() // 500


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_added_as_its_dense_matrix_would_be(form: str, tile_size: None) -> None:
    check(numbers(36, 64, dtype=HALF), [patch(form, (36, 64))])


@pytest.mark.parametrize("form", FORMS)
def test_every_way_adds_every_form_right(form: str, monkeypatch: pytest.MonkeyPatch, tile_size: None) -> None:
    weight, patches = numbers(36, 64, dtype=HALF), [patch(form, (36, 64))]
    wanted = rounded(summed(weight, patches), HALF)
    for kernel, _ in kernels.KERNELS:
        monkeypatch.setattr("krona_hub.merging.arithmetic.patches.cheapest_kernel", kernel)
        assert torch.equal(merged(weight, patches, rounding=EXACT)[0], wanted), kernel


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_fused_tensor_are_added_in_place(form: str, tile_size: None) -> None:
    weight = numbers(100, 64, dtype=HALF)
    patches = [patch(form, (36, 64), rows=(5, 41)), patch("LoRA", (24, 64), -1.5, rows=(70, 94))]
    check(weight, patches)
    out, _ = merged(weight, patches)
    untouched = [*range(5), *range(41, 70), *range(94, 100)]
    assert torch.equal(out[untouched].view(torch.int16), weight[untouched].view(torch.int16))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [None, (8, 44)])
def test_swapped_halves_are_put_where_they_lie(form: str, rows: tuple[int, int] | None, tile_size: None) -> None:
    weight = numbers(36 if rows is None else 50, 64, dtype=HALF)
    check(weight, [patch(form, (36, 64), rows=rows, swap_halves=True)])


@pytest.mark.parametrize("form", FORMS)
def test_a_transposed_tensor_gets_the_transpose(form: str, tile_size: None) -> None:
    weight = numbers(64, 36, dtype=HALF)
    check(weight, [patch(form, (36, 64), transpose=True)])


def test_a_transposed_tensor_with_swapped_halves_gets_both() -> None:
    weight = numbers(64, 36, dtype=HALF)
    check(weight, [patch("three terms", (36, 64), transpose=True, swap_halves=True)])


@pytest.mark.parametrize("shape", [(36, 16, 3), (36, 16, 3, 3), (24, 16, 2, 3, 3), (36, 64, 1, 1)])
@pytest.mark.parametrize("form", ["one term", "three terms", "LoRA", "shuffled rows", "several sums"])
def test_convolutions_are_flattened_from_dimension_1(shape: tuple[int, ...], form: str) -> None:
    check(numbers(*shape, dtype=HALF), [patch(form, shape)])


def test_a_convolution_whose_a2_does_not_divide_its_channels_is_added_all_the_same() -> None:
    shape = (12, 10, 3, 3)  # 90 columns: a2 = 18 cuts through kernels
    delta = LayerDelta((kron((12, 90), 4, 18),), shape)
    check(numbers(*shape, dtype=HALF), [Patch(delta, 0.7, Placement("unet.x"))])


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE, DOUBLE, E5M2, E4M3])
@pytest.mark.parametrize("out_dtype", [HALF, BRAIN, SINGLE, E4M3])
def test_every_type_is_merged_into_every_type(dtype: torch.dtype, out_dtype: torch.dtype) -> None:
    weight = numbers(36, 64, dtype=DOUBLE).to(dtype)
    check(weight, [patch("one term", (36, 64))], out_dtype)


def test_a_double_base_stays_double() -> None:
    weight, patches = numbers(36, 64, dtype=DOUBLE), [patch("one term", (36, 64))]
    assert torch.allclose(merged(weight, patches)[0], summed(weight, patches), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("dtype", [HALF, BRAIN])
def test_untouched_rows_are_cast_where_the_type_changes(dtype: torch.dtype) -> None:
    check(numbers(50, 64), [patch("one term", (36, 64), rows=(4, 40))], dtype)


def test_several_adapters_on_one_tensor_are_rounded_once(tile_size: None) -> None:
    weight = numbers(72, 64, dtype=HALF)
    check(weight, [
        patch("one term", (72, 64)),
        patch("LoRA", (72, 64), -0.3),
        patch("narrow B", (36, 64), 1.2, rows=(10, 46)),
        patch("shuffled rows", (72, 64), 0.25),
    ])  # fmt: skip


@pytest.mark.parametrize(("dtype", "share"), [(HALF, 1e-4), (BRAIN, 1e-5)])
@pytest.mark.parametrize(
    "sums",
    [
        lambda n: (kron(n, 64, 4),),
        lambda n: (lora(n, 16),),
        lambda n: (kron(n, 32, 8, 3),),
        lambda n: (kron(n, 8, 8), lora(n, 4), kron(n, 320, 320)),
    ],
    ids=["one term", "LoRA", "three terms", "several sums"],
)
def test_all_but_the_promised_share_of_numbers_is_the_exact_sum_rounded_once(dtype, share, sums) -> None:
    size = (1280, 1280)
    weight = (torch.randn(size) * 0.03).to(dtype)
    patches = [Patch(LayerDelta(sums(size), size), 0.013, Placement("unet.x"))]
    wanted = rounded(summed(weight, patches), dtype)
    apart = ulps_apart(merged(weight, patches)[0], wanted)
    assert int(apart.max()) <= 1
    assert float((apart > 0).double().mean()) <= share


# --- what changes nothing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [HALF, BRAIN, SINGLE])
def test_nothing_to_add_leaves_every_bit(dtype: torch.dtype) -> None:
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).repeat(dtype.itemsize // 2)
    weight = bits.view(dtype).reshape(256, -1)  # −0.0, all NaN payloads, subnormals
    shape = tuple(weight.shape)
    zero = LayerDelta((KronTerms(torch.ones(1, 1, 1), torch.zeros(1, *shape)),), shape)
    patches = [patch("one term", shape, 0.0) if dtype == HALF else patch("LoRA", shape, 0.0)]
    for some in ([], patches, [Patch(zero, 1.0, Placement("unet.x"))]):
        out, survival = merged(weight, some)
        assert torch.equal(out.view(torch.uint8), weight.view(torch.uint8))
        assert survival == Survival(0.0, 0.0) and survival.share == 0.0


def test_a_negative_weight_takes_away() -> None:
    weight = numbers(36, 64, dtype=HALF)
    check(weight, [patch("one term", (36, 64), -1.3)])


def test_the_base_is_only_read() -> None:
    weight = numbers(36, 64)
    before = weight.clone()
    merged(weight, [patch("several sums", (36, 64))])
    merged(weight, [patch("one term", (36, 64))], HALF)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("shape", [(), (5,), (0, 4), (1, 1)])
def test_small_tensors_of_any_rank_pass(shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, dtype=HALF)
    assert torch.equal(merged(weight, [])[0], weight)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["one term", "three terms", "several sums", "shuffled rows"])
@pytest.mark.parametrize("out_dtype", [HALF, BRAIN, SINGLE, E5M2])
def test_the_survival_is_that_of_the_numbers_written(form: str, out_dtype: torch.dtype) -> None:
    weight = numbers(100, 64, dtype=HALF)
    patches = [patch(form, (36, 64), 0.01, rows=(4, 40)), patch("LoRA", (24, 64), 0.02, rows=(60, 84))]
    out, survival = merged(weight, patches, out_dtype)
    wanted = summed(weight, patches) - weight.double()
    touched = wanted.abs().sum(1) > 0
    lost = (out.double() - weight.double() - wanted)[touched]
    assert survival.wanted == pytest.approx(float(wanted.square().sum()), rel=1e-5)
    assert survival.lost == pytest.approx(float(lost.square().sum()), rel=1e-3)
    assert survival.share == pytest.approx((survival.lost / survival.wanted) ** 0.5)


def test_an_overflow_names_the_tensor() -> None:
    weight = torch.full((36, 64), 60000.0, dtype=HALF)
    with pytest.raises(NonFiniteError, match=r"down\.weight overflows.*float16"):
        merged(weight, [patch("one term", (36, 64), 1e6)], name="down.weight")
    with pytest.raises(NonFiniteError, match="overflows"):
        merged(torch.full((8, 64), 1e5), [], HALF)


@pytest.mark.parametrize("rounding", [Rounding(), EXACT, Rounding("stochastic")], ids=["nearest", "exact", "chance"])
@pytest.mark.parametrize("dtype", [HALF, E5M2, E4M3])
def test_a_type_without_infinity_overflows_too(dtype: torch.dtype, rounding: Rounding) -> None:
    weight = torch.full((36, 64), 400.0).to(dtype)
    with pytest.raises(NonFiniteError, match=str(dtype).removeprefix("torch.")):
        merged(weight, [patch("one term", (36, 64), 1e9)], rounding=rounding)


def test_infinities_and_nan_of_the_base_pass() -> None:
    weight = numbers(36, 64, dtype=HALF)
    weight[3, 5], weight[4, 6] = float("inf"), float("nan")
    for form in ("one term", "several sums"):
        out, survival = merged(weight, [patch(form, (36, 64))])
        assert out[3, 5].isinf() and out[4, 6].isnan() and int((~out.isfinite()).sum()) == 2
        assert 0 < survival.lost < survival.wanted


def test_a_delta_of_another_size_is_refused_by_name() -> None:
    with pytest.raises(BaseMismatchError, match=r"w is 30x64 for unet\.x, but its delta is 36x64"):
        merged(numbers(50, 64), [patch("one term", (36, 64), rows=(0, 30))])


# --- DoRA ------------------------------------------------------------------------------------------------------------


def dora(shape: tuple[int, ...], axis: str, weight: float = 0.6, form: str = "several sums", **place: object) -> Patch:
    plain = patch(form, shape, weight, **place)
    magnitude = 1 + torch.rand(shape[0 if axis == "out" else 1])
    return Patch(LayerDelta(plain.delta.sums, shape, magnitude, axis), weight, plain.placement)  # type: ignore[arg-type]


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize("shape", [(36, 64), (36, 16, 3, 3)])
@pytest.mark.parametrize("weight", [1.0, 0.6, -0.5])
def test_dora_is_its_weight_times_the_change_of_its_formula(axis, shape, weight, tile_size) -> None:
    check(numbers(*shape, dtype=HALF), [dora(shape, axis, weight)])


@pytest.mark.parametrize("axis", ["out", "in"])
@pytest.mark.parametrize(
    "place", [{"transpose": True}, {"swap_halves": True}, {"transpose": True, "swap_halves": True}], ids=str
)
def test_dora_lies_as_its_layer_lies(axis: str, place: dict[str, bool], tile_size: None) -> None:
    stored = (64, 36) if "transpose" in place else (36, 64)
    check(numbers(*stored, dtype=HALF), [dora((36, 64), axis, form="one term", **place)])


def test_dora_beside_plain_adapters_scales_the_base_alone(tile_size: None) -> None:
    weight = numbers(60, 64, dtype=HALF)
    check(weight, [
        patch("one term", (60, 64), 0.4),
        dora((36, 64), "out", rows=(4, 40)),
        patch("LoRA", (36, 64), 0.3, rows=(20, 56)),
    ])  # fmt: skip


def test_dora_of_a_magnitude_alone_rescales_rows() -> None:
    weight = numbers(36, 64, dtype=HALF)
    magnitude = 1 + torch.rand(36)
    check(weight, [Patch(LayerDelta((), (36, 64), magnitude), 1.0, Placement("unet.x"))])


def test_rows_of_zeros_stay_zero_under_dora() -> None:
    weight = numbers(36, 64, dtype=HALF)
    weight[4] = 0
    out, _ = merged(weight, [Patch(LayerDelta((), (36, 64), torch.ones(36)), 0.5, Placement("unet.x"))])
    assert not out[4].any() and out.isfinite().all()


def test_two_dora_layers_on_the_same_rows_are_refused() -> None:
    weight = numbers(60, 64)
    with pytest.raises(ConflictError, match="two DoRA layers"):
        merged(weight, [dora((36, 64), "out", rows=(0, 36)), dora((36, 64), "in", rows=(24, 60))])
    merged(
        weight, [dora((30, 64), "out", form="LoRA", rows=(0, 30)), dora((30, 64), "out", form="LoRA", rows=(30, 60))]
    )
    merged(weight, [dora((60, 64), "out"), dora((60, 64), "out", 0.0)])
