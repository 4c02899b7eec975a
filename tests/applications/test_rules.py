"""Every rule of an application refuses what it is for, and nothing else; the tables refer to what exists."""

import pytest

from krona_hub.bases.base import Base
from krona_hub.bases.component import Component
from krona_hub.bases.families import FAMILIES
from krona_hub.bases.module_spec import ModuleSpec, Placement
from krona_hub.checkpoints.header import TensorInfo
from krona_hub.formats.compatibility.applications import APPLICATIONS, ORDER, application_named
from krona_hub.formats.compatibility.module_rules import StoredModule
from krona_hub.formats.compatibility.rules import RULES
from krona_hub.formats.forms.delta_form import LayerFactorization, SumFactorization
from krona_hub.formats.forms.vector_kinds import ALL
from krona_hub.formats.known.registry import FORMATS
from krona_hub.formats.reading.description import ModuleInfo
from krona_hub.kron.shapes import KronShape

UNET = Component({"conv_in": ModuleSpec((8, 4, 3, 3)), "mid_block.resnets.0.conv1": ModuleSpec((8, 8, 3, 3))})
BASE = Base("unet", None, {"unet": UNET, "text_encoder": Component({"a": ModuleSpec((4, 4)), "b": ModuleSpec((4, 4))})})
LORA = SumFactorization(KronShape(1, 1, 64, 48), right_rank=2)
LOKR = SumFactorization(KronShape(4, 4, 16, 12))  # of a weight of 64 x 48, by LyCORIS with factor 4
FACTORED = LOKR._replace(right_rank=2)
ODD = SumFactorization(KronShape(32, 2, 2, 24))


def form(total, shape=(64, 48), dora=None):
    return LayerFactorization(shape, (total,), dora)


def module(total=LORA, layer="unet.x", kind=None, shape=(64, 48), parts=(), scale=1.0, name="x", dora=None, alpha=None):
    """A stored module; `parts` are names, or name -> (dtype, shape)."""
    sizes = parts if isinstance(parts, dict) else dict.fromkeys(parts, ("F32", (2, 2)))
    infos = {part: TensorInfo(dtype, size, 0, 0) for part, (dtype, size) in sizes.items()}
    kind = kind or ("lora" if total.lora_rank is not None else "lokr")
    ranks = total.right_rank if total.right_rank is not None else total.left_rank
    info = ModuleInfo(name, (layer,), kind, shape, (total,), ranks, alpha, scale, dora, 1, 4, ("F32",))
    return StoredModule(info, infos, {part: f"{name}.{part}" for part in infos}, (Placement(layer),))


