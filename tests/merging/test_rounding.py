"""Rounding: once, in both modes, and its loss."""

import concurrent.futures

import pytest
import torch

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.bases.module_spec import Placement
from krona_hub.merging.arithmetic.patches import Patch
from krona_hub.merging.arithmetic.rounding import Rounding, rounder
from tests.merging.cases import kron, numbers
from tests.merging.oracle import BRAIN, DOUBLE, E4M3, E5M2, HALF, SINGLE, all_numbers, merged, rounded, summed

NARROW = [HALF, BRAIN, E5M2, E4M3]
EXACT = Rounding(exact=True)


def one_patch(shape: tuple[int, int], weight: float = 0.01) -> Patch:
    return Patch(LayerDelta((kron(shape, 4, 2),), shape), weight, Placement("unet.x"))


@pytest.mark.parametrize("out", NARROW)
@pytest.mark.parametrize("wide", [SINGLE, DOUBLE])
def test_nearest_rounds_midpoints_and_their_neighbours_to_the_right_side(out: torch.dtype, wide: torch.dtype) -> None:
    table = all_numbers(out)
    middle = (table[1:] + table[:-1]) / 2
    away = torch.tensor([-float("inf"), float("inf")], dtype=DOUBLE)
    near = [middle, *(torch.nextafter(middle.to(wide), end.to(wide)).double() for end in away)]
    for sums in near:
        result = torch.empty(len(sums), dtype=out)
        rounder(EXACT, wide, out, "w")(sums.to(wide), result)
        assert torch.equal(result.float(), rounded(sums, out).float())


def test_a_sum_that_two_roundings_get_wrong_is_right_with_exact_rounding() -> None:
    just_above = torch.tensor([1 + 2**-11 + 2**-40], dtype=DOUBLE)  # float32 makes it a midpoint, and that goes down
    result = torch.empty(1, dtype=HALF)
    rounder(EXACT, DOUBLE, HALF, "w")(just_above, result)
    assert float(result) == 1 + 2**-10


# --- stochastic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", NARROW)
@pytest.mark.parametrize("wide", [SINGLE, DOUBLE])
def test_stochastic_rounding_takes_one_of_the_two_neighbours_and_is_right_on_average(out, wide) -> None:
    table, smallest = all_numbers(out), torch.finfo(out).smallest_normal
    for value in (0.3, -1.7, 3.0 * smallest / 7, -smallest / 7, 1.01 * smallest, -100.3):
        sums = torch.full((40_000,), value, dtype=wide)
        result = torch.empty(len(sums), dtype=out)
        rounder(Rounding("stochastic"), wide, out, "w")(sums, result)
        low, high = (float(t) for t in (table[table <= value].max(), table[table > value].min()))
        assert set(result.double().unique().tolist()) == {low, high}
        deviation = float((result.double().mean() - sums[0].double()).abs())
        assert deviation < 4.5 * (high - low) / 2 / 200  # of the mean of 40 000 draws


@pytest.mark.parametrize("out", NARROW)
def test_numbers_that_the_type_holds_stay_under_stochastic_rounding(out: torch.dtype) -> None:
    sums = all_numbers(out).float()
    result = torch.empty(len(sums), dtype=out)
    rounder(Rounding("stochastic"), SINGLE, out, "w")(sums, result)
    assert torch.equal(result.float(), sums)


def test_stochastic_rounding_overflows_only_where_nearest_does() -> None:
    sums = torch.tensor([65519.0, -65519.0, 65520.0, float("inf"), float("nan")]).repeat_interleave(100)
    result = torch.empty(500, dtype=HALF)
    rounder(Rounding("stochastic"), SINGLE, HALF, "w")(sums, result)
    assert result[:200].abs().max() == 65504 and result[200:400].isinf().all() and result[400:].isnan().all()


def test_a_stochastic_merge_is_unbiased_where_nearest_loses_everything() -> None:
    weight, shape = torch.ones(512, 512, dtype=BRAIN), (512, 512)
    delta = LayerDelta((kron(shape, 1, 1),), shape)
    delta.sums[0].left.fill_(1.0), delta.sums[0].right.fill_(2.0**-11)  # an eighth of a step
    patch = Patch(delta, 1.0, Placement("unet.x"))
    nearest, lost = merged(weight, [patch])
    assert torch.equal(nearest, weight) and lost.share == pytest.approx(1.0)
    out, survival = merged(weight, [patch], rounding=Rounding("stochastic"))
    assert float(out.double().mean() - 1) == pytest.approx(2.0**-11, rel=0.03)
    assert survival.share > 1  # noise: larger than what is added, and gone in the mean


def test_stochastic_merges_repeat_by_seed_and_name_in_any_thread() -> None:
    weight, patches = numbers(256, 64, dtype=BRAIN), [one_patch((256, 64))]

    def merge(seed: int, name: str) -> torch.Tensor:
        return merged(weight, patches, rounding=Rounding("stochastic", seed), name=name)[0]

    first = merge(1, "a")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        again = list(pool.map(lambda _: merge(1, "a"), range(8)))
    assert all(torch.equal(first, x) for x in again)
    assert not torch.equal(first, merge(2, "a")) and not torch.equal(first, merge(1, "b"))


@pytest.mark.parametrize("rounding", [Rounding("stochastic"), Rounding("stochastic", exact=True)])
def test_a_stochastic_merge_is_within_one_step_of_the_sum(rounding: Rounding) -> None:
    weight, patches = numbers(36, 64, dtype=HALF), [one_patch((36, 64), 0.5)]
    out, total = merged(weight, patches, rounding=rounding)[0], summed(weight, patches)
    step = torch.maximum(total.abs() * 2**-10, torch.tensor(2.0**-24))
    assert ((out.double() - total).abs() <= step).all()


# --- threads ---------------------------------------------------------------------------------------------------------


def test_the_number_of_threads_is_what_it_was_before() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen = []
        weight, patches = numbers(64, 64, dtype=HALF), [one_patch((64, 64))]
        from krona_hub.merging.arithmetic.tiles import merge_tensor

        merge_tensor(weight, patches, lambda *_: seen.append(torch.get_num_threads()), out_dtype=HALF)
        assert set(seen) == {1} and torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
