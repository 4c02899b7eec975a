"""LoHa: read as LyCORIS and PEFT compute it, inspected, converted with a true error, merged, attached, combined."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import krona_hub
from krona_hub.bases.base import Base
from krona_hub.bases.module_spec import ModuleSpec
from krona_hub.formats.compatibility.verdicts import loads_in
from krona_hub.formats.forms.normal_forms import lora_of, words_of
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.description import factorization_text
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.writer import write
from krona_hub.kron.hadamard import Hadamard
from tests import tiny
from tests.formats.files_on_disk import TINY, TO_Q, Q, module, peft_folder, rand, save

RANK, ALPHA = 3, 5.0
LAYERS = {
    "linear": lambda: torch.nn.Linear(10, 12),
    "conv": lambda: torch.nn.Conv2d(6, 8, 3, padding=1),
    "conv 1x1": lambda: torch.nn.Conv2d(6, 8, 1),
    "conv1d": lambda: torch.nn.Conv1d(6, 8, 3),
    "grouped conv": lambda: torch.nn.Conv2d(6, 8, 3, groups=2),
}
OPTIONS = {
    "plain": {},
    "tucker": {"use_tucker": True},
    "scalar": {"use_scalar": True},
    "rsLoRA": {"rs_lora": True},
    "tucker, rsLoRA": {"use_tucker": True, "rs_lora": True},
    "rank beyond the sides": {"lora_dim": 5},
}


def trained(layer, dtype=torch.float32, **options):
    """A module of LyCORIS with random numbers, as after training."""
    from lycoris.modules.loha import LohaModule

    made = LohaModule("m", layer, **{"lora_dim": RANK, "alpha": ALPHA} | options)
    generator = torch.Generator().manual_seed(7)
    for parameter in made.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.5).to(dtype)
    return made


def read_alone(made, layer, tmp_path, name="unet.x.conv1"):
    """The file of one LyCORIS module, read for a base that has only this layer."""
    tensors = {f"{name}.{part}": t.detach().contiguous() for part, t in made.custom_state_dict().items()}
    component, _, path = name.partition(".")
    base = Base("one layer", None, {component: {path: ModuleSpec(tuple(layer.weight.shape))}})
    return read(save(tmp_path, tensors), base=base)[name]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", LAYERS)
def test_the_delta_is_that_of_the_forward_pass_of_lycoris(kind, option, tmp_path):
    torch.manual_seed(0)
    layer = LAYERS[kind]()
    made = trained(layer, **OPTIONS[option])
    delta = read_alone(made, layer, tmp_path)
    x = torch.randn(2, 10) if kind == "linear" else torch.randn(2, 6, *(5,) * (layer.weight.ndim - 2))
    want = made.forward(x).detach() - layer(x).detach()
    layer.weight.data, layer.bias = delta.dense(), None
    torch.testing.assert_close(layer(x).detach(), want, rtol=1e-4, atol=1e-5)
    assert want.abs().max() > 0.1


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_half_precision_is_multiplied_in_float32(kind, tmp_path):
    layer = LAYERS[kind]()
    made = trained(layer, torch.bfloat16)
    delta = read_alone(made, layer, tmp_path)
    a, b, c, d = (getattr(made, f"hada_{x}").detach().double() for x in ("w1_a", "w1_b", "w2_a", "w2_b"))
    want = (a @ b) * (c @ d) * (ALPHA / RANK)
    torch.testing.assert_close(delta.dense().double().flatten(1), want, rtol=1e-5, atol=1e-6)
    factor = delta.sums[0].right
    assert isinstance(factor, Hadamard)  # only the tensor that holds the scale is wide
    assert [t.dtype for t in factor.tensors] == [torch.float32, *[torch.bfloat16] * 3]


@pytest.mark.parametrize("on_out", [True, False])
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_a_dora_magnitude_of_lycoris(kind, on_out, tmp_path):
    layer = LAYERS[kind]()
    made = trained(layer, weight_decompose=True, wd_on_out=on_out)
    made.dora_scale.data = made.dora_scale.data.abs() + 0.5
    delta = read_alone(made, layer, tmp_path)
    want = made.apply_weight_decompose(layer.weight + made.get_weight(layer.weight.shape)) - layer.weight
    assert delta.magnitude_axis == ("out" if on_out else "in")
    torch.testing.assert_close(delta.dense(layer.weight.detach()), want.detach(), rtol=1e-4, atol=1e-5)


# --- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effective", [False, True])
def test_a_folder_of_peft(effective, tmp_path):
    from peft import LoHaConfig, get_peft_model

    pipe = tiny.sd15()
    config = LoHaConfig(
        r=RANK, alpha=5, target_modules=["to_q", "conv1"], init_weights=False, use_effective_conv2d=effective,
        rank_pattern={"to_q": 2}, alpha_pattern={"mid_block.resnets.0.conv1": 7},
    )  # fmt: skip
    model = get_peft_model(tiny.sd15().unet, config)
    model.save_pretrained(tmp_path / "peft")
    adapter = read(tmp_path / "peft", base=tiny.save(pipe, tmp_path), component="unet")
    assert adapter.provenance.source_format == "peft-loha"
    modules = {n: m for n, m in model.base_model.model.named_modules() if hasattr(m, "hada_w1_a")}
    assert {f"unet.{n}" for n in modules} == set(adapter)
    for name, peft in modules.items():
        want = peft.get_delta_weight("default").detach()
        torch.testing.assert_close(adapter[f"unet.{name}"].dense(), want, rtol=1e-4, atol=1e-6)


def test_a_configuration_of_another_rank_is_refused(tmp_path):
    q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{q}.hada_w{i}_{side}": t for i in (1, 2) for side, t in (("a", rand(12, 2)), ("b", rand(2, 10)))}
    config = {"peft_type": "LOHA", "r": 4, "alpha": 4}
    with pytest.raises(krona_hub.KronaError, match=r"rank 2.*states 4"):
        read(peft_folder(tmp_path / "p", config, tensors), base=TINY)


# --- a whole adapter -------------------------------------------------------------------------------------------------


def network(pipe, path, dtype=torch.float32, **options):
    """A LyCORIS LoHa of linear layers and convolutions of a U-Net: the file, and layer -> ΔW as LyCORIS computes it."""
    tensors, deltas = {}, {}
    for name, shape in tiny.layers(pipe, "to_q", "to_out.0", "ff.net.0.proj", "conv1").items():
        if not name.startswith("unet.") or "up_blocks" in name:
            continue
        layer = tiny.module_of(pipe, name)
        made = trained(layer, dtype, **options)
        for parameter in made.parameters():
            parameter.data *= 0.5
        own = f"lycoris_{name.partition('.')[2].replace('.', '_')}"
        tensors |= {f"{own}.{part}": t.detach().contiguous() for part, t in made.custom_state_dict().items()}
        deltas[name] = made.double().get_weight(shape).detach()
    save_file(tensors, path, metadata={"ss_network_module": "lycoris.kohya"})
    return path, deltas


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base folder, file, layer -> ΔW)"""
    folder = tmp_path_factory.mktemp("loha")
    pipe = tiny.sd15()
    return tiny.save(pipe, folder), *network(pipe, folder / "loha.safetensors", lora_dim=2)


