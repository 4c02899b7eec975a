"""A file of a base model that nobody knows yet: converted, combined and described under its own names."""

import json
from math import prod

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from krona_hub.adapters.unknown_base import KEPT_NAMES, UNKNOWN
from krona_hub.cli.main import main
from krona_hub.combining import combine
from krona_hub.conversion import convert
from krona_hub.errors import BaseMismatchError, UnknownBaseError
from krona_hub.formats.compatibility.applications import APPLICATIONS
from krona_hub.formats.compatibility.verdicts import UNKNOWN_BASE, loads_in
from krona_hub.formats.parsing.keys import split_key
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.reader import read
from krona_hub.verification import validate

SHAPES = {
    "fancy.0.attn.q": (24, 16),
    "fancy.0.attn.to_out": (16, 24),
    "fancy.1.ff.up": (24, 10),
    "stem.conv": (6, 4, 3, 3),
}
SPLITS = {"fancy.0.attn.q": (3, 2), "fancy.0.attn.to_out": (2, 4), "fancy.1.ff.up": (4, 5), "stem.conv": (2, 2)}
PREFIXES = ("lora_unet_", "lycoris_", "diffusion_model.", "transformer.", "unet.", "base_model.model.", "net.", "")


def named(prefix: str, path: str) -> str:
    return prefix + (path.replace(".", "_") if prefix.endswith("_") else path)


def rand(*shape, dtype=torch.float32):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape))) * 0.2).to(dtype)


