"""Which base an adapter fits: the right one first, ties where nothing can tell, and quickly."""

import re

import pytest

from krona_hub.bases import catalog, detection, name_table
from krona_hub.bases.families import FAMILIES, equals_of
from krona_hub.bases.metadata_hints import bases_named
from tests.bases.every_base import every_base

KQVO = r"\.attn\.to_(q|k|v|out\.0)$"


def modules_of(base: str, pattern: str, dialect: str, component: str | None = None, shapes: bool = True) -> dict:
    """The modules of an adapter of `base` on the layers that `pattern` finds."""
    source, found = catalog.get(base), {}
    table = name_table.table(source)
    for layer, module in source.layers(component or source.denoiser):
        if re.search(pattern, layer):
            spelled = table.spell(layer, dialect)
            places = table.find(spelled, layer.partition(".")[0])
            shape = module.shape if places[0].plain else detection.stored_matrix(source, places)
            found[spelled] = shape if shapes else None
    return found


def best(modules, metadata=None) -> list[str]:
    return [c.base for c in detection.ties(detection.candidates(modules, metadata))]


def told(modules) -> tuple[str, set[str]]:
    """The first candidate, and every base model that the answer says it may be instead."""
    tied = detection.ties(detection.candidates(modules))
    return tied[0].base, {name for c in tied for name in (*c.names, *c.variants)}


SPELLED = [  # the others take long
    "kohya-ldm",
    *(pytest.param(d, marks=pytest.mark.slow) for d in ("diffusers", "kohya", "original", "peft")),
]
ATTENTION = r"(attn|attention|Attention|attn1|attn2)\b|attn_qkv|attn_proj"
NUMBER = re.compile(r"(?<=[._])\d+(?=[._])")


def tenth(modules: dict) -> dict:
    """Of every kind of block, each tenth."""
    return {name: s for name, s in modules.items() if not (found := NUMBER.search(name)) or found[0][-1] == "0"}


# base models that a file of all layers leaves in doubt, besides the same layers and variants
DOUBT = {
    "sd21": {"sd21-base"},
    "sd21-base": {"sd21"},
    "anima": {"cosmos-predict2-2b-t2i"},
    "cosmos-predict2-2b-t2i": {"anima"},
}


@pytest.mark.parametrize("dialect", SPELLED)
@pytest.mark.parametrize("base", every_base())
def test_a_whole_denoiser_is_recognised_in_every_dialect(base, dialect):
    """The right base is the first, or one of those that the answer cannot tell apart."""
    found = detection.candidates(modules_of(base, "", dialect))
    first, others = told(modules_of(base, "", dialect))
    variants = {name for name, family in FAMILIES.items() if family.variant_of == first}
    assert base in others
    assert others <= {*equals_of(base), *variants, *DOUBT.get(base, ())}
    assert found[0].score == 1 and found[0].complete and found[0].whole
    assert found[0].component == catalog.get(base).denoiser


@pytest.mark.parametrize(
    "dialect", ["diffusers", *(pytest.param(d, marks=pytest.mark.slow) for d in ("kohya-ldm", "original"))]
)
@pytest.mark.parametrize("base", every_base())
def test_a_part_of_a_denoiser_is_recognised_or_told_to_be_in_doubt(base, dialect):
    whole = modules_of(base, "", dialect)
    attention = {name: shape for name, shape in whole.items() if re.search(ATTENTION, name)}
    for part in (attention, tenth(whole), tenth(attention)):
        if part:
            first, others = told(part)
            assert base in others, (len(part), first)


@pytest.mark.parametrize(
    ("base", "pattern", "ties"),
    [
        ("flux1-dev", KQVO, ["flux1-dev", "flux1-schnell", "chroma"]),  # HunyuanVideo has the names, too many of them
        ("sd15", "attn1", ["sd15", "sd21-base", "sd21"]),
        ("sd15", "attn", ["sd15"]),
        ("sd3-medium", KQVO, ["sd3-medium", "sd35-medium"]),
        ("sdxl", "attn2.to_k", ["sdxl"]),
    ],
)
def test_what_no_name_can_tell_apart_ties(base, pattern, ties):
    assert best(modules_of(base, pattern, "diffusers")) == ties


