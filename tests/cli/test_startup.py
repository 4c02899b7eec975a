"""Startup: frequent commands run without importing the heavy libraries."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "diffusers", "transformers", "peft", "lycoris", "safetensors.torch")
GUARD = f"""
import sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        if name in {HEAVY!r}:
            raise RuntimeError("imports " + name)
sys.meta_path.insert(0, Guard())
from krona_hub.cli import start
start()
"""
LIGHT = [
    "--help",
    "--version",
    "completion bash",
    "convert --help",
    "formats",
    "tools",
    "tools SwarmUI",
    "tools --base sd15",
    "inspect lora.safetensors",
    "inspect lokr.safetensors --base sd15 --layers",
    "validate lokr.safetensors",
    "merge base lora.safetensors:0.8 lokr.safetensors --dry-run",
    "merge base lora.safetensors --dry-run --block-weights blocks.txt",
    "verify lokr.safetensors --base sd15",
    "verify lokr.safetensors --base base",
    "params --base sdxl --shape 64x8 --rank 4",
    "push --help",
    "pull --help",
    "hub ls",
    "generate --help",
    "generate base --prompt x --adapter lora.safetensors:0.8 --adapter lokr.safetensors --dry-run",
]


def run_guarded(line: str, folder) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", GUARD, *line.split()], cwd=folder, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("line", LIGHT)
def test_a_light_command_imports_no_heavy_library(line, adapters):
    done = run_guarded(line, adapters)
    assert done.returncode == 0, done.stdout + done.stderr


def test_unmerge_imports_no_heavy_library(adapters, tmp_path):
    done = run_guarded(f"unmerge merged --undo undo.safetensors -o {tmp_path / 'restored'}", adapters)
    assert done.returncode == 0, done.stdout + done.stderr


MISTAKES = {  # command line whose mistake is reported before torch is imported -> code
    "convert lora.safetensors --exact --rank 4": "KH101",
    "convert lora.safetensors --terms 4": "KH101",
    "convert lora.safetensors --to lor": "KH101",
    "convert lora.safetensors --for nothing": "KH101",
    "tools nothing": "KH101",
    "convert lora.safetensors --to krona --for comfyui": "KH101",
    "convert lora.safetensors --to nonsense --for comfyui": "KH101",
    "convert lora.safetensors --dtype int8": "KH101",
    "convert nothing.safetensors": "KH190",
    "convert lora.safetensors -o lokr.safetensors": "KH170",
    "merge base lora.safetensors": "KH101",
    "merge base lora.safetensors -o new --in-place --undo u": "KH101",
    "merge base lora.safetensors:inf -o new": "KH101",
    "merge base nothing.safetensors -o new": "KH190",
    "merge base krona.safetensors -o new": "KH160",
    "merge base lora.safetensors -o merged": "KH170",
    "generate base": "KH101",
    "generate --prompt x": "KH101",
    "generate base --prompt x --scheduler eular": "KH101",
    "generate base --prompt x --size 100x100": "KH101",
    "generate base --prompt x --device gpu": "KH101",
    "generate base --prompt x --strengths 0,1": "KH101",
    "generate base --prompt x --strengths some": "KH101",
    "generate base --prompt x --set clip_skip": "KH101",
    "generate base --prompt x --adapter nothing.safetensors": "KH190",
    "generate base --prompt x -o merged": "KH170",
    "generate nothing --prompt x": "KH190",
    "generate sd15 --prompt x": "KH161",
    "generate lora.safetensors --prompt x": "KH161",
    "generate --again blocks.txt": "KH120",
    "convert lora.safetensors -o no/where.safetensors": "KH190",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_told_before_anything_heavy_is_imported(line, adapters):
    done = run_guarded(line, adapters)
    assert f"error {MISTAKES[line]}: " in done.stderr, done.stderr


def test_the_guard_itself_works(adapters):
    done = run_guarded("convert lora.safetensors --dry-run", adapters)
    assert done.returncode == 1 and "imports torch" in done.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [("krona params --base sdx", "plain,sdxl"), ("krona convert x --to lyc", "plain,lycoris-lokr")],
)
def test_completion_of_names_is_light(words, expected, adapters):
    variables = {"_KRONA_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run([sys.executable, "-c", GUARD], capture_output=True, text=True, env=variables)
    assert expected in done.stdout.splitlines(), done.stderr
