"""The request of a calibration, checked before anything is loaded. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from krona_hub.calibration.prompts import PromptSets
from krona_hub.errors import UsageError
from krona_hub.images.request import ComputeOptions, Settings

SAMPLES = 1152  # default: calls of the denoiser
POINTS = 6  # calls of each trajectory, and as many at noised versions of its end
LEAST_SAMPLES = 200  # fewer overfit, as measured on tiny-scenes


@dataclass(frozen=True)
class CalibrationRequest:
    """What is gathered and measured, and where it is computed."""

    base: str
    prompts: PromptSets
    samples: int
    seed: int
    settings: Settings  # of the trajectories
    machine: ComputeOptions
    variant: str | None = None
    config: str | None = None

    @property
    def rounds(self) -> tuple[tuple[str, bool, int], ...]:
        """Return (prompt, whether it has the subject, number) of the trajectories, in order, alternating.

        The prompts are repeated, each time with other noise, until the samples are reached.
        """
        each = 2 * min(POINTS, self.settings.steps or POINTS)
        kinds = [(list(self.prompts.subject), True), (list(self.prompts.other), False)]
        kinds = [kind for kind in kinds if kind[0]]
        count = max(1, -(-self.samples // (each * len(kinds))))
        return tuple(
            (prompts[i % len(prompts)], has_subject, i) for i in range(count) for prompts, has_subject in kinds
        )


def checked_samples(samples: int) -> int:
    """Raise UsageError unless the number of samples is at least that of one trajectory."""
    if samples < 2 * POINTS:
        raise UsageError(f"Invalid number of samples {samples}.", fix=f"Use --samples {2 * POINTS} or more.")
    return samples


def sample_warnings(request: CalibrationRequest) -> tuple[str, ...]:
    """Return warnings that measurements on tiny-scenes ask for."""
    warnings = []
    if not request.prompts.other:
        warnings.append(
            "only prompts with the subject: other prompts may change about twice as much as with the source adapter; "
            "omit --other-prompts none"
        )
    if request.samples < LEAST_SAMPLES:
        warnings.append(f"{request.samples} samples are few: below about {LEAST_SAMPLES}, the result overfits")
    return tuple(warnings)
