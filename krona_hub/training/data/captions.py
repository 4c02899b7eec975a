"""Captions of images at a training step: template, trigger word, shuffling and dropout."""

from __future__ import annotations

import re
from itertools import count

from krona_hub.pipelines.randomness import permutation, uniform
from krona_hub.training.settings import TrainingSettings

ALTERNATIVES = re.compile(r"\{([^{}]*\|[^{}]*)\}")


def fixed_caption(caption: str, settings: TrainingSettings) -> str:
    """Return the caption in its template, with the trigger word in front if it is missing.

    >>> fixed_caption("a cat, sitting", TrainingSettings(trigger_word="sks", caption_template="photo: {caption}"))
    'sks, photo: a cat, sitting'
    """
    text = settings.caption_template.replace("{caption}", caption)
    word = settings.trigger_word
    present = not word or word.lower() in text.lower()
    return text if present else f"{word}, {text}"


def sample_caption(caption: str, settings: TrainingSettings, step: int, sample: int) -> str:
    """Return the caption of sample number `sample` in a step, after random dropout and shuffling."""
    if settings.caption_dropout and uniform(settings.seed, "drop", step, sample) < settings.caption_dropout:
        return ""
    text = fixed_caption(caption, settings)
    return _shuffled(text, settings, step, sample) if settings.caption_shuffle else text


def _shuffled(text: str, settings: TrainingSettings, step: int, sample: int) -> str:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    kept, rest = parts[: settings.keep_parts], parts[settings.keep_parts :]
    order = permutation(len(rest), settings.seed, "shuffle", step, sample)
    return ", ".join([*kept, *(rest[i] for i in order)])


def sample_flip(settings: TrainingSettings, step: int, sample: int) -> bool:
    """Return whether the image is mirrored."""
    return settings.flip and uniform(settings.seed, "flip", step, sample) < 0.5


def has_alternatives(text: str) -> bool:
    """Return whether a prompt contains alternatives.

    >>> has_alternatives("a {red|blue} cube"), has_alternatives("a photo, {caption}")
    (True, False)
    """
    return ALTERNATIVES.search(text) is not None


def prompt_variant(text: str, seed: int, number: int) -> str:
    """Return the prompt of image `number`. Each {a|b} group cycles through its alternatives in its own order, which is
    reshuffled every round, so that all alternatives occur equally often.

    >>> sorted(prompt_variant("a {red|blue} cube", 0, n) for n in range(4))
    ['a blue cube', 'a blue cube', 'a red cube', 'a red cube']
    """
    groups = count()

    def alternative(match: re.Match[str]) -> str:
        words = match[1].split("|")
        turn, index = divmod(number, len(words))
        return words[permutation(len(words), seed, "wording", next(groups), turn)[index]].strip()

    return " ".join(ALTERNATIVES.sub(alternative, text).split())
