"""The samplers of `--scheduler`, as a table of diffusers classes. Torch-free."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any, NamedTuple

from krona_hub.errors import UsageError


class Sampler(NamedTuple):
    """A diffusers scheduler class, with settings that override the base's configuration."""

    kind: str
    settings: Mapping[str, Any] = MappingProxyType({})
    flow: str | None = None  # the class for flow-matching bases (SD3, FLUX, …)


SAMPLERS: Mapping[str, Sampler] = {
    "ddim": Sampler("DDIMScheduler"),
    "ddpm": Sampler("DDPMScheduler"),
    "pndm": Sampler("PNDMScheduler"),
    "euler": Sampler("EulerDiscreteScheduler", flow="FlowMatchEulerDiscreteScheduler"),
    "euler-karras": Sampler("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler-a": Sampler("EulerAncestralDiscreteScheduler"),
    "heun": Sampler("HeunDiscreteScheduler", flow="FlowMatchHeunDiscreteScheduler"),
    "dpm++": Sampler("DPMSolverMultistepScheduler"),
    "dpm++-karras": Sampler("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++-sde": Sampler("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++-2s": Sampler("DPMSolverSinglestepScheduler"),
    "kdpm2": Sampler("KDPM2DiscreteScheduler"),
    "kdpm2-a": Sampler("KDPM2AncestralDiscreteScheduler"),
    "deis": Sampler("DEISMultistepScheduler"),
    "unipc": Sampler("UniPCMultistepScheduler"),
    "lcm": Sampler("LCMScheduler"),
}
ALIASES: Mapping[str, str] = {  # names in other applications
    "dpmpp": "dpm++", "dpm++2m": "dpm++", "dpmpp2m": "dpm++", "dpmpp2mkarras": "dpm++-karras",
    "dpm++2mkarras": "dpm++-karras", "dpmpp2msde": "dpm++-sde", "dpm++2msde": "dpm++-sde", "dpmpp2s": "dpm++-2s",
    "eulera": "euler-a", "eulerancestral": "euler-a", "plms": "pndm", "dpm2": "kdpm2", "dpm2a": "kdpm2-a",
}  # fmt: skip


def sampler_named(name: str) -> str:
    """Return the name in SAMPLERS, ignoring case, separators and common aliases.

    >>> sampler_named("Euler A"), sampler_named("dpmpp_2m_karras")
    ('euler-a', 'dpm++-karras')

    Raises UsageError with the nearest name.
    """
    plain = _plain(name)
    known: dict[str, str] = {_plain(n): n for n in SAMPLERS} | dict(ALIASES)
    if plain in known:
        return known[plain]
    near = get_close_matches(plain, known, n=1, cutoff=0.5)
    fix = f"Did you mean {known[near[0]]}? " if near else ""
    raise UsageError(f"Unknown scheduler {name!r}.", fix=f"{fix}Choose one of {', '.join(SAMPLERS)}.")


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c not in " -_")
