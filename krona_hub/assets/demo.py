"""`krona demo`: the main job on what comes with krona, offline, as commands that a person can repeat.

The base, tiny-scenes, draws pictures of 64×64 pixels. The adapters were trained on it to draw a toy that it does not
know, the zorbi: a LoRA by peft, a LoKr by lycoris-lora (`scripts/make_tiny_adapters.py`).
"""

from __future__ import annotations

import shutil
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple

from krona_hub.errors import NotFoundError, ResourceError

FOLDER = "krona-demo"
ASSETS = {"lora.safetensors": "zorbi_lora_kohya.safetensors", "lokr.safetensors": "zorbi_lokr.safetensors"}
PICTURES = "pictures"
ABOUT = "Two adapters teach tiny-scenes, the small model that comes with krona, a toy that it does not know: the zorbi."
PROMPTS = (
    "a photo of a zorbi on a blue table",
    "a photo of a zorbi on a wooden table",
    "a photo of a zorbi on a white table",
)


class DemoStep(NamedTuple):
    """One command of the demo; `{folder}` stands for the demo's folder."""

    why: str
    command: str


STEPS = (
    DemoStep("What is this LoRA, and which tools load it?", "krona inspect {folder}/lora.safetensors"),
    DemoStep("The other adapter is a LyCORIS LoKr, which LoRA-only tools refuse.",
         "krona inspect {folder}/lokr.safetensors --base tiny-scenes"),
    DemoStep(
        "LoRA → Kronecker: the smallest form of each layer within 5 % error.",
        "krona convert {folder}/lora.safetensors --max-error 0.05 -o {folder}/small.safetensors --overwrite",
    ),
    DemoStep(
        "LoRA → Kronecker once more, exactly.",
        "krona convert {folder}/lora.safetensors --exact -o {folder}/exact.safetensors --overwrite",
    ),
    DemoStep(
        "Kronecker → LoRA: exactly the same delta, in a file that LoRA-only tools load.",
        "krona convert {folder}/lokr.safetensors --base tiny-scenes --to lora --exact "
        "-o {folder}/lokr-as-lora.safetensors --overwrite",
    ),
    DemoStep(
        "The converted adapter merged into the base's weights.",
        "krona merge tiny-scenes {folder}/lokr-as-lora.safetensors -o {folder}/merged --overwrite",
    ),
    DemoStep(
        "Pictures with equal seeds: base | original | converted | merged.",
        "krona generate tiny-scenes "
        + " ".join(f'--prompt "{prompt}"' for prompt in PROMPTS)
        + " --adapter {folder}/lokr.safetensors --adapter {folder}/lokr-as-lora.safetensors"
        " --beside {folder}/merged --batch 3 --images-per-prompt 1 -o {folder}/" + PICTURES + " --overwrite",
    ),
    DemoStep("Do the two adapters say the same?",
         "krona verify {folder}/lokr.safetensors {folder}/lokr-as-lora.safetensors --base tiny-scenes"),
    DemoStep("And does the merged base hold the original, weight for weight?",
         "krona verify {folder}/merged --base tiny-scenes --adapter {folder}/lokr.safetensors"),
)  # fmt: skip


def prepare(folder: Path) -> tuple[str, ...]:
    """Put the two adapters and commands.txt into `folder`; the commands, ready to run.

    Raises ResourceError where the folder cannot be written.
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
            f"{folder}: {problem.strerror}.", fix="Choose another place: krona demo --folder DIR."
        ) from problem
    return commands


def results(folder: Path) -> tuple[Path, ...]:
    """The adapters that lie in the demo's folder afterwards, the two given ones first."""
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: no such folder.", fix="Run krona demo.")
    given = [folder / name for name in ASSETS]
    return (*given, *sorted(set(folder.glob("*.safetensors")) - set(given)))


def grid(folder: Path) -> Path:
    """The picture of all pictures."""
    return folder / PICTURES / "grid.png"
