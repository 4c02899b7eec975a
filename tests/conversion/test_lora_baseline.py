"""The error of the best LoRAs of a size, which a refused conversion offers, against a search with all factors."""

from math import sqrt

import pytest
import torch

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.conversion.convert_layers import lora_error_within, only_loras
from krona_hub.errors import UsageError
from krona_hub.formats.forms.normal_forms import exact_lora_of
from krona_hub.kron.factorization_search import smallest_lora_error, within_budget
from krona_hub.kron.hadamard import Hadamard
from krona_hub.kron.terms import KronTerms, LowRank, as_lora
from krona_hub.kron.to_lora import singular_values


def pair(out, in_, rank, dtype=torch.float32):
    return torch.randn(out, rank).to(dtype), torch.randn(rank, in_).to(dtype)


def loha(out, in_, rank, dtype=torch.float32):
    both = Hadamard(*(LowRank(*(t[None] for t in pair(out, in_, rank, dtype))) for _ in range(2)))
    return KronTerms(torch.ones(1, 1, 1), both)


def sums_of_every_kind():
    torch.manual_seed(0)
    kron = KronTerms(torch.randn(1, 4, 3), torch.randn(1, 6, 12))
    return {
        "LoRA": (as_lora(*pair(24, 36, 3)),),
        "LoRA in bfloat16": (as_lora(*pair(24, 36, 3, torch.bfloat16)),),
        "LoKr": (kron,),
        "LoKr with shuffled rows": (KronTerms(kron.left, kron.right, "shuffled"),),
        "sum of terms": (KronTerms(torch.randn(3, 4, 3), torch.randn(3, 6, 12)), as_lora(*pair(24, 36, 2))),
        "thin LoHa": (loha(24, 36, 2),),
        "LoHa of full rank": (loha(24, 36, 6, torch.bfloat16),),
        "zero": (as_lora(torch.zeros(24, 2), torch.zeros(2, 36)),),
    }


@pytest.mark.parametrize("kind", sums_of_every_kind())
def test_singular_values_are_those_of_the_matrix(kind):
    sums = sums_of_every_kind()[kind]
    dense = sum(s.to(torch.float64).dense() for s in sums)
    found, expected = singular_values(sums), torch.linalg.svdvals(dense)
    assert torch.equal(found, found.sort(descending=True).values)
    assert torch.allclose(found, expected[: len(found)], rtol=1e-12, atol=1e-12)
    assert float(expected[len(found) :].sum()) < 1e-10


@pytest.mark.parametrize("share", [0.02, 0.12, 0.4, 0.9])
def test_the_baseline_is_the_error_of_the_loras_that_a_search_finds(share):
    layers = {name: LayerDelta(sums, (24, 36)) for name, sums in sums_of_every_kind().items()}
    budget = int(share * len(layers) * 24 * 36)
    loras = [exact_lora_of(delta) for delta in layers.values()]
    matrices = [delta.dense().double().reshape(24, 36) for delta in layers.values()]
    choices = within_budget(loras, budget, allowed=lambda *form: only_loras((), *form))
    squares = [float(m.norm()) ** 2 for m in matrices]
    lost = sum(c.form.relative_error**2 * square for c, square in zip(choices, squares, strict=True))
    assert lora_error_within(layers, budget) == pytest.approx(sqrt(lost / sum(squares)), rel=1e-5, abs=1e-7)


def test_below_rank_1_there_is_nothing_to_compare_with_but_no_layer_at_all():
    """A refusal of a result of one small term states this error: it was itself refused for its size once."""
    assert lora_error_within({"unet.x": LayerDelta((loha(24, 36, 6),), (24, 36))}, 30) == 1.0
    with pytest.raises(UsageError, match="Choose at least 60, the size of the smallest factorization"):
        smallest_lora_error([torch.ones(6)], [(24, 36)], 30)
