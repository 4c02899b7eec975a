"""Deltas of every form that a file can hold, with random numbers."""

from collections.abc import Callable

import torch
from torch import Tensor

from krona_hub.kron.terms import KronTerms, LowRank

Size = tuple[int, int]
Make = Callable[[Size], tuple[KronTerms, ...]]


def numbers(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (torch.randn(size) / size[-1] ** 0.5).to(dtype)


def kron(size: Size, a1: int, a2: int, terms: int = 1, rows: str = "kron") -> KronTerms:
    return KronTerms(numbers(terms, a1, a2), 0.1 * numbers(terms, size[0] // a1, size[1] // a2), rows)


def lora(size: Size, rank: int) -> KronTerms:
    return KronTerms(torch.ones(1, 1, 1), low(1, *size, rank))


def low(terms: int, p: int, q: int, rank: int, dtype: torch.dtype = torch.float16) -> LowRank:
    return LowRank(numbers(terms, p, rank, dtype=dtype), 0.1 * numbers(terms, rank, q, dtype=dtype))


FORMS: dict[str, Make] = {  # of a matrix whose rows and columns 12 and 16 divide
    "one term": lambda n: (kron(n, 4, 2),),
    "three terms": lambda n: (kron(n, 6, 4, 3),),
    "sixteen terms": lambda n: (kron(n, 6, 2, 16),),
    "narrow B": lambda n: (kron(n, 2, n[1] // 4, 2),),
    "small B": lambda n: (kron(n, n[0] // 3, n[1] // 2),),
    "a row as B": lambda n: (kron(n, n[0], n[1] // 4),),
    "a number as B": lambda n: (kron(n, n[0], n[1]),),
    "a number as A": lambda n: (kron(n, 1, 1),),
    "columns times rows": lambda n: (kron(n, n[0], 1, 5),),
    "rows times columns": lambda n: (kron(n, 1, n[1], 5),),
    "LoRA": lambda n: (lora(n, 3),),
    "LoRA on the left": lambda n: (KronTerms(low(1, *n, 3), torch.tensor([[[0.5]]])),),
    "low-rank A": lambda n: (KronTerms(low(2, 4, 8, 2), 0.1 * numbers(2, n[0] // 4, n[1] // 8)),),
    "low-rank B": lambda n: (KronTerms(numbers(2, 4, 8), low(2, n[0] // 4, n[1] // 8, 2)),),
    "low-rank A and B": lambda n: (KronTerms(low(2, 4, 8, 2), low(2, n[0] // 4, n[1] // 8, 1)),),
    "low-rank A over one row": lambda n: (KronTerms(low(1, n[0], 4, 2), 0.1 * numbers(1, 1, n[1] // 4)),),
    "shuffled rows": lambda n: (kron(n, 4, 2, rows="shuffled"),),
    "shuffled rows, five terms": lambda n: (kron(n, 4, 2, 5, "shuffled"),),
    "shuffled rows, small B": lambda n: (kron(n, n[0] // 3, n[1] // 2, rows="shuffled"),),
    "shuffled rows, large A": lambda n: (kron(n, n[0], n[1] // 4, 2, "shuffled"),),
    "several sums": lambda n: (kron(n, 4, 2), kron(n, 2, n[1] // 2, 2), lora(n, 2)),
    "a sum of zeros beside another": lambda n: (kron(n, 4, 2), KronTerms(torch.zeros(1, 1, 1), numbers(1, *n))),
}