def lokr(path, prefix="", dtype=torch.float32, alpha=3.0):
    """A LoKr with w2 in two factors of rank 2 and alpha 3; module -> dense delta."""
    tensors, deltas = {}, {}
    for module, (out, cols, *kernel) in SHAPES.items():
        a1, a2 = SPLITS[module]
        w1, up = rand(a1, a2, dtype=dtype), rand(out // a1, 2, dtype=dtype)
        down = rand(2, cols // a2 * prod(kernel), dtype=dtype)
        name = named(prefix, module)
        if kernel:
            parts = {"lokr_w1": w1, "lokr_w2": (up @ down).reshape(out // a1, cols // a2, *kernel)}
            scale = 1.0  # both factors are full
            w2 = parts["lokr_w2"].double().reshape(out // a1, -1)
        else:
            parts, scale = {"lokr_w1": w1, "lokr_w2_a": up, "lokr_w2_b": down}, alpha / 2
            w2 = up.double() @ down.double()
        w2 = w2.reshape(out // a1, cols // a2, -1)
        dense = torch.einsum("ij,klm->ikjlm", w1.double(), w2).reshape(out, cols, *kernel)
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
        deltas[name] = scale * dense
    save_file(tensors, path)
    return deltas


def lora(path, prefix="", parts=("lora_down.weight", "lora_up.weight"), alpha=3.0, dtype=torch.float32):
    tensors, deltas = {}, {}
    for module, (out, cols, *kernel) in SHAPES.items():
        name, rank = named(prefix, module), 2
        down, up = rand(rank, cols, *kernel, dtype=dtype), rand(out, rank, *(1 for _ in kernel), dtype=dtype)
        tensors |= {f"{name}.{parts[0]}": down, f"{name}.{parts[1]}": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        flat = up.double().reshape(out, rank) @ down.double().reshape(rank, -1)
        deltas[name] = alpha / rank * flat.reshape(out, cols, *kernel)
    save_file(tensors, path)
    return deltas


def modules_of(path, *, peft=False):
    with safe_open(path, "pt") as file:
        return {split_key(key, peft)[0] for key in file.keys()}  # noqa: SIM118


def assert_deltas(path, deltas, tolerance=1e-5, *, component=None):
    """Compare a file with the dense oracle by the names of its modules."""
    adapter = read(path, component=component)
    assert len(adapter) == len(deltas)
    for name, dense in deltas.items():
        layer = name if name in adapter else f"{UNKNOWN}.{name}"
        found = adapter[layer].dense().double().reshape(dense.shape)  # a LoKr with a factored w2 has no kernel shape
        torch.testing.assert_close(found, dense, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("to", ["lora", "lycoris-locon", "diffusers-lora"])
def test_a_lokr_becomes_a_lora_with_the_same_delta_under_its_own_names(prefix, to, tmp_path):
    deltas = lokr(tmp_path / "a.safetensors", prefix)
    report = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=to, exact=True)
    assert report.relative_error < 1e-6 and report.notes.count(KEPT_NAMES) == 1
    assert modules_of(report.out) == deltas.keys()
    assert_deltas(report.out, deltas)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("parts", [("lora_down.weight", "lora_up.weight"), ("lora_A.weight", "lora_B.weight")])
def test_a_lora_becomes_kronecker_native_and_lora_with_other_parts(prefix, parts, tmp_path):
    deltas = lora(tmp_path / "a.safetensors", prefix, parts)
    for to, method in (("lokr", {"exact": True}), ("lora", {}), ("diffusers-lora", {}), ("krona", {"exact": True})):
        report = convert(tmp_path / "a.safetensors", tmp_path / f"{to}.safetensors", to=to, **method)
        assert report.relative_error < 1e-6
        assert_deltas(report.out, deltas)
        if to != "krona":
            assert modules_of(report.out) == deltas.keys()
    options = {"shape": "2x2", "terms": 4}  # as many terms as 2x2 can need
    assert_deltas(convert(tmp_path / "a.safetensors", tmp_path / "s.safetensors", **options).out, deltas)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_round_trip_through_the_native_format_gives_the_very_keys(prefix, tmp_path):
    deltas = lokr(tmp_path / "a.safetensors", prefix)
    native = convert(tmp_path / "a.safetensors", tmp_path / "n.safetensors", to="krona", exact=True).out
    back = convert(native, tmp_path / "b.safetensors", to="lokr", exact=True).out
    assert load_file(back).keys() == load_file(tmp_path / "a.safetensors").keys()
    assert_deltas(back, deltas)
    with safe_open(native, "pt") as file:
        assert file.metadata()["modelspec.architecture"] == "unknown/krona"
        assert json.loads(file.metadata()["krona.header"]).get("base") is None
    with safe_open(back, "pt") as file:
        assert not {"modelspec.architecture", "ss_base_model_version"} & file.metadata().keys()


@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model.", "transformer.", "base_model.model.", ""])
def test_a_peft_folder_holds_the_names_in_its_wrapper(prefix, tmp_path):
    deltas = lora(tmp_path / "a.safetensors", prefix)
    folder = convert(tmp_path / "a.safetensors", tmp_path / "folder", to="peft-lora").out
    inside = {name.removeprefix("base_model.model.").removeprefix("transformer."): d for name, d in deltas.items()}
    found = modules_of(folder / "adapter_model.safetensors")
    assert found == {f"base_model.model.{name}" for name in inside}
    assert_deltas(folder, inside)
    again = convert(folder, tmp_path / "c.safetensors", to="lora").out
    assert modules_of(again) == inside.keys()
    assert_deltas(again, inside)


def test_a_peft_lokr_needs_one_factor_for_all_layers_and_no_base(tmp_path):
    names = ("fancy.0.q", "fancy.1.q")
    tensors = {f"{n}.lokr_w1": rand(2, 2) for n in names} | {f"{n}.lokr_w2": rand(6, 4) for n in names}
    save_file(tensors, tmp_path / "a.safetensors")
    folder = convert(tmp_path / "a.safetensors", tmp_path / "folder", to="peft-lokr").out
    assert_deltas(folder, {n: torch.kron(tensors[f"{n}.lokr_w1"], tensors[f"{n}.lokr_w2"]).double() for n in names})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("to", ["lokr", "krona"])
def test_the_dtype_changes_without_a_base(dtype, to, tmp_path):
    deltas = lokr(tmp_path / "a.safetensors", "lora_unet_", torch.bfloat16)
    out = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to=to, dtype=dtype).out
    assert {t.dtype for k, t in load_file(out).items() if not k.endswith("alpha")} == {getattr(torch, dtype)}
    assert_deltas(out, deltas, 2e-2)


@pytest.mark.parametrize("to", ["krona", "lora"])
def test_two_adapters_of_an_unknown_base_are_added(to, tmp_path):
    one = lora(tmp_path / "a.safetensors", "lora_unet_")
    two = lora(tmp_path / "b.safetensors", "lora_unet_", alpha=5.0)
    pairs = [(tmp_path / "a.safetensors", 0.7), (tmp_path / "b.safetensors", -0.3)]
    report = combine(pairs, tmp_path / "c.safetensors", to=to)
    assert KEPT_NAMES in report.notes
    assert_deltas(report.out, {name: 0.7 * one[name] - 0.3 * two[name] for name in one})


def test_adapters_of_a_known_and_of_an_unknown_base_are_not_added(tmp_path):
    lora(tmp_path / "a.safetensors", "lora_unet_")
    known = "krona_hub/assets/zorbi_lora_kohya.safetensors"
    with pytest.raises(BaseMismatchError, match="unknown"):
        combine([(tmp_path / "a.safetensors", 1.0), (known, 1.0)])


def test_vectors_of_an_unknown_base_keep_their_names(tmp_path):
    lora(tmp_path / "a.safetensors", "lora_unet_")
    tensors = load_file(tmp_path / "a.safetensors")
    vectors = {"lora_unet_fancy_0_norm.w_norm": rand(5), "lora_unet_fancy_0_norm.b_norm": rand(5)}
    vectors |= {"lora_unet_fancy_0_attn_q.diff_b": rand(24)}
    save_file(tensors | vectors, tmp_path / "a.safetensors")
    native = convert(tmp_path / "a.safetensors", tmp_path / "n.safetensors", to="krona", exact=True).out
    back = load_file(convert(native, tmp_path / "b.safetensors", to="lycoris-locon", exact=True).out)
    assert all(torch.equal(back[key], vector) for key, vector in vectors.items())
    save_file(vectors, tmp_path / "only.safetensors")
    convert(tmp_path / "only.safetensors", tmp_path / "o.safetensors", to="krona")
    assert len(read(tmp_path / "o.safetensors").vectors) == 3


def test_an_application_is_a_claim_that_needs_the_base(tmp_path):
    lora(tmp_path / "a.safetensors", "lora_unet_")
    for tool in APPLICATIONS:
        with pytest.raises(UnknownBaseError, match=r"base model.*unknown.*--base"):
            convert(tmp_path / "a.safetensors", tmp_path / "x", tool=tool)
    assert not (tmp_path / "x").exists()
    verdicts = loads_in(describe(tmp_path / "a.safetensors"))
    assert not any(v.ok for v in verdicts.values()) and verdicts["comfyui"].why == UNKNOWN_BASE


def test_a_file_of_an_unknown_base_is_valid_and_described(tmp_path):
    deltas = lokr(tmp_path / "a.safetensors", "lora_unet_")
    about = describe(tmp_path / "a.safetensors")
    assert about.base is None and KEPT_NAMES in about.warnings
    assert {m.layers for m in about.modules} == {(f"{UNKNOWN}.{name}",) for name in deltas}
    assert validate(tmp_path / "a.safetensors").valid
    native = convert(tmp_path / "a.safetensors", tmp_path / "n.safetensors", to="krona", exact=True).out
    assert validate(native).findings == () and KEPT_NAMES in describe(native).warnings


def test_the_commands_say_that_the_base_is_unknown(tmp_path, capsys):
    lokr(tmp_path / "a.safetensors", "diffusion_model.")
    path, out = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    assert main(["inspect", path]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert KEPT_NAMES in shown and "loads in not known" in shown and "base model unknown" in shown
    assert main(["inspect", path, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["base"] is None and document["modules"][0]["layers"][0].startswith("unknown.diffusion_model.")
    assert not any(verdict["ok"] for verdict in document["loads_in"].values())
    assert main(["convert", path, "--to", "lora", "--exact", "-o", out]) == 0
    assert KEPT_NAMES in " ".join(capsys.readouterr().out.split())
    assert main(["params", out]) == 0
    assert main(["convert", path, "--for", "comfyui", "-o", str(tmp_path / "c.safetensors")]) == 2
    assert "KH161" in capsys.readouterr().err


def test_a_dora_of_an_unknown_base_asks_for_it_only_where_its_weights_are_needed(tmp_path):
    lora(tmp_path / "a.safetensors", "lora_unet_")
    tensors = load_file(tmp_path / "a.safetensors")
    tensors["lora_unet_fancy_0_attn_q.dora_scale"] = torch.ones(24, 1)
    save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="lycoris-locon")
    with pytest.raises(UnknownBaseError, match="--base"):
        convert(tmp_path / "a.safetensors", tmp_path / "c.safetensors", to="lora", rank=2)


def test_diffusekrona_of_an_unknown_base_keeps_its_names(tmp_path):
    name = "fancy.0.attn1.to_q"
    tensors = {f"{name}_lora.down.weight": rand(2, 4), f"{name}_lora.up.weight": rand(6, 3)}
    save_file(tensors, tmp_path / "a.safetensors")
    before = read(tmp_path / "a.safetensors", format="diffusekrona")
    out = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusekrona").out
    assert load_file(out).keys() == tensors.keys()
    after = read(out, format="diffusekrona")
    torch.testing.assert_close(after[f"unknown.{name}"].dense(), before[f"unknown.{name}"].dense())
