"""The catalog says what diffusers and transformers build, in a form that loses nothing and stays small."""

import json
from importlib.resources import files

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krona_hub.bases import catalog
from krona_hub.bases.base import COMPONENTS
from krona_hub.bases.families import ALIASES, FAMILIES, equals_of
from krona_hub.bases.module_spec import ModuleSpec
from krona_hub.bases.name_patterns import encode, expand
from krona_hub.errors import UnknownBaseError
from tests.shared import shared

CATALOG = catalog.component_names()
MODULES = 57_747  # layers of all components
INPUTS = ("conv_in", "x_embedder", "patch_embed", "visual_embeddings.in_layer", "encoder_hid_proj", "add_embedding")


LISTS = tuple(name for name in CATALOG if not catalog.component(name).class_name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CATALOG if name not in LISTS])
def test_a_component_is_what_the_library_builds_from_its_configuration(name):
    from krona_hub.bases.meta_device import build, modules_of

    entry = catalog.component(name)
    assert dict(entry.modules) == modules_of(entry.library, entry.class_name, entry.config)
    model = build(entry.library, entry.class_name, entry.config)
    assert sum(p.numel() for p in model.parameters()) == entry.total_parameters


def test_a_component_has_the_published_configuration():
    """The catalog and the reference data hold the same components."""
    configurations = {}
    for path in shared("bases").glob("*.json"):
        data = json.loads(path.read_text())
        configurations[data["base"]] = (data["config"], data["total_parameters"], data["class"])
    ours = {n: (dict(c.config), c.total_parameters, c.class_name) for n in CATALOG for c in [catalog.component(n)]}
    assert configurations == {n: facts for n, facts in ours.items() if n not in LISTS and not n.startswith("tiny-")}


def test_a_model_without_a_class_has_the_published_list_of_modules():
    lists = [json.loads(path.read_text()) for path in shared("bases", "authors-only").glob("*.json")]
    assert {data["base"] for data in lists} == set(LISTS)
    for data in lists:
        entry = catalog.component(data["base"])
        assert dict(entry.modules) == expand(data["modules"])
        assert entry.total_parameters == data["total_parameters"]


def test_the_status_of_a_total_is_that_of_the_reference_data():
    known = json.loads(shared("bases", "checks", "status.json").read_text())
    for name, facts in known["new"].items():
        assert catalog.component(name).total_status == facts["total_status"], name
    assert {catalog.component(name).total_status for name in known["old_now_proven"]} == {"H"}


def test_every_component_belongs_to_a_base_and_every_base_is_whole():
    used = {file for family in FAMILIES.values() for file in family.components.values()}
    assert used == set(CATALOG) and len(CATALOG) == 146
    for name in catalog.names():
        base = catalog.get(name)
        assert set(base.components) <= set(COMPONENTS)
        assert base.denoiser
        assert base.family == base.name == name


def test_aliases_and_hub_ids_lead_to_bases():
    assert set(ALIASES.values()) <= set(FAMILIES)
    assert not set(ALIASES) & set(FAMILIES)
    for name, family in FAMILIES.items():
        assert all(catalog.find(hub_id) == catalog.find(hub_id.upper()) == name for hub_id in family.hub_ids)


def test_statuses_are_known_words():
    for name in CATALOG:
        entry = catalog.component(name)
        assert entry.config_status in catalog.CONFIG_STATUS
        assert entry.total_status in catalog.TOTAL_STATUS
        assert entry.source


def test_the_catalog_is_small():
    bases = files("krona_hub.bases")
    shipped = [f for folder in ("components", "originals") for f in bases.joinpath(folder).iterdir()]
    shipped += [bases.joinpath(name) for name in ("families.json", "index.json")]
    assert sum(len(f.read_bytes()) for f in shipped) < 1_000_000
    assert sum(len(catalog.component(name).modules) for name in CATALOG) == MODULES


def test_a_name_that_is_none_gets_the_nearest():
    with pytest.raises(UnknownBaseError, match="Did you mean 'flux1-dev'"):
        catalog.get("flux1-dve")


def test_a_base_is_known_by_its_shapes():
    """Fingerprints tell all bases apart but those that no file can."""
    by_print: dict[str, list[str]] = {}
    for name in catalog.names():
        by_print.setdefault(catalog.get(name).fingerprint, []).append(name)
    equal = {tuple(names) for names in by_print.values() if len(names) > 1}
    declared = {equals_of(name) for name in catalog.names() if len(equals_of(name)) > 1}
    assert equal == declared | {("sd21-base", "sd21"), ("cosmos-predict2-2b-t2i", "anima")}


def test_a_variant_differs_in_the_layers_of_its_inputs_only():
    for name, family in FAMILIES.items():
        if family.variant_of:
            ours, theirs = (dict(catalog.get(n).layers(catalog.get(n).denoiser)) for n in (name, family.variant_of))
            other = {layer for layer in ours.keys() | theirs.keys() if ours.get(layer) != theirs.get(layer)}
            assert other and all(layer.partition(".")[2].startswith(INPUTS) for layer in other), (name, other)


def test_what_an_adapter_remembers_of_its_base():
    facts = catalog.get("sdxl").model
    assert (facts.family, facts.hub_id) == ("sdxl", "stabilityai/stable-diffusion-xl-base-1.0")
    assert facts.fingerprint == catalog.get("sdxl").fingerprint


words = st.sampled_from(["a", "to_q", "blocks", "net", "2-1", "x1"])
numbers = st.integers(0, 12).map(str)
paths = st.lists(st.one_of(words, numbers), min_size=1, max_size=5).map(".".join)
shapes = st.sampled_from(
    [ModuleSpec((2, 3)), ModuleSpec((2, 3), False), ModuleSpec((4, 1, 3, 3), True, 4), ModuleSpec((4, 2, 1))]
)


@settings(deadline=None)
@given(st.dictionaries(paths, shapes, max_size=40))
def test_patterns_lose_nothing(modules):
    assert expand(encode(modules)) == modules