def error(delta, want):
    return float((delta.dense().double() - want).norm() / want.norm())


def test_it_is_read_and_inspected(made):
    base, path, deltas = made
    adapter, about = read(path, base=base), describe(path, base=base)
    assert (about.format, adapter.provenance.source_format) == ("lycoris-loha", "lycoris-loha")
    assert set(adapter) == set(deltas) and not about.unmatched
    assert all(error(adapter[name], want) < 1e-6 for name, want in deltas.items())
    assert {words_of(d) for d in adapter.values()} == {"LoHa r2"}
    shapes = {m.layers[0]: m for m in about.modules}
    for name, delta in adapter.items():
        out, in_ = delta.matrix_shape
        assert shapes[name].parameters == 4 * (out + in_) == delta.parameters - 1
        assert (shapes[name].kind, shapes[name].rank, shapes[name].scale) == ("loha", 2, 2.5)
        assert factorization_text(shapes[name]) == f"{out}x{in_} r2 ∘ r2"


def test_lycoris_loads_it_and_computes_the_same(made):
    from lycoris import create_lycoris_from_weights

    base, path, _ = made
    verdicts = loads_in(describe(path, base=base))
    assert [name for name, verdict in verdicts.items() if verdict.ok] == ["lycoris"]
    for name in ("comfyui", "forge", "a1111", "onetrainer", "musubi"):  # neither run nor read completely
        assert verdicts[name].answer == "not known" and "LoHa" in verdicts[name].why
    assert {verdicts[name].answer for name in ("diffusers", "kohya", "nunchaku")} == {"no"}
    reference, pipe = tiny.added(tiny.sd15(), read(path, base=base)), tiny.sd15()
    before = tiny.output(pipe.unet)
    network, _ = create_lycoris_from_weights(1.0, str(path), pipe.unet)
    network.apply_to()
    assert float((tiny.output(pipe.unet) - before).abs().max()) > 1e-2
    torch.testing.assert_close(tiny.output(pipe.unet), tiny.output(reference.unet), rtol=1e-4, atol=1e-5)


