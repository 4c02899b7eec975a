"""Is this adapter sound? Do these two files mean the same? Does this checkpoint contain that adapter? Torch-free."""

from krona_hub.verification.report import DeltaCheck, FitCheck, LayerCheck, MergeCheck, TensorCheck, VerifyReport
from krona_hub.verification.validate_file import ValidationReport, validate
from krona_hub.verification.verify_files import verify

__all__ = [
    "DeltaCheck", "FitCheck", "LayerCheck", "MergeCheck", "TensorCheck", "ValidationReport", "VerifyReport",
    "validate", "verify",
]  # fmt: skip
