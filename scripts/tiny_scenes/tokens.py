"""The tokenizer: a real CLIP vocabulary (bytes, merges, two marks) in which every word of the captions is one token.

Other words still encode, in pieces down to single bytes, so a trigger word can be any word.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
LENGTH = 32  # tokens of every prompt, marks and padding included


def byte_alphabet() -> tuple[str, ...]:
    """GPT-2's printable character for each of the 256 bytes, which CLIP uses too.

    >>> len(set(byte_alphabet())), byte_alphabet()[0], byte_alphabet()[188]
    (256, '!', 'Ā')
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return tuple(map(chr, printable)) + tuple(chr(256 + n) for n in range(256 - len(printable)))


def merges(words: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Byte-pair merges that build every word from its last letter, each pair once.

    Only the last piece of a word carries the end mark, so a merge that holds it can fire nowhere else: no word's
    merges spoil another's, as `b l` of "blue" would inside "table".

    >>> merges(("on", "moon"))
    (('o', 'n</w>'), ('o', 'on</w>'), ('m', 'oon</w>'))
    """
    return tuple(dict.fromkeys(chain.from_iterable(map(_chain, words))))


def _chain(word: str) -> list[tuple[str, str]]:
    return [(word[n], word[n + 1 :] + WORD_END) for n in reversed(range(len(word) - 1))]


def vocabulary(words: tuple[str, ...]) -> dict[str, int]:
    """Token → id in CLIP's order: bytes, bytes that end a word, merges, the two marks."""
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(c + WORD_END for c in alphabet), *("".join(pair) for pair in merges(words)), START, END]
    return {token: number for number, token in enumerate(tokens)}


def save(folder: Path, words: tuple[str, ...]) -> None:
    """Write `vocab.json` and `merges.txt`, and the configuration that transformers reads."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary(words), ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges(words))]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(MARKS, indent=1) + "\n")


MARKS: dict[str, Any] = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
CONFIG: dict[str, Any] = {
    **MARKS, "tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True,
    "add_prefix_space": False, "errors": "replace",
}  # fmt: skip
