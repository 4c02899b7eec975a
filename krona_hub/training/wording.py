"""Prompts with alternatives: `a {red|blue} {cube|ball}` stands for four. Torch is imported only to shuffle them."""

from __future__ import annotations

import re
from itertools import count

ALTERNATIVES = re.compile(r"\{([^{}]*\|[^{}]*)\}")


def has_alternatives(text: str) -> bool:
    """
    >>> has_alternatives("a {red|blue} cube"), has_alternatives("a photo, {caption}")
    (True, False)
    """
    return ALTERNATIVES.search(text) is not None


def wording(text: str, seed: int, number: int) -> str:
    """The prompt of one picture of many: each {group} goes through its alternatives in an order of its own, shuffled
    anew every round, so that all of them come equally often.

    >>> sorted(wording("a {red|blue} cube", 0, n) for n in range(4))
    ['a blue cube', 'a blue cube', 'a red cube', 'a red cube']
    """
    from krona_hub.training.randomness import permutation

    groups = count()

    def chosen(found: re.Match[str]) -> str:
        words = found[1].split("|")
        turn, place = divmod(number, len(words))
        return words[permutation(len(words), seed, "wording", next(groups), turn)[place]].strip()

    return " ".join(ALTERNATIVES.sub(chosen, text).split())
