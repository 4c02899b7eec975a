"""The rounding noise model against matrices that were actually rounded."""

import pytest
import torch

from krona_hub.kron.from_dense import RearrangedDense
from krona_hub.kron.rounding_noise import PRECISIONS, StorageNoise, stored_dtype, tail_share, ulp
from krona_hub.kron.shapes import split

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_ulp_is_the_distance_to_the_next_number(dtype):
    values = torch.tensor([1.0, 1.5, 0.1, 3e-5, 1000.0]).to(dtype)
    following = torch.nextafter(values, torch.full_like(values, torch.inf)) if dtype != torch.bfloat16 else None
    if following is None:
        following = (values.view(torch.int16) + 1).view(torch.bfloat16)
    torch.testing.assert_close(ulp(values, PRECISIONS[dtype]), (following.double() - values.double()).float())


def test_float32_numbers_that_were_rounded_once_are_recognised():
    values = torch.randn(50, 100)
    assert stored_dtype(values) == torch.float32
    assert stored_dtype(values.bfloat16().float()) == torch.bfloat16
    assert stored_dtype(values.half().float()) == torch.float16
    values.view(-1)[-1] = 1 / 3
    assert stored_dtype(torch.cat([values.bfloat16().float(), values])) == torch.float32


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("a", [(8, 8), (320, 1), (1, 1), (32, 20)])
def test_pure_rounding_stays_below_the_floor_and_comes_close_to_it(dtype, a):
    original = 0.02 * torch.randn(320, 640, generator=torch.Generator().manual_seed(3))
    stored = original.to(dtype)
    difference = stored.float() - original
    noise, shape = StorageNoise(stored, original), split((320, 640), *a)
    spectrum = RearrangedDense.of(difference[None], shape).spectrum()
    floor = noise.floor(shape, spectrum.sigma[0], float(spectrum.energy))
    assert 0.7 * floor < float(spectrum.sigma[0, 0]) < floor
    assert noise.explains(difference)
    assert float(spectrum.energy) == pytest.approx(noise.energy, rel=0.02)


def test_the_rounding_of_the_base_counts_where_it_is_there_and_only_there():
    generator = torch.Generator().manual_seed(4)
    original = 0.02 * torch.randn(320, 640, generator=generator)
    other = original + 0.002 * torch.randn(320, 1, generator=generator) @ torch.randn(1, 640, generator=generator)
    shape = split((320, 640), 320, 1)

    def above(base, tuned):
        spectrum = RearrangedDense.of((tuned.float() - base.float())[None], shape).spectrum()
        noise = StorageNoise(tuned, base)
        return int((spectrum.sigma[0] > noise.floor(shape, spectrum.sigma[0], float(spectrum.energy))).sum())

    assert above(original.bfloat16(), other.bfloat16()) == 1  # both rounded by themselves
    assert above(original.bfloat16(), other) == 1  # base only
    weak = original.bfloat16().float() + 1e-3 * (other - original)  # of a delta far below the base's own rounding
    assert above(original.bfloat16(), weak) == 1


@pytest.mark.parametrize(("m", "n"), [(300, 300), (100, 400)])
@pytest.mark.parametrize("head", [0.0, 0.1, 0.25])
def test_the_tail_of_noise_has_the_share_of_marchenko_and_pastur(m, n, head):
    sigma = torch.linalg.svdvals(torch.randn(m, n, generator=torch.Generator().manual_seed(5)))
    share = float(sigma[round(head * m) :].square().sum() / sigma.square().sum())
    assert tail_share(m / n, head) == pytest.approx(share, abs=0.02)
