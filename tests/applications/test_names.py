"""The names of modules that the tables of applications state, against lists that the applications themselves gave.

The lists (`tools-golden/names-*.json`, `bases/names/`) come from running ComfyUI and Forge on their own models: for
each weight, or row window of one, the names that are found in an adapter file.
"""

import json
import re
from collections import defaultdict

import pytest

from krona_hub.bases import catalog
from krona_hub.bases.families import FAMILIES
from krona_hub.formats.compatibility.applications import APPLICATIONS
from krona_hub.formats.compatibility.base_support import support_of
from krona_hub.formats.compatibility.naming import Names, naming
from tests.shared import SHARED

LISTS = {
    "comfyui": ("tools-golden/names-comfyui.json", "bases/names/comfyui-accepts.json"),
    "forge": ("tools-golden/names-forge.json",),
}
BASE_OF = {  # pipelines of text-encoders.json -> base model of the catalog
    "wan": "wan21-t2v-14b", "ltx-video": "ltx-video-2b", "kandinsky5": "kandinsky5-lite-video",
    "cosmos-predict2": "cosmos-predict2-2b-t2i", "hidream": "hidream-i1", "hunyuan-dit": "hunyuan-dit-12",
    "cogvideox": "cogvideox-5b",
}  # fmt: skip


def load(path):
    return json.loads((SHARED / path).read_text()) if (SHARED / path).exists() else {}


CASES = [
    (application, base, rows)
    for application, paths in LISTS.items()
    for path in paths
    for base, rows in load(path).get("bases", {}).items()
]


def hashed(name):
    """`#` for every number but that of a text encoder's prefix, as in the lists."""
    prefix = re.match(r"(lora_te\d?_)?", name)[0]
    return prefix + re.sub(r"[0-9]+", "#", name[len(prefix) :])


def family(base):
    return base if base in FAMILIES else base.partition(".")[0]


def names_of(application, base):
    known = catalog.get(family(base))
    return Names(known, support_of(APPLICATIONS[application], known).names)


def own_place(speller, layer):
    """The hashed module of ComfyUI's model that stores a layer, and its rows there."""
    module, place, siblings = speller.homes(naming("diffusion_model. own"), layer)[0]
    rows = place.rows if len(siblings) > 1 else None
    return hashed(module), rows


@pytest.mark.parametrize(("application", "base", "rows"), CASES, ids=[f"{a}-{b}" for a, b, _ in CASES])
def test_every_stated_name_of_the_denoiser_is_found_for_the_right_rows(application, base, rows):
    names = names_of(application, base)
    found = defaultdict(set)
    for row in rows:
        for name in row["accepted"]:
            window = None if row["rows"] is None else (row["rows"][1], row["rows"][1] + row["rows"][2])
            found[hashed(name)].add((row["weight"].removesuffix(".weight"), window))
    component = names.base.denoiser
    speller = names.speller(component)
    wrong = []
    for layer, _ in names.base.layers(component):
        module, own_rows = own_place(speller, layer)
        usable = list(names.usable(layer))
        wrong += [] if usable else [f"{layer} has no name"]
        for known in usable:
            name, place, siblings = speller.homes(known, layer)[0]
            weights = found.get(hashed(name), set())
            whole = len(siblings) > 1 or place.part is not None
            if not any(
                hashed(weight) == module and (whole or window == own_rows or known.spelling == "qkv")
                for weight, window in weights
            ):
                wrong.append((name, layer, str(known), weights, module, own_rows))
    assert wrong == []


@pytest.mark.parametrize(("application", "base", "rows"), CASES, ids=[f"{a}-{b}" for a, b, _ in CASES])
def test_every_listed_name_of_a_layer_is_stated(application, base, rows):
    """No name that the application finds is called unknown, of all namings that it has for any base model."""
    names = names_of(application, base)
    component, listed = names.base.denoiser, {hashed(name) for row in rows for name in row["accepted"]}
    speller = names.speller(component)
    families = APPLICATIONS[application].families
    namings = (n for family in families for n in family.names["denoiser"].namings)
    every = {n for n in namings if n.spelling != "processor"}
    stated, known = set(), set()
    for layer, _ in names.base.layers(component):
        stated |= {hashed(speller.homes(n, layer)[0][0]) for n in names.usable(layer)}
        known |= {hashed(speller.homes(n, layer)[0][0]) for n in every if speller.has(n, layer)}
    wrong = {name for name in known if base == "ovis-image" and name.endswith("proj_mlp")}  # found for half of its rows
    assert sorted(known & listed - stated - wrong) == []


ENCODERS = load("bases/names/text-encoders.json").get("encoders", ())


@pytest.mark.parametrize("entry", ENCODERS, ids=[e["base_of"] for e in ENCODERS])
def test_every_stated_name_of_a_text_encoder_is_found(entry):
    base = BASE_OF.get(entry["base_of"], entry["base_of"])
    names = names_of("comfyui", base)
    accepted = {hashed(path): {hashed(n) for n in found} for path, found in entry["accepted_by_comfyui"].items()}
    checked = 0
    for component in names.base.text_encoders:
        if FAMILIES[base].components[component] == entry["component"]:
            for layer, _ in names.base.layers(component):
                path = hashed(layer.partition(".")[2])
                stated = {hashed(names.speller(component).homes(known, layer)[0][0]) for known in names.usable(layer)}
                assert stated <= accepted.get(path, set()), (layer, stated, accepted.get(path))
                assert bool(stated) == (path in accepted), layer
                checked += 1
    assert checked, f"{entry['component']} is not a text encoder of {base}"
