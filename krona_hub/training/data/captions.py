"""The text that a picture is trained with at one step: template, trigger word, shuffle and dropout."""

from __future__ import annotations

import re
from itertools import count

from krona_hub.training.randomness import permutation, uniform
from krona_hub.training.settings import TrainingSettings

ALTERNATIVES = re.compile(r"\{([^{}]*\|[^{}]*)\}")


def fixed_caption(caption: str, settings: TrainingSettings) -> str:
    """The caption in its template, with the trigger word in front where it is missing.

    >>> fixed_caption("a cat, sitting", TrainingSettings(trigger_word="sks", caption_template="photo: {caption}"))
    'sks, photo: a cat, sitting'
    """
    text = settings.caption_template.replace("{caption}", caption)
    word = settings.trigger_word
    present = not word or word.lower() in text.lower()
    return text if present else f"{word}, {text}"


def drawn_caption(caption: str, settings: TrainingSettings, step: int, sample: int) -> str:
    """The caption for sample number `sample` of a step: perhaps empty, perhaps with its parts in another order."""
    if settings.caption_dropout and uniform(settings.seed, "drop", step, sample) < settings.caption_dropout:
        return ""
    text = fixed_caption(caption, settings)
    return _shuffled(text, settings, step, sample) if settings.caption_shuffle else text


def _shuffled(text: str, settings: TrainingSettings, step: int, sample: int) -> str:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    kept, rest = parts[: settings.keep_parts], parts[settings.keep_parts :]
    order = permutation(len(rest), settings.seed, "shuffle", step, sample)
    return ", ".join([*kept, *(rest[i] for i in order)])


def drawn_flip(settings: TrainingSettings, step: int, sample: int) -> bool:
    """Whether the picture is mirrored."""
    return settings.flip and uniform(settings.seed, "flip", step, sample) < 0.5


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
