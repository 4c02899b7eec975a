"""The names that are written for authors' and trainers' programs, read by diffusers' own converters of LoRAs.

A random LoRA of every kind of block goes through a converter, and must come out under our canonical names with the
same ΔW: q, k and v at their rows, swapped halves in place, alpha folded in.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from krona_hub.bases import catalog
from krona_hub.bases.module_spec import Placement
from krona_hub.bases.name_table import table
from krona_hub.formats.writing.module_names import homes

RANK, ALPHA, WIDTH = 4, 3.0, 2
BLOCKS = r"blocks\.|layers\.|refiner\."  # several converters know no other layers
LATER = re.compile(r"\.([2-9]|\d\d+)(?=\.)")  # blocks after the second


class Case(NamedTuple):
    """A function of diffusers.loaders.lora_conversion_utils, and the names that it reads."""

    function: str  # between `_convert_` and `_lora_to_diffusers`
    base: str
    dialect: str  # or "xlabs", or a prefix of the authors' names
    layers: str = ""  # that it knows
    parameters: tuple[str, str] = ("lora_A", "lora_B")  # or those of kohya, then with an alpha
    whole: bool = False  # it wants every block


DOWN_UP = ("lora_down", "lora_up")
CASES = (
    Case("xlabs_flux", "flux1-dev", "xlabs", parameters=("down", "up")),
    Case("kohya_flux", "flux1-dev", "kohya-ldm", r"^(?!.*norm_out|transformer\.proj_out)", DOWN_UP),
    Case("fal_kontext", "flux1-dev", "base_model.model.", r"blocks\.|transformer\.proj_out", whole=True),
    Case("non_diffusers_flux2", "flux2-klein-4b", "original", "^(?!.*norm_out)"),
    Case("kohya_flux2", "flux2-klein-4b", "kohya-ldm", "^(?!.*(norm_out|modulation))", DOWN_UP),
    Case("non_diffusers_flux3", "flux3", "original", BLOCKS),
    Case("hunyuan_video", "hunyuan-video", "original", r"^(?!transformer\.norm_out|.*refiner.*to_[qkv])"),
    Case("hunyuan_video", "hunyuan-video-i2v", "transformer.", r"^(?!transformer\.norm_out|.*refiner.*to_[qkv])"),
    Case("non_diffusers_lumina2", "lumina2", "original", BLOCKS),
    Case("non_diffusers_wan", "wan21-i2v-14b", "original", "^(?!.*patch_embedding)"),
    Case("non_diffusers_wan", "wan22-ti2v-5b", "original", "^(?!.*patch_embedding)"),
    Case("musubi_wan", "wan21-i2v-14b", "kohya-ldm", BLOCKS, DOWN_UP),
    Case("non_diffusers_ltxv", "ltx-video-2b", "original", BLOCKS),
    Case("non_diffusers_ltx2", "ltx-2", "original"),
    Case("non_diffusers_ltx2", "ltx-2.3", "original"),
    Case("non_diffusers_anima", "anima", "original"),
    Case("non_diffusers_z_image", "z-image", "kohya-ldm", BLOCKS, DOWN_UP),
    Case("non_diffusers_z_image", "z-image", "kohya", parameters=DOWN_UP),
    Case("non_diffusers_krea2", "krea2", "original"),
    Case("non_diffusers_ideogram4", "ideogram4", "original", r"^transformer\.layers\."),
    Case("non_diffusers_minimax_h3", "minimax-h3", "original"),
    Case("non_diffusers_minimax_h3", "minimax-h3", "kohya-ldm", parameters=DOWN_UP),
    Case("non_diffusers_qwen", "qwen-image", "original"),
    Case("non_diffusers_qwen", "qwen-image", "kohya", parameters=DOWN_UP),
    Case("non_diffusers_hidream", "hidream-i1", "original"),
)
WRONG = (  # where a LoRA converter of diffusers 0.42.1 contradicts diffusers' own converter of the base weights
    Case("non_diffusers_flux2", "flux2-klein-4b", "original", "norm_out"),  # leaves shift and scale in their order
    Case("kohya_flux", "flux1-dev", "kohya-ldm", r"norm_out", DOWN_UP),  # swaps the halves of the rank, too
    Case("kohya_flux", "flux1-dev", "kohya-ldm", r"^transformer\.proj_out", DOWN_UP),  # forgets alpha
    Case("hunyuan_video", "hunyuan-video", "original", r"^transformer\.norm_out"),  # likewise
    Case("hunyuan_video", "hunyuan-video", "original", r"refiner.*to_[qkv]"),  # splits the down matrix in three
)


def modules(case: Case) -> Iterator[tuple[str, tuple[Placement, ...]]]:
    """The modules of the file, of the first two blocks of every kind."""
    base = catalog.get(case.base)
    layers = [
        layer
        for component in (base.denoiser, "text_conditioner")
        if component in base.components
        for layer, _ in base.layers(component)
        if re.search(case.layers, layer) and (case.whole or not LATER.search(layer))
    ]
    if case.dialect == "xlabs":
        names = table(base).parts[base.denoiser].spellings["xlabs"]
        yield from ((name, places) for name, places in names.items() if not LATER.search(name))
        return
    prefixed = case.dialect.endswith(".")
    dialect = "original" if prefixed else case.dialect
    for stored in homes(layers, dialect, table(base)).values():
        for home in stored:
            name = home.module.removeprefix("diffusion_model.")
            yield case.dialect + name if prefixed else home.module, home.siblings


def file_and_meaning(case: Case) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a random file, and layer -> the delta of WIDTH columns that they mean."""
    generator = torch.Generator().manual_seed(0)
    base, file, meant = catalog.get(case.base), {}, {}
    down_name, up_name = case.parameters
    for module, siblings in dict(modules(case)).items():
        heights = [base.module(place.layer).shape[0] for place in siblings]
        up = torch.randint(-9, 9, (sum(heights), RANK), generator=generator).double()
        down = torch.randint(-9, 9, (RANK, WIDTH), generator=generator).double()
        joint = "_lora." if module.endswith((".processor.qkv", ".processor.proj")) else "."  # xlabs, in single blocks
        file |= {f"{module}{joint}{down_name}.weight": down, f"{module}{joint}{up_name}.weight": up}
        scale = 1.0
        if case.parameters == DOWN_UP:
            file[f"{module}.alpha"] = torch.tensor(ALPHA)
            scale = ALPHA / RANK
        for place, rows in zip(siblings, up.split(heights), strict=True):
            rows = torch.cat(rows.chunk(2)[::-1]) if place.swap_halves else rows
            meant[place.layer] = scale * rows @ down
    return file, meant


