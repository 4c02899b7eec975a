"""verify(A, B): equal deltas are called equal whatever their formats, and every difference is found and measured."""

import itertools
import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.checkpoints.header import read_header
from krona_hub.conversion import convert
from krona_hub.errors import InexpressibleError, KronaError, NotFoundError, UnknownBaseError, UsageError
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.writer import write
from krona_hub.kron.terms import KronTerms, as_lora
from krona_hub.verification import verify
from tests.shared import SHARED, shared

INDEX = SHARED / "golden" / "index.json"
NAMES = [s["adapter"] for s in json.loads(INDEX.read_text())["samples"]] if INDEX.exists() else []
TARGETS = (
    "krona", "lycoris-lokr", "lycoris-locon", "peft-lokr", "peft-lora", "diffusers-lora", "diffusers-lokr",
    "kohya-lora", "diffusekrona",
)  # fmt: skip
FEW = ("lyc_f4_dim2_a1.safetensors", "peft_lora_rslora_r4_a2", "lyc_dora_out_dim2_a1.safetensors")
BASE = {"base": shared("golden", "base")}


def conversions(name, folder):
    """The golden adapter and every exact conversion of it, by format."""
    made = {"itself": shared("golden", name)}
    for to in TARGETS:
        try:
            convert(made["itself"], folder / to, to=to, exact=True, **BASE)
            made[to] = folder / to
        except InexpressibleError:
            continue
    return made


def check_all_pairs(name, folder):
    made = conversions(name, folder)
    assert len(made) >= 2
    for one, two in itertools.combinations(made, 2):
        report = verify(made[one], made[two], **BASE)
        assert report.same and report.exit_code == 0, (one, two, report.different[:2])
        assert report.scale is None


@pytest.mark.parametrize("name", FEW)
def test_conversions_of_one_adapter_mean_the_same(name, tmp_path):
    check_all_pairs(name, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in NAMES if n not in FEW])
def test_conversions_of_every_reference_file_mean_the_same(name, tmp_path):
    check_all_pairs(name, tmp_path)


def lora(scale=1.0, seed=0, layers=("unet.a", "unet.b")):
    random = torch.Generator().manual_seed(seed)
    return Adapter(
        {
            name: LayerDelta(
                (as_lora(scale * torch.randn(20, 3, generator=random), torch.randn(3, 12, generator=random)),), (20, 12)
            )
            for name in layers
        }
    )


def saved(adapter, path):
    write(adapter, path)
    return path


def test_another_strength_is_a_difference_whose_scale_is_told(tmp_path):
    a, b = saved(lora(), tmp_path / "a"), saved(lora(0.7), tmp_path / "b")
    report = verify(a, b)
    assert not report.same and report.exit_code == 6 and len(report.different) == 2
    assert report.scale == pytest.approx(0.7) and report.cosine == pytest.approx(1)
    assert report.relative_difference == pytest.approx(0.3)
    assert all(x.relative_difference == pytest.approx(0.3) for x in report.layers)


def test_the_wrong_merge_exhibit_is_half_of_the_adapter(tmp_path):
    """What LyCORIS merges for this file has the scale twice: alpha / rank = 1/2."""
    dense = load_file(shared("golden", "lyc_f4_dim2_a1.WRONG_merge_to_delta.safetensors"))
    wrong = Adapter({n: LayerDelta((KronTerms(torch.ones(1, 1, 1), d.reshape(1, len(d), -1)),), tuple(d.shape))
                     for n, d in dense.items()})  # fmt: skip
    report = verify(shared("golden", "lyc_f4_dim2_a1.safetensors"), saved(wrong, tmp_path / "b"), **BASE)
    assert report.exit_code == 6 and report.scale == pytest.approx(0.5, rel=1e-4)


def test_numbers_are_those_of_the_dense_deltas(tmp_path):
    a, b = lora(), lora(seed=5)
    report = verify(saved(a, tmp_path / "a"), saved(b, tmp_path / "b"))
    dense = [{n: d.dense().double() for n, d in x.layers.items()} for x in (a, b)]
    for x in report.layers:
        assert x.norm == pytest.approx(float(dense[0][x.layer].norm()))
        assert x.difference == pytest.approx(float((dense[1][x.layer] - dense[0][x.layer]).norm()))
        assert x.relative_difference == pytest.approx(x.difference / x.norm)
    one, two = (torch.cat([t.flatten() for t in x.values()]) for x in dense)
    assert report.scale == pytest.approx(float(one @ two / (one @ one)))
    assert report.cosine == pytest.approx(float(torch.cosine_similarity(one, two, dim=0)))


