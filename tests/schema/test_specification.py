"""docs/schema-1.0.md is enough to read a native file: its reader runs on every golden file, its example is a file."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from krona_hub.adapters.adapter import Adapter, BaseModel
from krona_hub.checkpoints.header import read_header
from krona_hub.checkpoints.reader import load
from krona_hub.checkpoints.writer import write_tensors
from krona_hub.schema.fields import BASE, LAYER, PROVENANCE, TOP
from krona_hub.schema.native_tensors import from_tensors, to_tensors
from krona_hub.schema.validate import validate
from tests.attacks.forge import put
from tests.golden.make import LAYERS, RECORD

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs/schema-1.0.md").read_text()
GOLDEN = ROOT / "tests/golden/1.0"
FROZEN = {  # golden files are never edited; a new version is a new folder
    "conv.delta.safetensors": "b7ceb1e4192ae9c7914743e3cde63ef21811b9842957459a6718c252c851e1be",
    "conv.safetensors": "aab2394fce5600d993600888200c42285d7123190dc75429bc7afda4e84fe121",
    "dora.delta.safetensors": "ff8a16a42f7560af729d181b68f3861525784a54fe0d6011878d4bed7d32f3cf",
    "dora.safetensors": "b4084990cb61b7b2d4926fccf9f9429a78089f2e9e88f33b781ee8b1effa1ce7",
    "linear.delta.safetensors": "05590bc3d2178a3a5a5c4f115d065334d5017e0fe23befa58a205544733b1bf7",
    "linear.safetensors": "c462fb03c9f6d385a59c14df4805b635bc9f9678aa2135795a38993133d66632",
    "record.delta.safetensors": "8cd16c09afa8e3000612934a2439c286f2d8ec82c392165d3a2defd9d8cddbd3",
    "record.safetensors": "e19f764edec930886995c22a022e6111d5ce20ba4efde19a08ac4e6c55d9fb2e",
    "shuffled.delta.safetensors": "f64d847c5519067cc01d2213b3fe539b7dc57bafc275f59a484dcaef4736836d",
    "shuffled.safetensors": "e7c0739159f9e8fff967bcec7baca9dbe490d84cb8f406122a6da4721c034e51",
    "sums.delta.safetensors": "a5bee8a20f9e765b98cfe6e7657968bed9d87ab00d8e45ca09ceae97ce2460e3",
    "sums.safetensors": "45c91334c041a166b6cc33fbe3f3aea5c757b2780e99736cc8482d044cba3596",
    "terms.delta.safetensors": "cb92ae17904b0660571f64805798b7b18377a429ce56041bb96c509584653286",
    "terms.safetensors": "bced6d679c51b5c0d223d16fa315d1c0f1c7f32950696946bbeed8685c0c2609",
}
FROZEN_2_0 = {
    "only_vectors.delta.safetensors": "b877c9b2d61466f6546fb28b6a1e3e2dfbb66701387a2e7cca146d945eee8581",
    "only_vectors.safetensors": "141a9e9677e1ceed229942ec9af05839c10f612d22d256f20f93a94d4b7682c5",
    "vectors.delta.safetensors": "f465f30bf1fe8cdeaaec715bd9b67e0156b2135c696e6b5c3b22d7b5bd5b7466",
    "vectors.safetensors": "4d92bd95a76e3cd65afd75dd74bee9a1255170a538f72c6f9d0b731664b0630a",
}
NAMES = sorted(LAYERS)
PAGE_2_0 = (ROOT / "docs/schema-2.0.md").read_text()
GOLDEN_2_0 = ROOT / "tests/golden/2.0"


def block(language: str) -> str:
    """The one code block of that language on the page."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    return text


def reader_of_the_page():
    room = {}
    exec(block("python"), room)
    return room["read"]


def golden(name):
    header = read_header(GOLDEN / f"{name}.safetensors")
    meaning = load(read_header(GOLDEN / f"{name}.delta.safetensors"))
    deltas = {k: t for k, t in meaning.items() if not k.startswith("base.")}
    bases = {k.removeprefix("base."): t for k, t in meaning.items() if k.startswith("base.")}
    return header, deltas, bases


def test_golden_files_are_never_edited():
    for folder, frozen in {GOLDEN: FROZEN, GOLDEN_2_0: FROZEN_2_0}.items():
        assert {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()} == frozen


