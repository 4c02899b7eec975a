"""File names in a krona repository, and their limits."""

from __future__ import annotations

from krona_hub.checkpoints.file_names import DIFFUSERS_WEIGHTS, NATIVE_WEIGHTS

CARD, CONFIG, MANIFEST, SIGNATURE = "README.md", "config.json", "krona_manifest.json", "model.sig"
WEIGHTS = NATIVE_WEIGHTS
LORA_EXPORT, LOKR_EXPORT = DIFFUSERS_WEIGHTS, "lycoris_lokr.safetensors"
EXPORTS = (LORA_EXPORT, LOKR_EXPORT)
IMAGES, PLOTS = "images/", "plots/"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
MODEL_TYPE = "krona"
HEADER_SIZE = "header_size"  # key of the config: bytes of the weights file before the tensor data

MAX_IMAGES, MAX_IMAGE = 12, 1_000_000  # number of images, and bytes of each
MAX_HEADER = 8 << 20  # bytes
MAX_TENSORS = 20_000
MAX_FILE = 2 << 30  # bytes; --max-size overrides it
MAX_TEXT = 64 << 10  # bytes of one metadata entry, except krona's own header


def is_ours(name: str) -> bool:
    """Whether krona writes a file of this name.

    >>> is_ours("images/a.png"), is_ours("images/a.exe"), is_ours("model.safetensors")
    (True, False, False)
    """
    if name in (CARD, CONFIG, MANIFEST, SIGNATURE, WEIGHTS, *EXPORTS):
        return True
    folder, _, last = name.rpartition("/")
    return f"{folder}/" in (IMAGES, PLOTS) and last.lower().endswith(IMAGE_SUFFIXES)