def converted(case: Case, file: dict[str, Tensor]) -> dict[str, Tensor]:
    """Layer -> what diffusers finds for it."""
    from diffusers.loaders import lora_conversion_utils

    found = getattr(lora_conversion_utils, f"_convert_{case.function}_lora_to_diffusers")(file)
    ups = {name.removesuffix(".lora_B.weight"): up for name, up in found.items() if name.endswith(".lora_B.weight")}
    deltas = {layer: up.double() @ found[f"{layer}.lora_A.weight"].double() for layer, up in ups.items()}
    known = catalog.get(case.base).components["transformer"]  # kohya_flux forgets `transformer.` outside of the blocks
    return {f"transformer.{layer}" if layer in known else layer: delta for layer, delta in deltas.items()}


def check(case: Case) -> None:
    file, meant = file_and_meaning(case)
    found = converted(case, file)
    assert meant and meant.keys() <= found.keys()
    assert [layer for layer, delta in meant.items() if not torch.equal(found[layer], delta)] == []


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=["-".join(case[:3]) for case in CASES])
def test_diffusers_finds_the_layers_that_we_write(case):
    check(case)


@pytest.mark.slow
@pytest.mark.xfail(strict=True, raises=(AssertionError, ValueError), reason="a defect of diffusers 0.42.1")
@pytest.mark.parametrize("case", WRONG, ids=["-".join(case[:2]) + case.layers for case in WRONG])
def test_diffusers_agrees_with_its_own_weights(case):
    check(case)
