"""Conversion options, checked before any file is read."""

import pytest

from krona_hub.conversion.methods import Budget, Exact, FixedShape, Keep, MaxError, Rank, choose_method, parse_budget
from krona_hub.errors import UsageError


@pytest.mark.parametrize(
    ("options", "method"),
    [
        ({}, None),
        ({"exact": True}, Exact()),
        ({"shape": "64x4", "terms": 3}, FixedShape(64, 4, 3)),
        ({"shape": (8, 2), "shape_fallback": "nearest"}, FixedShape(8, 2, 1, True)),
        ({"max_error": 0.0}, MaxError(0.0)),
        ({"budget": "50%"}, Budget(share=0.5)),
        ({"budget": "1/8"}, Budget(share=0.125)),
        ({"budget": " 3 / 2 "}, Budget(share=1.5)),
        ({"budget": 2_000_000}, Budget(parameters=2_000_000)),
        ({"rank": 8}, Rank(8)),
    ],
)
def test_each_option_names_one_way(options, method):
    assert choose_method(**options) == method


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Keep(), "convert"),
        (Exact(), "convert --exact"),
        (FixedShape(64, 4), "convert --shape 64x4"),
        (FixedShape(8, 2, 3, True), "convert --shape 8x2 --terms 3 --shape-fallback nearest"),
        (MaxError(0.05), "convert --max-error 0.05"),
        (Budget(share=0.125), "convert --budget 12.5%"),
        (Budget(parameters=2_000_000), "convert --budget 2000000"),
        (Rank(8), "convert --rank 8"),
    ],
)
def test_a_way_is_named_as_one_asks_for_it(method, words):
    assert str(method) == words


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exact": True, "rank": 4}, "--exact and --rank exclude each other"),
        ({"shape": "64x4", "budget": "50%"}, "--shape and --budget exclude"),
        ({"terms": 2}, "--terms and --shape-fallback require --shape"),
        ({"shape": "64"}, "Invalid shape '64'"),
        ({"shape": "0x4"}, "Invalid shape '0x4'"),
        ({"shape": "64x4", "terms": 0}, "Invalid value 0 for --terms"),
        ({"shape": "64x4", "shape_fallback": "any"}, "Unknown shape fallback 'any'"),
        ({"max_error": 1.0}, "Invalid value 1.0 for --max-error"),
        ({"max_error": float("nan")}, "Invalid value nan for --max-error"),
        ({"max_error": -0.1}, "Invalid value -0.1 for --max-error"),
        ({"rank": 0}, "Invalid value 0 for --rank"),
    ],
)
def test_contradictions_and_nonsense_are_refused_in_words(options, words):
    with pytest.raises(UsageError, match=words):
        choose_method(**options)


WRONG = ["", "x", "0", "-5", "0%", "-1%", "nan%", "inf%", "1.5", "1/0", "0/8", "-1/-8", "1/8/2", "1/", "/8", "0.5/8"]
WRONG += [f"1/1{'0' * 400}", f"1{'0' * 400}/1"]  # beyond what a float holds


@pytest.mark.parametrize("text", WRONG)
def test_what_is_no_budget_is_refused(text):
    with pytest.raises(UsageError, match=r"Invalid budget .*such as 50% or 1/8, or a number of parameters such as"):
        parse_budget(text)


def test_a_share_is_of_the_source():
    assert parse_budget("25%").of(1000) == parse_budget("1/4").of(1000) == 250
    assert parse_budget("2,000,000").of(1000) == 2_000_000
