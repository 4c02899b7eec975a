"""Every application, base model and kind of adapter: the written file loads there, whole, or is refused.

There is no third outcome. What a file loads as is computed by the emulations in `emulation.py`, which share nothing
with the library; whether ComfyUI and Forge find its names is looked up in the lists that they gave.
"""

import json
import re
from dataclasses import replace
from itertools import islice
from math import prod

import pytest
import torch
from safetensors.torch import load_file

from krona_hub.bases import catalog
from krona_hub.bases.families import FAMILIES
from krona_hub.bases.name_table import table
from krona_hub.errors import InexpressibleError
from krona_hub.formats.compatibility.applications import APPLICATIONS
from krona_hub.formats.compatibility.base_support import support_of
from krona_hub.formats.compatibility.verdicts import verdict
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.writing.writer import write
from tests.applications import emulation
from tests.formats import made
from tests.shared import SHARED

EMULATED = {
    "comfyui": emulation.comfyui, "forge": emulation.forge, "reforge": emulation.comfyui, "a1111": emulation.a1111,
    "invokeai": emulation.invokeai, "sdcpp": emulation.sdcpp, "musubi": emulation.musubi, "kohya": emulation.kohya,
}  # fmt: skip
LISTS = {
    "comfyui": ("tools-golden/names-comfyui.json", "bases/names/comfyui-accepts.json"),
    "forge": ("tools-golden/names-forge.json",),
}
PATTERNS = 14  # layers of each adapter, of different patterns
MEASURED, LARGEST = 4, 2_000_000  # modules whose values are compared, and their most elements
TOLERANCE = 2e-5  # of the Frobenius norm, in float32 products


def representative(base, most=PATTERNS):
    """One layer per pattern of names, the first block of each: whole groups of q, k and v, then small layers first."""
    seen, chosen = set(), {}
    for layer, module in base.layers(base.denoiser):
        pattern = re.sub(r"[0-9]+", "#", layer)
        if pattern not in seen and module.groups == 1:
            seen.add(pattern)
            chosen[layer] = module.shape
    whole = [n for n in chosen if re.search(r"\.(to_[qkv]|add_[qkv]_proj|to_query|to_key|to_value)$", n)]
    rest = sorted((n for n in chosen if n not in whole), key=lambda n: (len(chosen[n]) < 5, prod(chosen[n])))
    return {name: chosen[name] for name in islice((*whole, *rest), most)}


def text_layers(base):
    """Some layers of every text encoder."""
    found = {}
    for component in base.text_encoders:
        names = [(n, m.shape) for n, m in base.layers(component) if re.search(r"layers?\.0\.|block\.0\.", n)]
        found.update(names[:3])
    return found


def linear(shapes):
    return {name: shape for name, shape in shapes.items() if len(shape) == 2}


def dora(adapter, axis):
    """With magnitudes that are those of no weight in particular."""
    layers = {}
    for name, delta in adapter.layers.items():
        size = delta.weight_shape[0 if axis == "out" else 1]
        layers[name] = replace(delta, magnitude=torch.linspace(0.5, 1.5, size), magnitude_axis=axis)
    return adapter.with_layers(layers)


def half(adapter):
    """float16 factors, one of each product in float32, as a reader leaves them that has folded a scale into it."""
    layers = {}
    for name, delta in adapter.layers.items():
        small = tuple(s.to(torch.float16) for s in delta.sums)
        layers[name] = replace(delta, sums=tuple(widened(s) for s in small))
    return adapter.with_layers(layers)


def widened(s):
    left = s.left if isinstance(s.left, torch.Tensor) else replace(s.left, up=s.left.up.float())
    return replace(s, left=left)


SPLIT = made.by_lycoris(4)
KINDS = {
    "lora": lambda base: made.lora(representative(base)),
    "lora of rank 1": lambda base: made.lora(linear(representative(base)), ranks=(1,)),
    "lokr, full": lambda base: made.lokr(representative(base), SPLIT, (None,)),
    "lokr, factored": lambda base: made.lokr(representative(base), SPLIT, (2,)),
    "lokr, both factored": lambda base: made.lokr(representative(base), made.by_lycoris(-1), (2,), (2,)),
    "lokr, mixed": lambda base: made.lokr(representative(base), SPLIT, (None, 2)),
    "lokr in float16": lambda base: half(made.lokr(representative(base), made.by_lycoris(-1), (2,), (2,))),
    "lora, DoRA per row": lambda base: dora(made.lora(linear(representative(base)), ranks=(2,)), "out"),
    "lora, DoRA per column": lambda base: dora(made.lora(linear(representative(base)), ranks=(2,)), "in"),
    "lokr, DoRA per row": lambda base: dora(made.lokr(linear(representative(base)), SPLIT, (2,)), "out"),
    "lokr, DoRA per column": lambda base: dora(made.lokr(linear(representative(base)), SPLIT, (2,)), "in"),
    "text encoders": lambda base: made.lora({**representative(base, 2), **text_layers(base)}, ranks=(2,)),
}
QUICK = ("lora", "lokr, full", "lokr, both factored", "text encoders")
ENTRIES = [  # an application, and one base model of each entry of its table
    (name, family.bases[0]) for name, application in APPLICATIONS.items() for family in application.families
]


