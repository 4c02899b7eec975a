"""Broken adapters: each gives its coded error, with the module, and never a traceback."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from krona_hub.bases.loading import load_base
from krona_hub.errors import (
    AmbiguousError,
    ConflictError,
    DtypeError,
    FormatError,
    IncompleteError,
    KronaError,
    NonFiniteError,
    ScaleError,
    ShapeError,
)
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.reader import read
from tests.formats.files_on_disk import TINY, TO_Q, Q, module, peft_folder, rand, save
from tests.formats.test_golden_files import SAMPLES
from tests.shared import shared

UP, DOWN = rand(12, 2), rand(2, 10)
LORA = {"lora_up": UP, "lora_down": DOWN}
FULL = {"lokr_w1": rand(3, 2), "lokr_w2": rand(4, 5)}


def alpha(value, dtype=torch.float32):
    return {"alpha": torch.tensor(value, dtype=dtype)}


BAD = {
    "missing down": (module(Q, lora_up=UP), IncompleteError),
    "missing w2_b": (module(Q, lokr_w1=FULL["lokr_w1"], lokr_w2_a=rand(4, 2)), IncompleteError),
    "missing w1": (module(Q, lokr_w2=FULL["lokr_w2"], lokr_w1_b=rand(2, 2)), IncompleteError),
    "w2 whole and factored": (module(Q, **FULL, lokr_w2_a=rand(4, 2)), IncompleteError),
    "alpha alone": (module(Q, **LORA) | {"other.alpha": torch.tensor(1.0)}, IncompleteError),
    "unknown key": (module(Q, **LORA) | {"something.else": rand(2)}, IncompleteError),
    "two kinds in one module": (module(Q, **LORA, **FULL), IncompleteError),
    "two spellings of one half": (module(Q, **LORA) | {f"{Q}.lora_A.weight": DOWN.clone()}, ConflictError),
    "unequal ranks": (module(Q, lora_up=UP, lora_down=rand(3, 10)), ShapeError),
    "a vector for a matrix": (module(Q, lora_up=UP, lora_down=rand(10)), ShapeError),
    "an empty tensor": (module(Q, lora_up=torch.zeros(12, 0), lora_down=torch.zeros(0, 10)), ShapeError),
    "an alpha of two numbers": (module(Q, **LORA, alpha=torch.ones(2)), ShapeError),
    "a core that joins nothing": (module(Q, **LORA, lora_mid=rand(3, 3, 1, 1)), ShapeError),
    "NaN": (
        module(Q, lora_up=UP, lora_down=DOWN.clone().index_fill_(0, torch.tensor(0), float("nan"))),
        NonFiniteError,
    ),
    "infinity": (module(Q, lokr_w1=FULL["lokr_w1"] / 0, lokr_w2=FULL["lokr_w2"]), NonFiniteError),
    "integers": (module(Q, lora_up=UP.int(), lora_down=DOWN), DtypeError),
    "fp8 of other hardware": (module(Q, lora_up=UP.to(torch.float8_e4m3fnuz), lora_down=DOWN), DtypeError),
    "an integer alpha": (module(Q, **LORA, **alpha(4, torch.int64)), DtypeError),
    "alpha infinite": (module(Q, **LORA, **alpha(float("inf"))), ScaleError),
    "alpha not a number": (module(Q, **LORA, **alpha(float("nan"))), ScaleError),
    "alpha a placeholder": (module(Q, **LORA, **alpha(9999999999.0)), ScaleError),
    "a dora_scale of one number": (module(Q, **LORA, dora_scale=rand(1, 1)), AmbiguousError),
    "a dora_scale of one dimension": (module(Q, **LORA, dora_scale=rand(12)), AmbiguousError),
    "a dora_scale of another layer": (module(Q, **LORA, dora_scale=rand(7, 1)), ShapeError),
    "a dora_scale of other inputs": (module(Q, **LORA, dora_scale=rand(1, 7)), ShapeError),
}


@pytest.mark.parametrize("case", BAD)
def test_a_broken_module_gives_its_coded_error_and_its_name(tmp_path, case):
    tensors, error = BAD[case]
    path = save(tmp_path, tensors)
    before = path.read_bytes()
    with pytest.raises(error) as caught:
        read(path, base=TINY)
    message = str(caught.value)
    assert caught.value.fix and str(path) in message and (Q in message or "other" in message or "something" in message)
    assert path.read_bytes() == before


@pytest.mark.parametrize("value", [100000.0, 9999999999.0, float("inf"), float("nan")])
def test_an_alpha_that_no_scale_uses_does_no_harm(tmp_path, value):
    adapter = read(save(tmp_path, module(Q, **FULL, **alpha(value))), base=TINY)
    assert torch.equal(adapter[TO_Q].dense(), torch.kron(FULL["lokr_w1"], FULL["lokr_w2"]))


def test_inspect_warns_of_a_placeholder_alpha(tmp_path):
    about = describe(save(tmp_path, module(Q, **FULL, **alpha(9999999999.0))), base=TINY)
    assert any("alpha 1e+10 ignored" in warning for warning in about.warnings)


def test_inspect_describes_what_read_refuses(tmp_path):
    broken = module(Q, **LORA) | module("lora_unet_mid_block_attentions_0_proj_in", lora_up=rand(10, 2))
    about = describe(save(tmp_path, broken), base=TINY)
    assert len(about.modules) == 1 and "Missing 'down'" in about.unmatched["lora_unet_mid_block_attentions_0_proj_in"]


@pytest.mark.parametrize("config", ["[]", "{", '{"peft_type": 3}', '{"peft_type": "LORA", "r": "x"}', "\x00"])
def test_a_broken_configuration_is_a_coded_error(tmp_path, config):
    q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    folder = peft_folder(tmp_path / "p", {}, {f"{q}.lora_A.weight": DOWN, f"{q}.lora_B.weight": UP})
    (folder / "adapter_config.json").write_text(config)
    with pytest.raises(FormatError):
        read(folder, base=TINY)


@pytest.mark.parametrize("bad", [{"r": 0}, {"r": 1.5}, {"lora_alpha": 1e10}, {"alpha_pattern": {"to_q": None}}])
def test_a_configuration_without_a_usable_scale_is_refused(tmp_path, bad):
    q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{q}.lora_A.weight": DOWN, f"{q}.lora_B.weight": UP}
    folder = peft_folder(tmp_path / "p", {"peft_type": "LORA", "r": 2, "lora_alpha": 2} | bad, tensors)
    with pytest.raises(ScaleError):
        read(folder, base=TINY)


def test_a_pattern_that_is_no_regular_expression_is_named(tmp_path):
    q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{q}.lora_A.weight": DOWN, f"{q}.lora_B.weight": UP}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {"(": 4}}
    with pytest.raises(FormatError, match=r"'\('"):
        read(peft_folder(tmp_path / "p", config, tensors), base=TINY)


# --- fuzz: whatever is done to a real file, reading it raises a KronaError or succeeds -------------------------------

DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn)
TAILS = ("alpha", "lokr_w1", "lokr_w2_b", "lora_up.weight", "dora_scale", "diff", "x", "lora_A.weight", "hada_w1_a")
MUTATIONS = {  # (tensor, a number from 0 to 6) -> tensor
    "reshape": lambda t, n: t.flatten()[None] if n % 2 else t.flatten(),
    "cut": lambda t, n: t.narrow(0, 0, min(n, len(t))) if t.ndim else t,
    "transpose": lambda t, n: t.transpose(0, -1) if t.ndim > 1 else t,
    "deepen": lambda t, n: t[(..., *[None] * (1 + n % 3))],
    "cast": lambda t, n: t.to(DTYPES[n]),
    "fill": lambda t, n: torch.full_like(t.float(), (0.0, float("nan"), float("inf"), 1e10, -3.0, 1e38, 1e-40)[n]),
}
NAMES = {  # (key, a number from 0 to 8) -> key
    "tail": lambda key, n: f"{key.rpartition('.')[0]}.{TAILS[n]}",
    "longer": lambda key, n: f"{key}.{TAILS[n]}",
    "peft": lambda key, n: f"base_model.model.{key}",
    "bare": lambda key, n: TAILS[n],
    "position": lambda key, n: f"unet:{n}:up",
}
STEPS = st.tuples(st.integers(0, 199), st.sampled_from(("drop", *MUTATIONS, *NAMES)), st.integers(0, 6))


def damaged(tensors, steps):
    """A copy of the tensors after each (which, how, how much)."""
    tensors = dict(tensors)
    for which, how, n in steps:
        key = sorted(tensors)[which % len(tensors)]
        if how in MUTATIONS:
            tensors[key] = MUTATIONS[how](tensors[key], n)
        elif how in NAMES:
            tensors[NAMES[how](key, n)] = tensors.pop(key)
        elif len(tensors) > 1:
            del tensors[key]
    return tensors


CONFIGS = st.fixed_dictionaries(
    {},
    optional={
        "r": st.sampled_from((0, -1, 2, 2.5, "4", None, 10**400)),
        "alpha": st.sampled_from((0, float("inf"), 1e11, [], 3)),
        "lora_alpha": st.sampled_from((0, float("nan"), -1, "x", 5)),
        "rank_pattern": st.sampled_from(({"(": 1}, {"to_q": 0}, [], {".*": 3})),
        "peft_type": st.sampled_from(("LORA", "LOKR", "LOHA", 7)),
        "auto_mapping": st.sampled_from((None, 3, {"base_model_class": 4})),
    },
)


@pytest.fixture(scope="module")
def golden_base():
    return load_base(shared("golden", "base"))


@pytest.mark.slow
@pytest.mark.parametrize("sample", SAMPLES[::2], ids=lambda s: s["name"])
def test_a_damaged_file_reads_or_raises_a_coded_error(sample, golden_base, tmp_path):
    source = shared("golden", sample["adapter"])
    folder = source.is_dir()
    tensors = load_file(source / "adapter_model.safetensors" if folder else source)
    config = json.loads((source / "adapter_config.json").read_text()) if folder else {}
    target = tmp_path / "adapter_model.safetensors" if folder else tmp_path / "x.safetensors"

    @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(STEPS, min_size=1, max_size=3), CONFIGS, st.booleans(), st.booleans())
    def attack(steps, changes, known, allow_missing):
        base = golden_base if known else None
        files = {name: t.contiguous() for name, t in damaged(tensors, steps).items()}
        save_file(files, target, {"lora_adapter_metadata": json.dumps(changes)})
        if folder:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
        for attempt in (describe, read):
            try:
                attempt(tmp_path if folder else target, base=base)
            except KronaError as error:
                assert error.cause and error.fix
        try:
            read(tmp_path if folder else target, base=base, allow_missing=allow_missing)
        except KronaError as error:
            assert "\n" not in str(error)

    attack()
