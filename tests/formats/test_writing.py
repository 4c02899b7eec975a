"""What a person may rely on when a file is written, whatever its format."""

from dataclasses import replace

import pytest
import torch

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.adapters.unknown_base import KEPT_NAMES
from krona_hub.errors import ConflictError, InexpressibleError, IntegrityError, UnknownBaseError, UsageError
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing import readback
from krona_hub.formats.writing.writer import write
from krona_hub.kron.terms import KronTerms
from tests import tiny
from tests.formats import made

SHAPES = tiny.layers(tiny.sd15(), "to_q", "conv1", "fc1", "q_proj")


@pytest.mark.parametrize("format_name", ["krona", "peft-lora", "diffusers-lora"])
def test_an_output_that_exists_is_kept_unless_overwriting_is_asked_for(format_name, tmp_path):
    adapter, path = made.lora(SHAPES), tmp_path / "x.safetensors"
    first = write(adapter, path, format=format_name)
    before = [f.read_bytes() for f in first.files]
    with pytest.raises(ConflictError, match="--overwrite"):
        write(made.lora(SHAPES, scale=2.0), path, format=format_name)
    assert [f.read_bytes() for f in first.files] == before
    again = write(made.lora(SHAPES, scale=2.0), path, format=format_name, overwrite=True)
    assert [f.read_bytes() for f in again.files] != before


@pytest.mark.parametrize("format_name", ["krona", "peft-lora", "diffusers-lora"])
@pytest.mark.parametrize("damage", ["scale", "layer", "magnitude"])
def test_a_file_that_reads_back_as_something_else_is_not_kept(format_name, damage, tmp_path, monkeypatch):
    def damaged(adapter):
        layers = dict(adapter.layers)
        name, delta = layers.popitem()
        if damage == "scale":
            layers[name] = replace(delta, sums=tuple(s.scaled(1.0001) for s in delta.sums))
        if damage == "magnitude":
            layers[name] = replace(delta, magnitude=torch.ones(delta.weight_shape[0]))
        return adapter.with_layers(layers)

    honest = readback.read
    monkeypatch.setattr(readback, "read", lambda *args, **options: damaged(honest(*args, **options)))
    with pytest.raises(IntegrityError, match="No output was kept"):
        write(made.lora(SHAPES), tmp_path / "x.safetensors", format=format_name)
    assert not list(tmp_path.iterdir())


def test_the_report_counts_what_is_in_the_files(tmp_path):
    adapter = made.lora(SHAPES)
    report = write(adapter, tmp_path / "x.safetensors", format="diffusers-lora")
    assert report.parameters == sum(
        s.right.up.numel() + s.right.down.numel() for d in adapter.layers.values() for s in d.sums
    )
    assert report.bytes == report.path.stat().st_size
    assert str(report).startswith(f"checked: {len(SHAPES)}/{len(SHAPES)} modules rebuilt, ")


def test_what_a_format_has_no_place_for_is_said(tmp_path):
    adapter = replace(made.lora(SHAPES), extras={"<s1>": torch.ones(768)})
    with pytest.raises(InexpressibleError, match=r"no place for 1 embedding of the adapter \(<s1>\)"):
        write(adapter, tmp_path / "a.safetensors", format="diffusers-lora")
    report = write(adapter, tmp_path / "a.safetensors", format="diffusers-lora", allow_missing=True)
    assert report.left_out.embeddings == ("<s1>",)
    assert not write(adapter, tmp_path / "b.safetensors").left_out


def test_without_a_base_names_are_kept_and_only_an_application_asks_for_it(tmp_path):
    report = write(made.lora(SHAPES), tmp_path / "x.safetensors", format="kohya-lora")
    assert report.notes == (KEPT_NAMES,)
    assert set(read(report.path).layers) == set(SHAPES)
    with pytest.raises(UnknownBaseError, match="--base"):
        write(made.lora(SHAPES), tmp_path / "y.safetensors", tool="comfyui")


def test_contradictions_and_unknown_formats_are_wrong_usage(tmp_path):
    for options in ({"format": "peft-lora", "tool": "comfyui"}, {"format": "cloneofsimo"}, {"tool": "paint"}):
        with pytest.raises(UsageError):
            write(made.lora(SHAPES), tmp_path / "x.safetensors", **options)


def test_a_mixture_of_dora_and_plain_layers_fits_lycoris_only(tmp_path):
    pipe = tiny.sd15()
    plain = made.lora(SHAPES)
    dora = made.as_dora(plain, lambda layer: tiny.module_of(pipe, layer).weight)
    mixed = plain.with_layers({k: (plain if "conv" in k else dora).layers[k] for k in plain.layers})
    base = tiny.save(pipe, tmp_path)
    for format_name in ("peft-lora", "diffusers-lora"):
        with pytest.raises(InexpressibleError, match="use_dora"):
            write(mixed, tmp_path / "x", format=format_name, base=base)
    assert write(mixed, tmp_path / "x", format="lycoris-locon", base=base).layers == len(mixed)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_both_axes_of_a_dora_survive_in_lycoris_files(axis, tmp_path):
    pipe = tiny.sd15()
    dora = made.as_dora(made.lora(SHAPES), lambda layer: tiny.module_of(pipe, layer).weight, axis)
    base = tiny.save(pipe, tmp_path)
    for format_name in ("lycoris-locon", "lycoris-lokr"):
        assert (
            write(dora, tmp_path / f"{format_name}.safetensors", format=format_name, base=base).worst_difference < 1e-6
        )
    if axis == "in":
        with pytest.raises(InexpressibleError, match="per input column"):
            write(dora, tmp_path / "x", format="peft-lora", base=base)


def test_a_whole_matrix_goes_to_locon_and_the_native_format_only(tmp_path):
    pipe = tiny.sd15()
    whole = {k: LayerDelta((KronTerms(torch.ones(1, 1, 1) * 0.5, torch.randn(1, s[0], s[1])),), s)
             for k, s in tiny.layers(pipe, "to_q").items()}  # fmt: skip
    base = tiny.save(pipe, tmp_path)
    for format_name in ("krona", "lycoris-locon"):
        write(Adapter(whole), tmp_path / f"{format_name}.safetensors", format=format_name, base=base)
    with pytest.raises(InexpressibleError):
        write(Adapter(whole), tmp_path / "x.safetensors", format="kohya-lora", base=base)


def test_bfloat16_factors_keep_their_type_and_folded_ones_do_not(tmp_path):
    from safetensors.torch import load_file

    half = made.lora(SHAPES)
    half = half.with_layers({k: replace(d, sums=tuple(_halved(s) for s in d.sums)) for k, d in half.layers.items()})
    tensors = load_file(write(half, tmp_path / "x.safetensors", format="diffusers-lora").path)
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


def _halved(s):
    from krona_hub.formats.writing.encode import cast

    down = cast(LayerDelta((s,), s.shape.full), torch.bfloat16).sums[0].right
    return replace(s, right=down)