@pytest.mark.parametrize("name", ["vectors", "only_vectors"])
def test_both_readers_read_the_vectors_of_2_0(name, tmp_path):
    path = GOLDEN_2_0 / f"{name}.safetensors"
    header, meaning = read_header(path), load(read_header(GOLDEN_2_0 / f"{name}.delta.safetensors"))
    adapter = from_tensors(header, load(header))
    room = {}
    exec(block("python"), room)
    exec(re.findall(r"```python\n(.*?)```", PAGE_2_0, re.DOTALL)[0], room)
    of_page = room["read_vectors"](path)
    assert adapter.vectors.keys() == of_page.keys() == meaning.keys() - adapter.layers.keys()
    for parameter, vector in adapter.vectors.items():
        assert torch.equal(vector.double(), meaning[parameter])
        assert (of_page[parameter] == meaning[parameter].numpy()).all()
    for layer, delta in adapter.layers.items():
        torch.testing.assert_close(delta.dense().double(), meaning[layer], rtol=1e-6, atol=1e-6)
    assert validate(path) == ()
    write_tensors(tmp_path / "again", *to_tensors(adapter))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_the_reader_of_the_page_reads_every_golden_file(name):
    header, deltas, bases = golden(name)
    found = reader_of_the_page()(header.path, {k: t.numpy() for k, t in bases.items()})
    assert found.keys() == deltas.keys()
    for layer, delta in deltas.items():
        np.testing.assert_allclose(found[layer], delta.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_our_reader_reads_every_golden_file(name):
    header, deltas, bases = golden(name)
    adapter = from_tensors(header, load(header))
    assert adapter.layers.keys() == deltas.keys() and validate(header.path) == ()
    for layer, delta in deltas.items():
        found = adapter[layer].dense(bases.get(layer))
        assert found.shape == delta.shape
        torch.testing.assert_close(found.double(), delta, rtol=0, atol=1e-6 * float(delta.abs().max()))


def test_the_golden_record_is_read_whole():
    header, _, _ = golden("record")
    adapter = from_tensors(header, load(header))
    assert adapter.provenance == RECORD and adapter.base == BaseModel("sd15", "org/model", "main", "ab" * 32)
    assert {name: (t.dtype, len(t)) for name, t in adapter.extras.items()} == {
        "<s1>": (torch.float32, 8), "norm.bias": (torch.float16, 3),
    }  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_file_is_written_again_with_the_same_bytes(name, tmp_path):
    header, _, _ = golden(name)
    write_tensors(tmp_path / "again", *to_tensors(from_tensors(header, load(header))))
    assert (tmp_path / "again").read_bytes() == header.path.read_bytes()


def test_the_reader_of_the_page_is_short():
    assert len(block("python").splitlines()) < 60


def test_the_file_of_the_page_is_read_by_both_readers_as_the_page_says(tmp_path):
    raw = bytes.fromhex("".join(line[10:57] for line in block("hexdump").splitlines()))
    shown = "".join(line[60:].removesuffix("|") for line in block("hexdump").splitlines())
    assert shown == "".join(chr(b) if 32 <= b < 127 else "." for b in raw)
    assert f"The header has {int.from_bytes(raw[:8], 'little')} bytes" in PAGE
    path, expected = put(tmp_path, raw), json.loads(block("json"))
    assert {name: delta.tolist() for name, delta in reader_of_the_page()(path).items()} == expected
    header = read_header(path)
    adapter = from_tensors(header, load(header))
    assert {name: delta.dense().tolist() for name, delta in adapter.layers.items()} == expected
    assert validate(path) == ()


def test_the_page_lists_every_field():
    for prefix, table in {"": TOP, "base.": BASE, "layers.*.": LAYER}.items():
        for name in table.keys() - {"provenance"}:
            assert f"`{prefix}{name}`" in PAGE, name
    for name in PROVENANCE:
        assert f"`provenance.{name}`" in PAGE or f"`.{name}`" in PAGE, name


def test_a_layer_of_nothing_is_zero_to_both_readers(tmp_path):
    from krona_hub.adapters.adapter import LayerDelta

    write_tensors(tmp_path / "x", *to_tensors(Adapter({"unet.x": LayerDelta((), (2, 3, 1, 1))})))
    assert reader_of_the_page()(tmp_path / "x")["unet.x"].tolist() == np.zeros((2, 3, 1, 1)).tolist()