@pytest.mark.parametrize("bits", [1, 2**-10])
def test_one_changed_number_is_found(bits, tmp_path):
    path = saved(lora(), tmp_path / "a")
    tensors, metadata = load_file(path), dict(read_header(path).metadata)
    name = "unet.b.kron_b_down.0"
    tensors[name][0, 1, 2] += bits
    save_file(tensors, tmp_path / "b", metadata)
    report = verify(path, tmp_path / "b")
    assert [x.layer for x in report.different] == ["unet.b"]


def test_layers_that_only_one_has_are_named_unless_they_are_zero(tmp_path):
    a, b = lora(), lora(layers=("unet.a", "unet.c"))
    report = verify(saved(a, tmp_path / "a"), saved(b, tmp_path / "b"))
    assert report.only_first == ("unet.b",) and report.only_second == ("unet.c",) and report.exit_code == 6
    assert {x.layer: x.relative_difference for x in report.different} == {"unet.b": 1.0, "unet.c": math.inf}
    zero = a.with_layers({**a.layers, "unet.z": LayerDelta((), (20, 12))})
    assert verify(saved(zero, tmp_path / "z"), tmp_path / "a").same


def test_layers_of_different_sizes_are_a_difference_and_are_told(tmp_path):
    b = Adapter({"unet.a": LayerDelta((as_lora(torch.ones(20, 1), torch.ones(1, 6)),), (20, 6))})
    report = verify(saved(lora(layers=("unet.a",)), tmp_path / "a"), saved(b, tmp_path / "b"))
    assert report.exit_code == 6 and "unet.a: different sizes" in report.notes[0]


def test_the_tolerance_is_relative_and_per_layer(tmp_path):
    a = lora()
    nearly = a.with_layers(
        {**a.layers, "unet.b": LayerDelta(tuple(s.scaled(1.001) for s in a["unet.b"].sums), (20, 12))}
    )
    paths = saved(a, tmp_path / "a"), saved(nearly, tmp_path / "b")
    assert not verify(*paths).same and not verify(*paths, tolerance=0.0009).same
    assert verify(*paths, tolerance=0.0011).same


def test_a_dora_and_its_plain_delta_are_the_same_given_the_base_weights(tmp_path):
    dora, plain = shared("golden", "lyc_dora_in_dim3_a1.safetensors"), tmp_path / "plain.safetensors"
    convert(dora, plain, to="lora", exact=True, **BASE)
    assert verify(dora, plain, **BASE).same
    native = tmp_path / "dora.safetensors"
    convert(dora, native, **BASE)
    with pytest.raises(UnknownBaseError, match="--base"):
        verify(native, saved(read(plain, **BASE), tmp_path / "native.safetensors"))


def test_a_changed_magnitude_is_a_difference_with_and_without_base_weights(tmp_path):
    from dataclasses import replace

    adapter = read(shared("golden", "lyc_dora_out_dim2_a1.safetensors"), **BASE)
    name = next(iter(adapter.layers))
    other = adapter.with_layers(
        {**adapter.layers, name: replace(adapter[name], magnitude=adapter[name].magnitude * 1.01)}
    )
    paths = saved(adapter, tmp_path / "a"), saved(other, tmp_path / "b")
    for base in ({}, BASE):
        assert [x.layer for x in verify(*paths, **base).different] == [name]


def test_progress_counts_layers(tmp_path):
    seen = []
    path = saved(lora(), tmp_path / "a")
    verify(path, path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 2), (2, 2)]


def test_what_asks_nothing_or_names_nothing_is_an_error(tmp_path):
    path = saved(lora(), tmp_path / "a")
    for arguments in ({}, {"adapters": [(path, 1)]}, {"second": path, "base": "sd15", "adapters": [(path, 1)]}):
        with pytest.raises(UsageError, match="do not select a comparison"):
            verify(path, **arguments)
    with pytest.raises(UsageError):
        verify(path, path, tolerance=-1)
    with pytest.raises(NotFoundError):
        verify(path, tmp_path / "none.safetensors")
    (tmp_path / "no.safetensors").write_bytes(b"no adapter at all")
    with pytest.raises(KronaError):
        verify(path, tmp_path / "no.safetensors")
