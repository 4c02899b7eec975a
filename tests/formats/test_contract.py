"""What every format promises, whichever it is: a new member of FORMATS passes these tests or says why in STAND_INS."""

import json

import pytest
import torch

from krona_hub.adapters.adapter import LayerDelta
from krona_hub.errors import InexpressibleError, KronaError, UsageError
from krona_hub.formats.compatibility.applications import APPLICATIONS
from krona_hub.formats.compatibility.verdicts import loads_in
from krona_hub.formats.forms.normal_forms import lora_of
from krona_hub.formats.known.registry import FORMATS, by_name, detect_format
from krona_hub.formats.parsing.adapter_file import open_files
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.writer import write
from krona_hub.kron.terms import KronTerms
from krona_hub.rendering.tables import loads_matrix
from tests import tiny
from tests.formats import made
from tests.formats.files_on_disk import TINY, TO_Q, Q, peft_folder, rand, save
from tests.shared import shared

PIPE = tiny.sd15()
SHAPES = {name: shape for name, shape in tiny.layers(PIPE, "to_q", "to_v").items() if name.startswith("unet.")}
STAND_INS = {"diffusekrona": "of_diffusekrona"}  # formats that hold neither a plain LoRA nor a plain LoKr
IDS = [format.name for format in FORMATS]
WRITTEN = [format for format in FORMATS if format.writes]
READ_ONLY = {"cloneofsimo": "cloneofsimo_r2_fp16.safetensors"}  # format -> a golden file of it; others are made here


def of_diffusekrona():
    """One dense pair per projection, its rows interleaved."""
    adapter = made.lokr(SHAPES, made.by_lycoris(4), ranks=(None,))
    shuffled = {
        name: LayerDelta((KronTerms(s.left, s.right, "shuffled"),), delta.weight_shape)
        for name, delta in adapter.layers.items()
        for s in delta.sums
    }
    return adapter.with_layers(shuffled)


def adapter_for(format):
    """What the format is for: alpha is never the rank, and no layer is square on purpose."""
    if format.name in STAND_INS:
        return globals()[STAND_INS[format.name]]()
    return made.lora(SHAPES) if format.storage.kind == "low-rank" else made.lokr(SHAPES, made.by_peft(4), ranks=(2,))


def impossible_for(format):
    """A sum of two Kronecker terms per layer, which only a format of any sum holds."""
    one, two = (made.lokr(SHAPES, made.by_lycoris(factor), ranks=(None,)) for factor in (2, 4))
    return one.with_layers({
        name: LayerDelta((*delta.sums, *two.layers[name].sums), delta.weight_shape)
        for name, delta in one.layers.items()
    })  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save(PIPE, tmp_path_factory.mktemp("contract") / "base")


@pytest.fixture(scope="module", params=WRITTEN, ids=lambda format: format.name)
def written(request, base, tmp_path_factory):
    """(format, adapter, path of its file)"""
    adapter = adapter_for(request.param)
    path = tmp_path_factory.mktemp("contract") / "adapter.safetensors"
    write(adapter, path, format=request.param.name, base=base)
    return request.param, adapter, path


def test_names_are_unique_and_found():
    assert len(set(IDS)) == len(IDS)
    assert all(by_name(format.name) is format for format in FORMATS)
    with pytest.raises(UsageError, match="kohya-lora"):
        by_name("kohya-lor")


@pytest.mark.parametrize("format", FORMATS, ids=IDS)
def test_a_format_describes_itself(format):
    assert format.summary and "\n" not in format.summary and not format.summary.endswith(".")
    assert format.scale
    assert loads_matrix()[format.name].keys() == APPLICATIONS.keys()


def test_what_is_written_is_recognized_and_described(written, base):
    format, adapter, path = written
    for file in open_files(path, base):
        assert detect_format(file) is format
    about = describe(path, base=base)
    assert about.format == format.name and not about.unmatched
    assert {layer for module in about.modules for layer in module.layers} == set(adapter)
    assert loads_in(about).keys() == APPLICATIONS.keys()


def test_what_is_written_reads_back_as_the_same_deltas(written, base):
    format, adapter, path = written
    again = read(path, base=base, component="unet")
    assert set(again) == set(adapter)
    for name, delta in adapter.items():
        assert torch.allclose(again[name].dense(), delta.dense(), rtol=1e-5, atol=1e-6), (format.name, name)


def test_writing_what_was_read_gives_the_same_tensors(written, base, tmp_path):
    """Writers are deterministic, and a round trip adds nothing."""
    format, adapter, path = written
    for out in ("one", "two"):
        write(adapter, tmp_path / out, format=format.name, base=base)
    write(read(path, base=base, component="unet"), tmp_path / "again", format=format.name, base=base)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(path)
    for name, delta in read(tmp_path / "again", base=base, component="unet").items():
        assert torch.allclose(delta.dense(), adapter[name].dense(), rtol=1e-5, atol=1e-6)


def contents(path):
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    return [file.read_bytes() for file in files]


def test_what_a_format_cannot_hold_is_refused_and_leaves_nothing(written, base, tmp_path):
    format, _, _ = written
    adapter = impossible_for(format)
    assert all(lora_of(delta) is None for delta in adapter.values())
    if format.storage.kind == "any":
        report = write(adapter, tmp_path / "out", format=format.name, base=base)
        assert report.worst_difference < 1e-6
        return
    with pytest.raises(InexpressibleError) as refused:
        write(adapter, tmp_path / "out", format=format.name, base=base)
    assert refused.value.fix and not list(tmp_path.iterdir())


def test_a_broken_file_is_an_error_of_ours(written, base, tmp_path):
    """Cut short in the middle of its numbers."""
    format, _, path = written
    source = next(p for p in ([path] if path.is_file() else path.rglob("*.safetensors")))
    content = source.read_bytes()
    if path.is_dir():
        (tmp_path / "adapter_config.json").write_text((path / "adapter_config.json").read_text())
    broken = tmp_path / ("adapter_model.safetensors" if path.is_dir() else "broken.safetensors")
    broken.write_bytes(content[: len(content) - 100])
    with pytest.raises(KronaError) as error:
        read(tmp_path if path.is_dir() else broken, base=base, format=format.name)
    assert error.value.code and error.value.fix


@pytest.mark.parametrize("format", [f for f in FORMATS if not f.writes], ids=lambda format: format.name)
def test_a_format_that_is_only_read_says_so(format, tmp_path):
    with pytest.raises(UsageError, match="read-only"):
        write(made.lora(SHAPES), tmp_path / "out.safetensors", format=format.name)
    assert not list(tmp_path.iterdir())
    path, base = of_read_only(format.name, tmp_path)
    assert detect_format(open_files(path, base)[0]) is format
    assert len(read(path, base=base, component="unet")) > 0


def of_read_only(name, folder):
    """(a file or folder of the format, its base)"""
    if name in READ_ONLY:
        path = shared("golden", READ_ONLY[name])
        sample = json.loads(shared("golden", "index.json").read_text())["samples"]
        assert path.name in {s["adapter"] for s in sample}
        return path, str(shared("golden", "base"))
    q = TO_Q.partition(".")[2] if name == "peft-loha" else Q
    tensors = {f"{q}.hada_w{i}_{side}": t for i in (1, 2) for side, t in (("a", rand(12, 2)), ("b", rand(2, 10)))}
    if name == "peft-loha":
        return peft_folder(folder / "peft", {"peft_type": "LOHA", "r": 2, "alpha": 3}, tensors), TINY
    return save(folder, tensors), TINY
