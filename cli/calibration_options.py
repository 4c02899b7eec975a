"""Options of a calibration, shared by `krona calibrate` and `krona convert --calibrate`."""

from __future__ import annotations

import click

SAMPLES = 1152  # as in krona_hub.calibration.request, which the start-up does not import

other_prompts_option = click.Option(
    ["--other-prompts"],
    metavar="FILE|default|none",
    default="default",
    help="Prompts without the subject, which are to change as little as with the original [default].",
)
held_out_option = click.Option(
    ["--held-out"],
    type=click.Path(),
    metavar="FILE",
    help="Prompts with the subject for measuring only [every fourth of the prompts].",
)
trigger_option = click.Option(
    ["--trigger"], metavar="WORD", help="Word for the subject in the default prompts [that of the adapter]."
)
samples_option = click.Option(
    ["--samples"],
    type=int,
    default=SAMPLES,
    metavar="N",
    help=f"Calls of the denoiser to sample, half of them without the subject [{SAMPLES}].",
)
steps_option = click.Option(
    ["--calibrate-steps", "steps"], type=int, metavar="N", help="Denoising steps [pipeline default]."
)
guidance_option = click.Option(["--guidance"], type=float, metavar="G", help="Guidance scale [pipeline default].")
size_option = click.Option(["--size"], metavar="WxH", help="Image size in pixels [training resolution].")
seed_option = click.Option(["--seed"], type=int, default=0, metavar="N", help="Random seed [0].")
device_option = click.Option(["--device"], metavar="NAME", help="cpu, cuda, cuda:1 or mps [best available].")
offload_option = click.Option(
    ["--offload"], metavar="MODE", help="model or sequential: keep only the active part in device memory [none]."
)

PROMPTS = (other_prompts_option, held_out_option, trigger_option)
SAMPLING = (samples_option, steps_option, guidance_option, size_option, seed_option)
MACHINE = (device_option, offload_option)
