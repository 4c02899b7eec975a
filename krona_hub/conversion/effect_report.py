"""What a smaller adapter keeps of the effect of its source, as values and in words. Torch-free.

All measures compare outputs of the denoiser at equal latents, times and conditions, of the base model alone, with the
source and with the result:

    effect kept   1 − E‖result − source‖² / E‖base − source‖²
    drift         E‖result − base‖² / E‖source − base‖²
    strength      ⟨result − base, source − base⟩ / ‖source − base‖²
"""

from __future__ import annotations

from dataclasses import dataclass

LEAST_KEPT = 0.5  # a result that keeps less of the effect is refused
VERDICTS = (  # least effect kept, verdict
    (0.995, "Nearly identical effect."),
    (0.97, "Close: small differences may be visible side by side."),
    (0.9, "Noticeably different: expect visible changes in images."),
    (LEAST_KEPT, "Very different: much of what the adapter learned is lost."),
    (float("-inf"), "Destroyed: less than half of the effect is kept."),
)


@dataclass(frozen=True)
class EffectReport:
    """The effect that a result keeps, measured on prompts that its calibration did not use."""

    kept: float  # on prompts with the subject; 1 is the source itself, 0 the base model
    kept_range: tuple[float, float]  # 95 % range by resampling the prompts
    strength: float  # projected on the effect of the source, on prompts with the subject
    other_kept: float | None  # effect kept on prompts without the subject; None without such prompts
    drift: float | None  # on prompts without the subject; 1 for the source itself
    prompts: tuple[str, ...]  # held out, with the subject
    other_prompts: tuple[str, ...]
    samples: int  # calls of the denoiser, with the subject
    other_samples: int
    seed: int
    seconds: float

    @property
    def verdict(self) -> str:
        """
        >>> EffectReport(0.98, (0.97, 0.99), 1.0, None, None, ("a toy",), (), 12, 0, 0, 1.0).verdict
        'Close: small differences may be visible side by side.'
        """
        return next(words for least, words in VERDICTS if self.kept >= least)
