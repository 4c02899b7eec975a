"""Build the configuration of a PEFT adapter from its tensors, as JSON-ready values. Torch-free.

The scale is already folded into the tensors, so alpha equals the rank everywhere. `rank_pattern` lists other ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from math import ceil
from typing import Any, NamedTuple

from krona_hub.errors import InexpressibleError
from krona_hub.formats.compatibility.format_limits import common_peft_factor
from krona_hub.formats.forms.delta_form import ChannelSplit, is_factored


class LokrModule(NamedTuple):
    """The sizes from which PEFT builds one LoKr module."""

    split: ChannelSplit
    left_rank: int | None  # None: w1 is dense
    right_rank: int | None  # None: w2 is dense


def lora_config(
    ranks: Mapping[str, int], *, dora: bool = False, biased: bool = False, others: Collection[str] = ()
) -> dict[str, Any]:
    """LoraConfig values for module path -> rank, whether all have a lora_B.bias; `others` are paths of the base model.

    >>> config = lora_config({"a.to_q": 4, "a.to_k": 4, "a.to_v": 8})
    >>> config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]
    (4, 4, {'a.to_v': 8}, {'a.to_v': 8})
    """
    rank, pattern = _common(ranks)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": _targets(ranks, others),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "task_type": None,
        "use_dora": dora,
        "use_rslora": False,
    }
    return config | ({"lora_bias": True} if biased else {})


def lokr_config(modules: Mapping[str, LokrModule], *, others: Collection[str] = ()) -> dict[str, Any]:
    """LoKrConfig values from which PEFT builds exactly these modules.

    Raises InexpressibleError if no single `decompose_factor` reproduces every split.
    """
    factor = common_peft_factor(m.split for m in modules.values())
    if factor is None:
        raise InexpressibleError(
            f"PEFT has one decompose_factor for all layers, and no value yields the {_shapes_text(modules)}.",
            fix="Use --to lora, or --to lycoris-lokr, which supports any shape.",
        )
    ranks = {name: _rank(m) for name, m in modules.items()}
    rank, pattern = _common(ranks)
    return {
        "peft_type": "LOKR",
        "r": rank,
        "alpha": rank,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "decompose_both": keeps_left_products(modules),
        "decompose_factor": factor,
        "target_modules": _targets(ranks, others),
        "inference_mode": True,
        "init_weights": True,
        "module_dropout": 0.0,
        "rank_dropout": 0.0,
        "task_type": None,
        "use_effective_conv2d": False,
    }


def keeps_left_products(modules: Mapping[str, LokrModule]) -> bool:
    """Whether `decompose_both` applies: some w1 is a product, and PEFT would not factor any dense w1."""
    lefts = [(m.split.out[0], m.split.in_[0]) for m in modules.values()]
    wrong = any(
        m.left_rank is None and is_factored(_rank(m), ab) for m, ab in zip(modules.values(), lefts, strict=True)
    )
    return any(m.left_rank is not None for m in modules.values()) and not wrong


def _rank(module: LokrModule) -> int:
    """The rank of a factored w2; for a dense w2, the lowest rank at which PEFT keeps both factors dense."""
    if module.right_rank is not None:
        return module.right_rank
    return max(1, ceil(max(*module.split.out, *module.split.in_) / 2))


def _shapes_text(modules: Mapping[str, LokrModule]) -> str:
    shapes = sorted({f"{m.split.out[0]}x{m.split.in_[0]}" for m in modules.values()})
    return f"shapes {', '.join(shapes[:4])}{' …' if len(shapes) > 4 else ''} of A"


def _common(ranks: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """The most frequent rank (the smallest of ties), and the pattern of the other ranks."""
    counts = Counter(ranks.values())
    rank = min(counts, key=lambda r: (-counts[r], r))
    odd = {path: r for path, r in sorted(ranks.items()) if r != rank}
    return rank, {_anchored(path, ranks): r for path, r in odd.items()}


def _anchored(path: str, ranks: Mapping[str, int]) -> str:
    """A pattern matches every path that ends in it; `^` excludes paths with another rank."""
    clash = any(other.endswith(f".{path}") and r != ranks[path] for other, r in ranks.items())
    return f"^{path}" if clash else path


def _targets(paths: Collection[str], others: Collection[str]) -> list[str] | str:
    """The list of paths; a regular expression if PEFT, which matches path endings, would adapt other modules, too."""
    endings: Sequence[str] = [f".{path}" for path in paths]
    extra = [o for o in others if o not in paths and o.endswith(tuple(endings))]
    return "|".join(p.replace(".", r"\.") for p in sorted(paths)) if extra else sorted(paths)