def finders():
    """(application, base model) -> lookup in the list of names that the application gave."""
    found = {}
    for application, paths in LISTS.items():
        for path in paths:
            lists = json.loads((SHARED / path).read_text())["bases"] if (SHARED / path).exists() else {}
            for base, rows in lists.items():
                found[application, base.partition(".")[0]] = emulation.finder(rows)
    return found


FINDERS = finders()


def expected(adapter, base, module):
    """The delta that a module of the file stands for, put together from the layers at their rows; the base for DoRA."""
    places = table(base).find(module)
    shapes = [base.module(p.layer).shape for p in places]
    if len(places) == 1 and places[0].rows is None and places[0].part is None:
        shape = shapes[0]
        weight = torch.linspace(-1, 1, prod(shape)).reshape(shape) * 0.1
        delta = adapter.layers[places[0].layer]
        dense = delta.dense(weight) if delta.magnitude is not None else delta.dense()
        dense = dense.reshape(shape).float()
        return (torch.cat(dense.chunk(2)[::-1]) if places[0].swap_halves else dense), weight
    height = max(p.rows[1] for p in places if p.rows) if any(p.rows for p in places) else sum(
        p.part[1] - p.part[0] for p in places
    )  # fmt: skip
    whole = torch.zeros(height, *shapes[0][1:])
    for place in places:
        if place.layer in adapter.layers:
            dense = adapter.layers[place.layer].dense().float()
            start, stop = place.rows or (0, height)
            whole[start:stop] = dense[slice(*place.part)] if place.part else dense
    return whole, torch.zeros_like(whole)


def assert_loads(name, path, adapter, base):
    """The application finds every module, and computes what the adapter means."""
    assert verdict(APPLICATIONS[name], describe(path, base=base)).ok
    modules = emulation.modules_of(load_file(path))
    finder = FINDERS.get((name, base.family))
    if finder is not None:
        own = {m for m in modules if table(base).find(m)[0].layer.partition(".")[0] == base.denoiser}
        assert [m for m in own if finder(m) is None] == []
    emulate = EMULATED.get(name)
    small = sorted(modules, key=lambda m: sum(t.numel() for t in modules[m].values()))
    compared = 0
    for module in small if emulate else ():
        places = table(base).find(module)
        if compared < MEASURED and sum(prod(base.module(p.layer).shape) for p in places) <= LARGEST:
            meant, weight = expected(adapter, base, module)
            found = emulate(modules[module], weight)
            assert (found - meant).norm() <= TOLERANCE * meant.norm(), (module, {*modules[module]})
            compared += 1


def written_or_refused(name, base_name, kind, folder):
    """Whether the file was written; then it loads."""
    base = catalog.get(base_name)
    adapter = KINDS[kind](base)
    path = folder / "out.safetensors"
    try:
        report = write(adapter, path, tool=name, base=base)
    except InexpressibleError as error:
        assert error.fix and not path.exists()
        return False
    assert report.path.exists()
    if report.path.is_file():
        assert_loads(name, report.path, adapter, base)
    return True


@pytest.mark.parametrize("kind", QUICK)
@pytest.mark.parametrize(("name", "base"), ENTRIES, ids=["-".join(entry) for entry in ENTRIES])
def test_a_file_for_an_application_loads_there_whole_or_is_refused(name, base, kind, tmp_path):
    written_or_refused(name, base, kind, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in QUICK])
@pytest.mark.parametrize(("name", "base"), ENTRIES, ids=["-".join(entry) for entry in ENTRIES])
def test_a_file_of_a_rarer_kind_loads_whole_or_is_refused(name, base, kind, tmp_path):
    written_or_refused(name, base, kind, tmp_path)


@pytest.mark.parametrize("name", [name for name, application in APPLICATIONS.items() if application.families])
def test_some_lora_is_written_for_every_application(name, tmp_path):
    """The matrix is not passed by refusing everything."""
    written = []
    families = [family for family in APPLICATIONS[name].families if family.lora]
    for number, family in enumerate(families):
        folder = tmp_path / str(number)
        folder.mkdir()
        base = catalog.get(family.bases[0])
        blocks = {n: s for n, s in linear(representative(base, 60)).items() if re.search(r"\.0\..*(attn|attention)", n)}
        layers = blocks or dict(islice(linear(representative(base)).items(), 3))
        try:
            write(made.lora(layers, ranks=(2,)), folder / "x.safetensors", tool=name, base=base)
            written.append(family.bases[0])
        except InexpressibleError as error:
            assert "layer" in error.cause or "adapted" in error.cause, error
    assert len(written) >= 0.7 * len(families), written


@pytest.mark.parametrize("name", APPLICATIONS)
def test_no_file_is_written_for_a_base_model_that_the_application_is_not_known_to_run(name, tmp_path):
    application = APPLICATIONS[name]
    for base_name in FAMILIES:
        base = catalog.get(base_name)
        if application.every_base or support_of(application, base) is not None:
            continue
        layer, shape = next((n, m.shape) for n, m in base.layers(base.denoiser))
        with pytest.raises(InexpressibleError, match=r"does not run|is not known"):
            write(made.lora({layer: shape}), tmp_path / "x.safetensors", tool=name, base=base)
    assert not list(tmp_path.iterdir())
