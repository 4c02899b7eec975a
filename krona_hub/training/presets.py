"""Settings under a name: those of the DiffuseKronA paper, and the defaults. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PAPER: Mapping[str, Any] = {  # Marjit et al., DiffuseKronA (2024): 64×4 on q, k, v, out of both attentions
    "shape": "64x4", "terms": 1, "rows": "shuffled", "targets": r"attn[12]\.to_(q|k|v|out\.0)$",
    "learning_rate": 1e-3, "batch_size": 1, "accumulation": 4, "schedule": "constant", "warmup": 0,
    "optimizer": "adamw-8bit", "min_snr": 0.0, "prior_weight": 0.0,
}  # fmt: skip
TINY_SCENES: Mapping[str, Any] = {  # what teaches the shipped base its toy in minutes on a CPU
    "base": "tiny-scenes", "data": "zorbi", "trigger_word": "zorbi", "targets": "attn+ff", "text_encoders": "attn",
    "steps": 500, "batch_size": 5, "learning_rate": 5e-3, "schedule": "cosine", "min_snr": 0.0,
}  # fmt: skip
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "tiny-scenes": TINY_SCENES,
    "paper-sd": {**PAPER, "steps": 500, "resolution": 512},
    "paper-sdxl": {**PAPER, "steps": 1000, "resolution": 1024},
}
INSTEAD: Mapping[str, str] = {"adamw-8bit": "adamw"}  # what a preset takes where a package is not installed