FORMS = {  # rule -> a factorization that it refuses, one that it does not
    "no-dora": (form(LORA, dora="in"), form(LORA)),
    "no-output-dora": (form(LORA, dora="out"), form(LORA, dora="in")),
    "no-dora-of-one-row": (form(LORA, (1, 48), dora="in"), form(LORA, dora="in")),
    "no-input-dora": (form(LORA, dora="in"), form(LORA, dora="out")),
    "no-lokr-dora": (form(LOKR, dora="in"), form(LORA, dora="in")),
    "linear": (form(LORA, (64, 48, 1, 1)), form(LOKR)),
    "small-kernel": (form(LORA, (64, 16, 3, 1)), form(LORA, (64, 48, 1, 1))),
    "no-conv3d": (form(LORA, (64, 12, 1, 2, 2)), form(LORA, (64, 12, 2, 2))),
    "lycoris-splits": (form(ODD), form(LOKR)),
    "sorted-splits": (form(ODD), form(LOKR)),
    "peft-splits": (form(SumFactorization(KronShape(64, 3, 1, 16))), form(LOKR)),
}
MODULES = {  # rule -> a module that it refuses, one that it does not
    "no-lokr-tucker": (module(FACTORED, parts=("w1", "w2_a", "w2_b", "t2")), module(LORA, parts=("up", "down", "mid"))),
    "no-tucker": (module(LORA, parts=("up", "down", "mid")), module(LORA, parts=("up", "down"))),
    "no-mid": (module(LORA, parts=("up", "down", "mid")), module(FACTORED, parts=("w1", "w2_a", "w2_b", "t2"))),
    "flat-conv3d": (
        module(LOKR, parts={"w2": ("F32", (16, 3, 1, 2, 2))}),
        module(LOKR, parts={"w2": ("F32", (16, 12))}),
    ),
    "deep-conv": (
        module(LOKR, shape=(64, 12, 2, 2), parts={"w2": ("F32", (16, 12))}),
        module(LOKR, shape=(64, 12, 2, 2), parts={"w2": ("F32", (16, 3, 2, 2))}),
    ),
    "lycoris-names": (module(LOKR, "transformer.x", name="transformer.x"), module(LOKR, name="lora_unet_x")),
    "dense-w1": (module(LOKR, parts=("w1_a", "w1_b", "w2")), module(LOKR, parts=("w1", "w2"))),
    "one-dtype": (
        module(LOKR, parts={"w1_a": ("F32", (4, 2)), "w1_b": ("F16", (2, 4))}),
        module(LORA, parts={"up": ("F32", (4, 2)), "down": ("F16", (2, 4))}),
    ),
    "equal-dtypes": (
        module(LORA, parts={"up": ("F32", (4, 2)), "down": ("F16", (2, 4))}),
        module(LOKR, parts={"w1": ("F32", (4, 4)), "w2": ("F16", (2, 4))}),
    ),
    "metadata-alpha": (module(LORA, scale=0.5, parts=("up", "down")), module(LORA, scale=0.5, parts=("up", "alpha"))),
    "no-magnitude": (module(LORA, parts=("up", "magnitude")), module(LORA, parts=("up", "lora_magnitude_vector"))),
    "lost-dora": (module(LORA, parts=("up", "dora_scale")), module(LORA, parts=("up", "magnitude"))),
    "unit-rank": (
        module(LORA._replace(right_rank=1), parts=("up", "down", "alpha")),
        module(LORA, parts=("up", "down", "alpha")),
    ),
    "runtime-lokr": (module(FACTORED, parts=("w1", "w2_a", "w2_b")), module(LOKR, parts=("w1", "w2"))),
    "w1-rank": (
        module(FACTORED._replace(left_rank=3), alpha=2.0, parts=("alpha",)),
        module(FACTORED._replace(left_rank=2), alpha=2.0, parts=("alpha",)),
    ),
    "lokr-alpha": (module(LOKR, parts=("w1", "w2")), module(LORA, parts=("up", "down"))),
    "stored-alpha-needed": (module(LORA, parts=("up", "down")), module(LORA, parts=("up", "down", "alpha"))),
    "unit-scale": (module(LORA, layer="transformer.x", scale=0.5), module(LORA, layer="unet.x", scale=0.5)),
    "even-products": (module(LOKR._replace(left_rank=2)), module(FACTORED._replace(left_rank=2))),
    "whole-kernel": (
        module(SumFactorization(KronShape(4, 9, 16, 12)), shape=(64, 12, 3, 3)),
        module(SumFactorization(KronShape(4, 3, 16, 36)), shape=(64, 12, 3, 3)),
    ),
    "own-magnitude": (
        module(LORA, parts=("up", "lora_magnitude_vector"), name="x"),
        module(LORA, parts=("up", "dora_scale")),
    ),
}
TO_Q = module(layer="transformer.b.attn.to_q", name="q")
QKV = [module(layer=f"transformer.b.attn.to_{x}", name=x) for x in "qkv"]
FILES = {  # rule -> the modules of a file that it refuses, of one that it does not
    "one-rank": ([module(LORA), module(LORA._replace(right_rank=3))], [module(LORA), module(LORA)]),
    "one-kind": ([module(LORA), module(LOKR)], [module(LOKR), module(FACTORED)]),
    "one-dora": ([module(dora="in"), module()], [module(dora="in"), module(dora="in")]),
    "one-lokr-dim": (
        [module(LOKR, alpha=1.0), module(FACTORED, alpha=2.0)],
        [module(FACTORED, alpha=1.0), module(FACTORED, alpha=2.0)],
    ),
    "one-peft-factor": ([module(LOKR), module(ODD)], [module(LOKR), module(FACTORED)]),
    "whole-qkv": ([TO_Q], QKV),
    "whole-fused": ([TO_Q], QKV),
    "whole-text": (
        [module(layer="text_encoder.a")],
        [module(layer="text_encoder.a"), module(layer="text_encoder.b")],
    ),
    "one-spelling": (
        [module(name="lora_unet_input_blocks_1"), module(name="lora_unet_down_blocks_1")],
        [module(name="lora_unet_input_blocks_1"), module(name="lora_unet_middle_block_1")],
    ),
    "denoiser": ([module(layer="text_encoder.a")], [module(layer="text_encoder.a"), module()]),
    "invokeai-probe": (
        [module(FACTORED, layer="unet.attn2.to_k")],
        [module(LOKR, layer="unet.attn2.to_k")],
    ),
}


def test_every_rule_has_an_example():
    assert {*FORMS, *MODULES, *FILES} == RULES.keys()


@pytest.mark.parametrize("name", FORMS)
def test_a_rule_about_a_factorization(name):
    refused, taken = FORMS[name]
    assert RULES[name].form(refused) and RULES[name].form(taken) is None


@pytest.mark.parametrize("name", MODULES)
def test_a_rule_about_a_module(name):
    refused, taken = MODULES[name]
    assert RULES[name].module(refused) and RULES[name].module(taken) is None


@pytest.mark.parametrize("name", FILES)
def test_a_rule_about_a_file(name):
    refused, taken = FILES[name]
    assert RULES[name].file(refused, BASE) and RULES[name].file(taken, BASE) is None


@pytest.mark.parametrize("name", APPLICATIONS)
def test_a_table_refers_to_what_exists(name):
    known = APPLICATIONS[name]
    assert set(known.rules) <= RULES.keys()
    assert set(known.by_base) <= FAMILIES.keys()
    assert sum(len(family.bases) for family in known.families) == len(known.by_base), "a base model in two entries"
    assert {f for f in (known.lora, known.dora, known.lokr) if f} <= {f.name for f in FORMATS if f.writes}
    assert set(known.vectors or ()) <= set(ALL)
    assert known.every_base != bool(known.families)
    for format_name in (known.lora, known.lokr):
        assert format_name is None or known.rejection(format_name) is None


@pytest.mark.parametrize("name", APPLICATIONS)
def test_every_fact_says_how_it_is_known(name):
    known = APPLICATIONS[name]
    for evidence in (known.evidence, *(family.evidence for family in known.families)):
        assert evidence.how in ("run", "read") and evidence.version and evidence.date >= "2024"
    assert known.facts
    for topic, text in known.facts.items():
        assert text.startswith(("run: ", "read: ", "not known")), (topic, text)


def test_the_table_is_complete_and_ordered():
    assert tuple(APPLICATIONS) == ORDER
    names = [*APPLICATIONS, *(alias for known in APPLICATIONS.values() for alias in known.aliases)]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("ComfyUI", "comfyui"),
        ("SwarmUI", "comfyui"),
        ("AUTOMATIC1111", "a1111"),
        ("sd.cpp", "sdcpp"),
        ("sd-scripts", "kohya"),
    ],
)
def test_an_application_has_other_names(text, name):
    assert application_named(text).name == name