def test_diffusers_refuses_it(made):
    _, path, _ = made
    with pytest.raises(ValueError, match="lora"):
        tiny.sd15().load_lora_weights(str(path))


CONVERSIONS = {
    "krona": {"to": "krona"},
    "lokr": {"to": "lokr"},
    "lora": {"to": "lora"},
    "for comfyui": {"tool": "comfyui"},
    "for kohya": {"tool": "kohya"},
    "lora, rank": {"to": "lora", "rank": 2, "allow_loss": True},
    "krona, error": {"to": "krona", "max_error": 0.2},
    "krona, budget": {"to": "krona", "budget": "50%", "allow_loss": True},
    "krona, shape": {"to": "krona", "shape": "4x4", "terms": 4, "shape_fallback": "nearest", "allow_loss": True},
    "krona, exact": {"to": "krona", "exact": True},
    "lora, exact": {"to": "lora", "exact": True},
    "locon, exact": {"to": "lycoris-locon", "exact": True},
    "krona, half precision": {"to": "krona", "exact": True, "dtype": "bfloat16"},
}


@pytest.mark.parametrize("case", CONVERSIONS)
def test_a_conversion_reports_its_true_error(case, made, tmp_path):
    base, path, deltas = made
    options = CONVERSIONS[case]
    report = krona_hub.convert(path, tmp_path / "out.safetensors", base=base, **options)
    after = read(report.out, base=base)
    kept = [layer for layer in report.layers if not layer.is_left_out]  # a budget may leave layers out
    assert kept and (len(kept) == len(report.layers) or "budget" in options)
    for layer in kept:
        true = error(after[layer.layer], deltas[layer.layer])
        assert layer.relative_error == pytest.approx(true, rel=1e-3, abs=1e-6)
        assert layer.before == "LoHa r2" and "LoHa" not in layer.after
        assert layer.parameters_before == sum(4 * n for n in after[layer.layer].matrix_shape)
        if "exact" in options and "dtype" not in options:
            assert true < 1e-6
        elif not {"rank", "budget", "shape", "dtype"} & set(options):
            assert 0 < true <= options.get("max_error", 0.05) + 1e-6
    stored = {t.dtype for delta in after.values() for t in delta.tensors}
    assert ("dtype" in options) == (torch.bfloat16 in stored)


