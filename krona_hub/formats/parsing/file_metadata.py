"""Trigger words, training settings and license from the metadata of an adapter file; none of them change a delta."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

TRIGGER_KEYS = ("modelspec.trigger_phrase", "trigger_word", "trigger_words", "trigger_phrase", "instance_prompt")
LICENSE_KEYS = ("modelspec.license", "license", "licence")
TRAINING: Mapping[str, str] = {  # key -> label
    "ss_output_name": "name",
    "modelspec.title": "title",
    "ss_network_module": "network",
    "ss_network_dim": "rank",
    "ss_network_alpha": "alpha",
    "ss_network_args": "network arguments",
    "ss_base_model_version": "base",
    "ss_sd_model_name": "base file",
    "modelspec.architecture": "architecture",
    "ss_resolution": "resolution",
    "ss_num_train_images": "images",
    "ss_num_epochs": "epochs",
    "ss_steps": "steps",
    "ss_max_train_steps": "planned steps",
    "ss_batch_size_per_device": "batch size",
    "ss_learning_rate": "learning rate",
    "ss_unet_lr": "learning rate of the U-Net",
    "ss_text_encoder_lr": "learning rate of the text encoder",
    "ss_optimizer": "optimizer",
    "ss_lr_scheduler": "schedule",
    "ss_seed": "seed",
    "ss_training_comment": "comment",
}
MOST_WORDS = 5


def training_record(metadata: Mapping[str, str]) -> dict[str, str]:
    """The training settings in the metadata, with the labels of TRAINING."""
    return {label: metadata[key] for key, label in TRAINING.items() if metadata.get(key) not in (None, "", "None")}


def license_of(metadata: Mapping[str, str]) -> str | None:
    """The license stated in the metadata; None if there is none."""
    return next((metadata[key] for key in LICENSE_KEYS if metadata.get(key)), None)


def trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Words for the prompt: stated trigger words and learned tokens, else the most frequent tag of each folder.

    >>> trigger_words({"ss_tag_frequency": '{"10_dog": {"sks dog": 12, "grass": 3}}'})
    ('sks dog',)
    """
    stated = [word.strip() for key in TRIGGER_KEYS for word in metadata.get(key, "").split(",")]
    tokens = [key for key, value in metadata.items() if value == "<embed>"]
    words = [w for w in stated if w] + tokens or list(_most_frequent(metadata.get("ss_tag_frequency", "")))
    return tuple(dict.fromkeys(words))[:MOST_WORDS]


def _most_frequent(text: str) -> Iterator[str]:
    try:
        folders = json.loads(text) if text else {}
    except (ValueError, RecursionError):
        return
    for tags in folders.values() if isinstance(folders, dict) else ():
        counts = {t: n for t, n in tags.items() if isinstance(n, int)} if isinstance(tags, dict) else {}
        if counts:
            yield max(counts, key=lambda tag: counts[tag]).strip()
