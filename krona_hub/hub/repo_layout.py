"""What lies where in a repository of krona, and how much of it there may be."""

from __future__ import annotations

from krona_hub.checkpoints.file_names import DIFFUSERS_WEIGHTS, NATIVE_WEIGHTS

CARD, CONFIG, MANIFEST, SIGNATURE = "README.md", "config.json", "krona_manifest.json", "model.sig"
WEIGHTS = NATIVE_WEIGHTS
LORA_EXPORT, LOKR_EXPORT = DIFFUSERS_WEIGHTS, "lycoris_lokr.safetensors"
EXPORTS = (LORA_EXPORT, LOKR_EXPORT)
IMAGES, PLOTS = "images/", "plots/"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
MODEL_TYPE = "krona"
HEADER_SIZE = "header_size"  # key of the config: bytes of the weights that tell all but their numbers

MAX_IMAGES, MAX_IMAGE = 12, 1_000_000  # pictures, and bytes of each
MAX_HEADER = 8 << 20  # bytes
MAX_TENSORS = 20_000
MAX_FILE = 2 << 30  # bytes, unless --max-size says otherwise
MAX_TEXT = 64 << 10  # bytes of one entry of the metadata, krona's own header aside


def is_ours(name: str) -> bool:
    """Whether a file of that name is one that krona writes.

    >>> is_ours("images/a.png"), is_ours("images/a.exe"), is_ours("model.safetensors")
    (True, False, False)
    """
    if name in (CARD, CONFIG, MANIFEST, SIGNATURE, WEIGHTS, *EXPORTS):
        return True
    folder, _, last = name.rpartition("/")
    return f"{folder}/" in (IMAGES, PLOTS) and last.lower().endswith(PICTURES)