def test_metadata_decide_between_ties_and_are_not_believed_against_names():
    flux = modules_of("flux1-dev", KQVO, "kohya")
    assert detection.settled(detection.candidates(flux)) is None
    assert (
        detection.settled(detection.candidates(flux, {"modelspec.architecture": "flux-1-dev/lora"})).base == "flux1-dev"
    )
    assert (
        detection.settled(detection.candidates(flux, {"base_model_name_or_path": "lodestones/Chroma1-HD"})).base
        == "chroma"
    )
    assert detection.settled(detection.candidates(flux, {"ss_base_model_version": "flux1"})) is None  # dev or schnell
    sdxl = modules_of("sdxl", "attn", "kohya")
    assert detection.settled(detection.candidates(sdxl, {"ss_base_model_version": "sd_v1"})).base == "sdxl"


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"ss_base_model_version": "sd_v2_768_v"}, {"sd21"}),
        ({"ss_base_model_version": "sd_v2"}, {"sd21-base"}),
        ({"modelspec.architecture": "stable-diffusion-xl-v1-base/lora"}, {"sdxl"}),
        ({"ss_sd_model_name": "stabilityai/stable-diffusion-2-1"}, {"sd21"}),
        ({"lora_adapter_metadata": '{"unet.base_model_name_or_path": "stabilityai/stable-diffusion-2-1"}'}, {"sd21"}),
        ({"lora_adapter_metadata": "not json"}, set()),
        ({"lora_adapter_metadata": "[1]"}, set()),
        ({"ss_base_model_version": "something new"}, set()),
        ({}, set()),
    ],
)
def test_the_words_of_trainers(metadata, expected):
    assert bases_named(metadata) == expected


def test_a_text_encoder_without_a_prefix_is_offered_with_its_component():
    """SDXL's two encoders share their names; the shapes tell them apart."""
    found = detection.candidates(modules_of("sdxl", "encoder", "peft", "text_encoder_2"))
    ours = {c.component for c in found if c.base == "sdxl" and c.score == 1}
    assert ours == {"text_encoder_2"}
    blind = detection.candidates(modules_of("sdxl", r"layers\.[0-9]\.", "peft", "text_encoder", shapes=False))
    assert {c.component for c in blind if c.base == "sdxl"} == {"text_encoder", "text_encoder_2"}


def test_two_components_in_one_file_are_one_candidate():
    both = modules_of("sdxl", "attn", "kohya", "unet") | modules_of("sdxl", "mlp", "kohya", "text_encoder")
    found = detection.candidates(both)
    assert (found[0].base, found[0].component, found[0].score) == ("sdxl", None, 1)


def test_shapes_decide_where_names_do_not_and_kernels_may_be_flat():
    modules = modules_of("sd15", r"resnets.*conv1$", "kohya")
    flat = {name: (shape[0], shape[1] * 9) for name, shape in modules.items()}
    assert best(modules) == best(flat)
    wrong = dict.fromkeys(modules, (7, 7))
    assert detection.candidates(wrong) == ()


def test_one_base_can_be_asked_alone():
    base = catalog.get("sdxl")
    (only,) = detection.fit(base, modules_of("sdxl", "attn", "kohya"))
    assert only.score == 1
    assert detection.fit(base, {"lora_unet_nothing": None}) == ()


def test_nothing_fits_nothing():
    assert detection.candidates({}) == ()
    assert detection.candidates({"model.layers.0.mystery": (3, 4)}) == ()
    assert detection.settled(()) is None


@pytest.mark.parametrize(("base", "dialect"), [("sdxl", "kohya-ldm"), ("flux1-dev", "peft"), ("hidream-i1", "kohya")])
def test_few_bases_are_compared_name_by_name(base, dialect, monkeypatch):
    compared = []
    score = detection._score
    monkeypatch.setattr(detection, "_score", lambda base, *rest: compared.append(base.name) or score(base, *rest))
    detection.candidates(modules_of(base, "", dialect))
    assert base in compared
    assert len(compared) == len(set(compared)) <= len(catalog.names()) / 3, "a few names rule the others out"
