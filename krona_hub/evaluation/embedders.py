"""Scores from CLIP and DINO, loaded from a folder or from the cache of the Hub.

CLIP-I, DINO   mean cosine similarity of the embeddings of each image and all references
CLIP-T         mean cosine similarity of the embeddings of each image and its prompt
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

CLIP, DINO = "openai/clip-vit-large-patch14", "facebook/dino-vits16"  # models of the DreamBooth evaluation
BATCH = 16  # images per forward pass


class Embedder:
    """An image embedding model; CLIP also embeds text. Raises NotFoundError if it is not available locally."""

    def __init__(self, source: str, device: str = "cpu") -> None:
        from transformers import AutoModel, AutoProcessor

        self.device = device
        try:
            with quiet():
                self.processor, self.model = (_opened(kind, source) for kind in (AutoProcessor, AutoModel))
                self.model.eval().to(device)
        except (OSError, ValueError) as error:
            raise NotFoundError(
                f"Model {source} is not available locally.",
                fix=f"Run hf download {source}, or specify the folder of another model.",
            ) from error

    @torch.no_grad()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Return (n, width) embeddings of unit length."""
        parts = [self._embed_batch(images[start : start + BATCH]) for start in range(0, len(images), BATCH)]
        return normalize(torch.cat(parts), dim=1)

    def _embed_batch(self, images: Sequence[Image.Image]) -> Tensor:
        inputs = self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt").to(self.device)
        if hasattr(self.model, "get_image_features"):
            return _tensor(self.model.get_image_features(**inputs))
        states: Tensor = self.model(**inputs).last_hidden_state
        return states[:, 0]

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> Tensor:
        """Return (n, width) embeddings of unit length."""
        inputs = self.processor(text=list(prompts), padding=True, truncation=True, return_tensors="pt").to(self.device)
        return normalize(_tensor(self.model.get_text_features(**inputs)), dim=1)


def _opened(kind: Any, source: str) -> Any:
    return kind.from_pretrained(source, local_files_only=True)


def _tensor(features: Any) -> Tensor:
    """Return the embeddings, which newer versions of transformers wrap in an output object."""
    found: Tensor = features if isinstance(features, Tensor) else features.pooler_output
    return found


def image_similarity(model: Embedder, images: Sequence[Image.Image], references: Sequence[Image.Image]) -> list[float]:
    """Return the mean cosine similarity of each image to all references, in [-1, 1]."""
    scores: list[float] = (model.embed_images(images) @ model.embed_images(references).T).mean(1).tolist()
    return scores


def prompt_similarity(model: Embedder, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
    """Return the cosine similarity of each image to its prompt, in [-1, 1]."""
    scores: list[float] = (model.embed_images(images) * model.embed_prompts(prompts)).sum(1).tolist()
    return scores
