"""Scores by models of pictures: CLIP and DINO, from a folder or from what the Hub's cache already holds.

CLIP-I, DINO   mean cosine of the embeddings of every picture and every reference
CLIP-T         mean cosine of the embeddings of each picture and its prompt
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from krona_hub.errors import NotFoundError
from krona_hub.pipelines.opening import quiet

CLIP, DINO = "openai/clip-vit-large-patch14", "facebook/dino-vits16"  # what DreamBooth's authors compare with
BATCH = 16  # pictures at a time


class Embedder:
    """A model of pictures, and of words if it is CLIP. Raises NotFoundError where it is not on this machine."""

    def __init__(self, source: str, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoProcessor

        self.device = device
        try:
            with quiet():
                self.processor, self.model = (_opened(kind, source) for kind in (AutoProcessor, AutoModel))
                self.model.eval().to(device)
        except (OSError, ValueError) as error:
            raise NotFoundError(
                f"the model {source} is not on this machine.",
                fix=f"Download it: hf download {source}; or give the folder of another.",
            ) from error

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:
        """(n, width), each of length 1."""
        parts = [self._pictures(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        return normalize(torch.cat(parts), dim=1)

    def _pictures(self, images: Sequence[Image.Image]) -> Tensor:
        given = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt").to(self.device)
        if hasattr(self.model, "get_image_features"):
            return _tensor(self.model.get_image_features(**given))
        states: Tensor = self.model(**given).last_hidden_state
        return states[:, 0]

    @torch.no_grad()
    def words(self, prompts: Sequence[str]) -> Tensor:
        """(n, width), each of length 1."""
        given = self.processor(text=list(prompts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        return normalize(_tensor(self.model.get_text_features(**given)), dim=1)


def _opened(kind: Any, source: str) -> Any:
    return kind.from_pretrained(source, local_files_only=True)


def _tensor(features: Any) -> Tensor:
    """The embeddings; newer versions of transformers wrap them up."""
    found: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return found


def likeness(model: Embedder, pictures: Sequence[Image.Image], references: Sequence[Image.Image]) -> list[float]:
    """Of each picture to all references, in [-1, 1]."""
    scores: list[float] = (model.pictures(pictures) @ model.pictures(references).T).mean(1).tolist()
    return scores


def agreement(model: Embedder, pictures: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Of each picture with its prompt, in [-1, 1]."""
    scores: list[float] = (model.pictures(pictures) * model.words(prompts)).sum(1).tolist()
    return scores
