"""Which columns a comparison has, by what was asked."""

import pytest

from krona_hub.errors import UsageError
from krona_hub.images.api import generate
from krona_hub.images.grid_cells import columns_of, names_of, rows_of


def asked(*adapters, prompts=("p",), images=1, seed=0, strengths=(), together=False, compare=None, beside=()):
    from krona_hub.images.request import ComputeOptions, GenerateRequest, Settings

    return GenerateRequest(
        "m",
        prompts,
        adapters,
        seed,
        images,
        Settings(),
        ComputeOptions(),
        strengths,
        together,
        compare,
        beside,
        None,
        None,
    )


def labels(*adapters, **more):
    wish = asked(*adapters, **more)
    return [column.label for column in columns_of(wish, names_of([source for source, _ in adapters]))]


A, B = ("a.safetensors", 1.0), ("b.safetensors", 0.5)


@pytest.mark.parametrize(
    ("adapters", "more", "expected"),
    [
        ((), {}, ["m"]),
        ((A,), {}, ["a"]),
        ((A,), {"compare": True}, ["base", "a"]),
        ((A, B), {}, ["base", "a", "b × 0.5"]),
        ((A, B), {"compare": False}, ["a", "b × 0.5"]),
        ((A, B), {"together": True}, ["a + b × 0.5"]),
        ((A, B), {"together": True, "compare": True}, ["base", "a + b × 0.5"]),
        ((A,), {"strengths": (0.0, 0.5, 1.0)}, ["base", "a × 0.5", "a × 1"]),
        ((B,), {"strengths": (1.0, 2.0)}, ["b × 0.5", "b × 1"]),
        ((A, B), {"strengths": (0.0, 1.0)}, ["base", "a × 1", "b × 0.5"]),
        ((A, B), {"strengths": (0.5, 2.0), "together": True}, ["a × 0.5 + b × 0.25", "a × 2 + b × 1"]),
        ((), {"beside": ("x/merged",)}, ["base", "merged"]),
        ((A, A), {}, ["base", "a", "a-2"]),
    ],
)
def test_columns(adapters, more, expected):
    assert labels(*adapters, **more) == expected


def test_rows_are_every_prompt_with_every_seed():
    assert [tuple(row) for row in rows_of(asked(prompts=("p", "q"), images=2, seed=7))] == [
        ("p", 7), ("p", 8), ("q", 7), ("q", 8),
    ]  # fmt: skip


@pytest.mark.parametrize("given", [{"strengths": [0.5]}, {"together": True}, {"compare": True}], ids=str)
def test_what_concerns_adapters_needs_one(given):
    with pytest.raises(UsageError, match="--adapter"):
        generate("m", "p", **given)
