"""Validate adapters, compare two of them, and verify merged checkpoints. Torch-free."""

from krona_hub.verification.api import verify
from krona_hub.verification.report import DeltaCheck, FitCheck, LayerCheck, MergeCheck, TensorCheck, VerifyReport
from krona_hub.verification.soundness import ValidationReport, validate

__all__ = [
    "DeltaCheck", "FitCheck", "LayerCheck", "MergeCheck", "TensorCheck", "ValidationReport", "VerifyReport",
    "validate", "verify",
]  # fmt: skip