def test_an_exact_lora_has_the_square_of_the_rank_or_the_shorter_side(made, tmp_path):
    base, path, _ = made
    report = krona_hub.convert(path, tmp_path / "out.safetensors", base=base, to="lora", exact=True)
    for delta in read(report.out, base=base).values():
        assert delta.sums[0].right.rank <= min(4, *delta.matrix_shape)
    pipe = tiny.sd15()
    high, deltas = network(pipe, tmp_path / "high.safetensors", lora_dim=8)
    report = krona_hub.convert(high, tmp_path / "high_lora.safetensors", base=base, to="lora", exact=True)
    for name, delta in read(report.out, base=base).items():
        assert delta.sums[0].right.rank <= min(64, *delta.matrix_shape)
        assert error(delta, deltas[name]) < 1e-6


def test_a_loha_of_high_rank_becomes_the_best_lora_without_a_search(made, tmp_path):
    base = made[0]
    path, deltas = network(tiny.sd15(), tmp_path / "high.safetensors", lora_dim=5)
    for to in ("krona", "lokr"):
        report = krona_hub.convert(path, tmp_path / to, base=base, to=to)
        after = read(report.out, base=base)
        for layer in report.layers:
            true = error(after[layer.layer], deltas[layer.layer])
            sigma = torch.linalg.svdvals(deltas[layer.layer].flatten(1))
            needed = int((sigma.flip(0).square().cumsum(0).flip(0).sqrt() > 0.05 * sigma.norm()).sum())
            assert layer.relative_error == pytest.approx(true, rel=1e-3, abs=1e-6) and true <= 0.05
            assert lora_of(after[layer.layer]) is None or len(lora_of(after[layer.layer]).down) == needed
            assert "rank 4" in layer.note


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("format", ["krona", "kohya-lora", "lycoris-locon", "lycoris-lokr"])
def test_writing_it_directly_keeps_the_delta(format, rank, made, tmp_path):
    base = made[0]
    path, deltas = network(tiny.sd15(), tmp_path / "loha.safetensors", lora_dim=rank)
    write(read(path, base=base), tmp_path / "out.safetensors", format=format, base=base)
    after = read(tmp_path / "out.safetensors", base=base)
    assert all(error(after[name], want) < 1e-6 for name, want in deltas.items())


def test_a_native_file_stores_the_smaller_of_product_and_matrix(made, tmp_path):
    base = made[0]
    path, _ = network(tiny.sd15(), tmp_path / "loha.safetensors", lora_dim=4)
    write(read(path, base=base), tmp_path / "out.safetensors", format="krona", base=base)
    kinds = set()
    for delta in read(tmp_path / "out.safetensors", base=base).values():
        out, in_ = delta.matrix_shape
        assert delta.parameters == 1 + min(16 * (out + in_), out * in_)
        kinds.add(16 * (out + in_) < out * in_)
    assert kinds == {True, False}


def unet_weights(folder):
    return load_file(next((Path(folder) / "unet").glob("*.safetensors")))


@pytest.mark.parametrize("rank", [2, 8])
@pytest.mark.parametrize("strength", [1.0, -0.6])
def test_merging_adds_the_delta_and_unmerging_takes_it_back(strength, rank, made, tmp_path):
    base = made[0]
    path, deltas = network(tiny.sd15(), tmp_path / "loha.safetensors", lora_dim=rank)
    krona_hub.merge(base, [(path, strength)], tmp_path / "merged")
    weights, merged = (unet_weights(folder) for folder in (base, tmp_path / "merged"))
    for name, delta in deltas.items():
        key = f"{name.partition('.')[2]}.weight"
        want = weights[key].double() + strength * delta
        torch.testing.assert_close(merged[key].double(), want, rtol=0, atol=1e-5)
    krona_hub.merge(tmp_path / "merged", [(path, -strength)], tmp_path / "back")
    back = unet_weights(tmp_path / "back")
    assert all(torch.allclose(back[k], w, rtol=0, atol=1e-5) for k, w in weights.items())


