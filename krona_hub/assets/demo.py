"""`krona demo`: the main workflow on the shipped model and adapters, offline, as commands to repeat.

The base model, tiny-scenes, generates images of 64×64 pixels. The adapters were trained on it to add a toy that it does
not know, the zorbi: a LoRA by peft, a LoKr by lycoris-lora (`scripts/make_tiny_adapters.py`).
"""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple

from krona_hub.errors import NotFoundError, ResourceError

FOLDER = "krona-demo"
ASSETS = {"lora.safetensors": "zorbi_lora_kohya.safetensors", "lokr.safetensors": "zorbi_lokr.safetensors"}
IMAGES = "pictures"  # folder
ABOUT = "Two adapters teach tiny-scenes, the small model shipped with krona, a toy that it does not know: the zorbi."
PROMPTS = (
    "a photo of a zorbi on a blue table",
    "a photo of a zorbi on a wooden table",
    "a photo of a zorbi on a white table",
)


class DemoStep(NamedTuple):
    """A command of the demo; `{folder}` is replaced by the demo's folder."""

    why: str
    command: str


STEPS = (
    DemoStep("Inspect the LoRA: contents and compatible applications.", "krona inspect {folder}/lora.safetensors"),
    DemoStep("Inspect the other adapter, a LyCORIS LoKr, which LoRA-only applications reject.",
         "krona inspect {folder}/lokr.safetensors --base tiny-scenes"),
    DemoStep(
        "LoRA → Kronecker: the smallest factorization of each layer within 5 % error.",
        "krona convert {folder}/lora.safetensors --max-error 0.05 -o {folder}/small.safetensors --overwrite",
    ),
    DemoStep(
        "LoRA → Kronecker again, exactly.",
        "krona convert {folder}/lora.safetensors --exact -o {folder}/exact.safetensors --overwrite",
    ),
    DemoStep(
        "Kronecker → LoRA: exactly the same delta, in a file that LoRA-only applications load.",
        "krona convert {folder}/lokr.safetensors --base tiny-scenes --to lora --exact "
        "-o {folder}/lokr-as-lora.safetensors --overwrite",
    ),
    DemoStep(
        "Merge the converted adapter into the base weights.",
        "krona merge tiny-scenes {folder}/lokr-as-lora.safetensors -o {folder}/merged --overwrite",
    ),
    DemoStep(
        "Generate images with equal seeds: base | original | converted | merged.",
        "krona generate tiny-scenes "
        + " ".join(f'--prompt "{prompt}"' for prompt in PROMPTS)
        + " --adapter {folder}/lokr.safetensors --adapter {folder}/lokr-as-lora.safetensors"
        " --beside {folder}/merged --batch 3 --images-per-prompt 1 -o {folder}/" + IMAGES + " --overwrite",
    ),
    DemoStep("Verify that the two adapters are equal.",
         "krona verify {folder}/lokr.safetensors {folder}/lokr-as-lora.safetensors --base tiny-scenes"),
    DemoStep("Verify that the merged base contains the original adapter, weight by weight.",
         "krona verify {folder}/merged --base tiny-scenes --adapter {folder}/lokr.safetensors"),
)  # fmt: skip


def prepare(folder: Path) -> tuple[str, ...]:
    """Write the two adapters and commands.txt to `folder`; return the commands, ready to run.

    Raises ResourceError if the folder cannot be written.
    """
    commands = tuple(step.command.format(folder=folder) for step in STEPS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, asset in ASSETS.items():
            with as_file(files("krona_hub.assets") / asset) as source:
                shutil.copyfile(source, folder / name)
        (folder / "commands.txt").write_text("\n".join(commands) + "\n")
    except OSError as problem:
        raise ResourceError(
            f"{folder}: {problem.strerror}.", fix="Choose another folder: krona demo --folder DIR."
        ) from problem
    return commands


def results(folder: Path) -> tuple[Path, ...]:
    """List the adapters in the demo's folder afterwards, the two shipped ones first."""
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: no such folder.", fix="Run krona demo.")
    given = [folder / name for name in ASSETS]
    return (*given, *sorted(set(folder.glob("*.safetensors")) - set(given)))


def grid(folder: Path) -> Path:
    """Return the path of the image grid."""
    return folder / IMAGES / "grid.png"
