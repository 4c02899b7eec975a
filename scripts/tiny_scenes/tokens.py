"""The tokenizer: a CLIP vocabulary (bytes, merges, two special tokens) in which every caption word is one token.

Other words are encoded in pieces down to single bytes, so any word can be a trigger word.
"""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import Any

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
LENGTH = 32  # tokens per prompt, including special tokens and padding


def byte_alphabet() -> tuple[str, ...]:
    """Return the printable character of GPT-2 and CLIP for each of the 256 bytes.

    >>> len(set(byte_alphabet())), byte_alphabet()[0], byte_alphabet()[188]
    (256, '!', 'Ā')
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return tuple(map(chr, printable)) + tuple(chr(256 + n) for n in range(256 - len(printable)))


def merges(words: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Return byte-pair merges that build every word from its last letter, each pair once.

    Only the last piece of a word contains the end marker, so a merge with the marker cannot apply anywhere else. The
    merges of one word thus never interfere with another word, as `b l` of "blue" would inside "table".

    >>> merges(("on", "moon"))
    (('o', 'n</w>'), ('o', 'on</w>'), ('m', 'oon</w>'))
    """
    return tuple(dict.fromkeys(chain.from_iterable(map(_chain, words))))


def _chain(word: str) -> list[tuple[str, str]]:
    return [(word[n], word[n + 1 :] + WORD_END) for n in reversed(range(len(word) - 1))]


def vocabulary(words: tuple[str, ...]) -> dict[str, int]:
    """Map tokens to ids in the order of CLIP: bytes, bytes that end a word, merges, the two special tokens."""
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(c + WORD_END for c in alphabet), *("".join(pair) for pair in merges(words)), START, END]
    return {token: number for number, token in enumerate(tokens)}


def save(folder: Path, words: tuple[str, ...]) -> None:
    """Write `vocab.json`, `merges.txt` and the configuration for transformers."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary(words), ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges(words))]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", "utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL_TOKENS, indent=1) + "\n")


SPECIAL_TOKENS: dict[str, Any] = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
CONFIG: dict[str, Any] = {
    **SPECIAL_TOKENS, "tokenizer_class": "CLIPTokenizer", "model_max_length": LENGTH, "do_lower_case": True,
    "add_prefix_space": False, "errors": "replace",
}  # fmt: skip