def test_an_attached_loha_computes_what_the_merged_model_computes(made):
    base, path, _ = made
    reference = tiny.added(tiny.sd15(), read(path, base=base))
    pipe = tiny.sd15()
    before = tiny.output(pipe.unet)
    krona_hub.load_into(pipe, path)
    got, want = tiny.output(pipe.unet), tiny.output(reference.unet)
    assert float((got - before).abs().max()) > 1e-2
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_verify_finds_equal_and_different_deltas(made, tmp_path):
    base, path, _ = made
    report = krona_hub.convert(path, tmp_path / "out.safetensors", base=base, to="krona", exact=True)
    assert krona_hub.verify(path, report.out, base=base).same
    other, _ = network(tiny.sd15(), tmp_path / "other.safetensors", lora_dim=3)
    assert not krona_hub.verify(path, other, base=base).same


def test_combining_adds_it_to_other_adapters(made, tmp_path):
    base, path, deltas = made
    other, more = network(tiny.sd15(), tmp_path / "other.safetensors", lora_dim=3)
    krona_hub.combine([(path, 0.5), (other, -2.0)], tmp_path / "sum.safetensors", base=base)
    after = read(tmp_path / "sum.safetensors", base=base)
    assert all(error(after[name], 0.5 * deltas[name] - 2 * more[name]) < 1e-5 for name in deltas)


# --- files of several kinds, and broken ones -------------------------------------------------------------------------

A, B = rand(12, 2), rand(2, 10)
LOHA = {"hada_w1_a": A, "hada_w1_b": B, "hada_w2_a": A + 1, "hada_w2_b": B - 1}
FORMATS = {
    "lycoris-loha": {"lora_up": rand(8, 2), "lora_down": rand(2, 6, 3, 3)},
    "lycoris-lokr": {"lokr_w1": rand(2, 3), "lokr_w2": rand(4, 2, 3, 3)},
}
CONV = "lora_unet_mid_block_resnets_0_conv1"


@pytest.mark.parametrize("format", FORMATS)
def test_other_kinds_in_one_file_are_read_too(format, tmp_path):
    path = save(tmp_path, module(Q, **LOHA) | module(CONV, **FORMATS[format]))
    adapter = read(path, base=TINY)
    assert adapter.provenance.source_format == format and len(adapter) == 2
    verdicts = loads_in(describe(path, base=TINY))
    assert all("LoHa" in verdicts[name].why for name in ("comfyui", "forge", "a1111"))
    torch.testing.assert_close(adapter[TO_Q].dense(), (A @ B) * ((A + 1) @ (B - 1)))


BROKEN = {
    "a missing tensor": {"hada_w2_b": None},
    "one core of two": {"hada_t1": rand(2, 2, 1, 1)},
    "a core of another rank": {"hada_t1": rand(3, 3, 1, 1), "hada_t2": rand(3, 3, 1, 1)},
    "products of two shapes": {"hada_w2_a": rand(9, 2)},
    "products of two ranks": {"hada_w2_a": rand(12, 3), "hada_w2_b": rand(3, 10)},
    "halves of two ranks": {"hada_w1_a": rand(12, 3)},
    "a vector": {"hada_w1_b": rand(10)},
    "an empty tensor": {"hada_w1_a": rand(12, 0), "hada_w1_b": rand(0, 10)},
    "not a number": {"hada_w1_a": A.clone().fill_(float("nan"))},
    "integers": {"hada_w1_a": A.int()},
    "an infinite alpha": {"alpha": torch.tensor(float("inf"))},
    "an alpha that overflows": {"alpha": torch.tensor(9e7), "hada_w1_a": torch.full((12, 2), 3e38)},
    "two kinds": {"lora_up": rand(12, 2), "lora_down": rand(2, 10)},
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_module_is_an_error_with_its_name(case, tmp_path):
    parts = {name: t for name, t in (LOHA | BROKEN[case]).items() if t is not None}
    path = save(tmp_path, module(Q, **parts))
    with pytest.raises(krona_hub.KronaError) as caught:
        read(path, base=TINY)
    assert Q in str(caught.value) and caught.value.fix
