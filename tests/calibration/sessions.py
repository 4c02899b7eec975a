"""The shipped base model with a shipped adapter, for short calibrations."""

from importlib.resources import files
from pathlib import Path

import torch

from krona_hub import read
from krona_hub.calibration.execute import open_session
from krona_hub.calibration.prompts import prompt_sets
from krona_hub.calibration.request import CalibrationRequest
from krona_hub.images.request import ComputeOptions, Settings

ASSETS = Path(str(files("krona_hub.assets")))
LORA, LOKR = ASSETS / "zorbi_lora_kohya.safetensors", ASSETS / "zorbi_lokr.safetensors"


def request_with(samples=24, seed=0, steps=6, **prompts):
    sets = prompt_sets("default", trigger="zorbi", family="tiny-scenes", **prompts)
    machine = ComputeOptions(device="cpu", dtype="float32")
    return CalibrationRequest("tiny-scenes", sets, samples, seed, Settings(steps=steps), machine)


def session_with(adapter=LORA, **options):
    torch.set_num_threads(1)
    return open_session(request_with(**options), read(adapter, base="tiny-scenes"))
