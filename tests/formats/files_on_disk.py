"""Small adapter files for tests: tensors in, path out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from krona_hub.bases.base import Base
from krona_hub.bases.module_spec import ModuleSpec

TINY = Base(  # rectangular everywhere, so that no mistake of order goes unseen
    "tiny",
    None,
    {
        "unet": {
            "conv_in": ModuleSpec((4, 3, 3, 3)),
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": ModuleSpec((12, 10)),
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_k": ModuleSpec((12, 10)),
            "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0": ModuleSpec((10, 12)),
            "mid_block.attentions.0.proj_in": ModuleSpec((10, 6, 1, 1)),
            "mid_block.resnets.0.conv1": ModuleSpec((8, 6, 3, 3)),
            "down_blocks.0.resnets.0.conv1": ModuleSpec((6, 4, 3)),
        },
        "text_encoder": {"encoder.layers.0.self_attn.q_proj": ModuleSpec((6, 4))},
    },
)
TO_Q = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
CONV = "lora_unet_mid_block_resnets_0_conv1"
CONV_LAYER = "unet.mid_block.resnets.0.conv1"


def rand(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def save(folder: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> Path:
    path = folder / "adapter.safetensors"
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, dict(metadata or {}) or None)
    return path


def module(name: str, **parts: Tensor) -> dict[str, Tensor]:
    """The tensors of one module; `lora_up` stands for `lora_up.weight`."""
    return {f"{name}.{part + '.weight' * part.startswith('lora_')}": tensor for part, tensor in parts.items()}


def peft_folder(folder: Path, config: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(
        {f"base_model.model.{k}": t.contiguous() for k, t in tensors.items()}, folder / "adapter_model.safetensors"
    )
    return folder
