"""What a merged file says of itself: true, complete, the same every time, and nothing of the base's is lost."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from krona_hub import merge, write
from krona_hub.checkpoints.header import read_header
from krona_hub.merging import merge_record
from krona_hub.merging.merge_record import RECORD
from tests import tiny
from tests.formats import made

OLD = {
    "format": "pt", "modelspec.title": "Tiny", "modelspec.author": "someone", "modelspec.architecture": "tiny",
    "modelspec.hash_sha256": "0x00", "sshs_model_hash": "00", "note": "ß\n",
}  # fmt: skip


@pytest.fixture(scope="module")
def shapes():
    return tiny.layers(tiny.sd15(), "to_q")


@pytest.fixture
def base(tmp_path):
    """A U-Net's folder whose file has metadata."""
    tiny.sd15().unet.save_pretrained(tmp_path / "unet")
    path = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    save_file(load_file(path), path, OLD)
    return tmp_path / "unet"


@pytest.fixture
def adapter(base, shapes, tmp_path):
    write(made.lora(shapes), tmp_path / "style.safetensors", format="kohya-lora", base=base)
    return tmp_path / "style.safetensors"


def sha256(path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def file_in(folder):
    return folder / "diffusion_pytorch_model.safetensors"


def metadata_of(folder) -> dict[str, str]:
    return dict(read_header(file_in(folder)).metadata)


def test_a_merged_file_tells_its_base_its_adapters_and_their_weights(base, adapter, tmp_path):
    merge(base, [(adapter, 0.75), (adapter, -0.5)], tmp_path / "out", block_weights={"to_q": 0.5}, seed=3,
          rounding="stochastic")  # fmt: skip
    record = json.loads(metadata_of(tmp_path / "out")[RECORD])
    recorded = {"name": "style.safetensors", "sha256": sha256(adapter), "format": "kohya-lora"}
    assert record["adapters"] == [{**recorded, "weight": 0.75}, {**recorded, "weight": -0.5}]
    assert record["base"]["name"] == "unet" and record["base"]["sha256"] == sha256(file_in(base))
    assert (record["rounding"], record["seed"], record["block_weights"]) == ("stochastic", 3, {"to_q": 0.5})


def test_what_the_base_said_is_kept_but_for_what_is_true_of_its_bytes_only(base, adapter, tmp_path):
    merge(base, [(adapter, 1.0)], tmp_path / "out")
    new, kept = metadata_of(tmp_path / "out"), ("format", "modelspec.author", "modelspec.architecture", "note")
    assert {key: new[key] for key in kept} == {key: OLD[key] for key in kept}
    assert new["modelspec.title"] == "Tiny + style" and new["modelspec.merged_from"] == "unet, style.safetensors"
    assert "sshs_model_hash" not in new
    header = read_header(file_in(tmp_path / "out"))
    data = file_in(tmp_path / "out").read_bytes()[header.data_start :]
    assert new["modelspec.hash_sha256"] == "0x" + hashlib.sha256(data).hexdigest()
    merge(base, [(adapter, 1.0)], tmp_path / "named", title="Mine")
    assert metadata_of(tmp_path / "named")["modelspec.title"] == "Mine"


def test_equal_merges_have_equal_bytes_whatever_the_threads(base, adapter, tmp_path):
    for threads in (1, 2, 4):
        merge(base, [(adapter, 0.3)], tmp_path / f"out{threads}", threads=threads, rounding="stochastic")
    assert len({sha256(file_in(tmp_path / f"out{threads}")) for threads in (1, 2, 4)}) == 1


def test_hashes_are_taken_where_they_are_cheap_asked_for_or_known(base, adapter, tmp_path, monkeypatch):
    monkeypatch.setattr(merge_record, "SMALL", 10)
    report = merge(base, [(adapter, 1.0)], tmp_path / "auto")
    assert "sha256" not in json.loads(metadata_of(tmp_path / "auto")[RECORD])["base"]
    assert "modelspec.hash_sha256" not in metadata_of(tmp_path / "auto")
    assert any("--hash" in note for note in report.notes) and report.base_sha256 is None
    report = merge(base, [(adapter, 1.0)], tmp_path / "hashed", hash=True)
    assert report.base_sha256 == sha256(file_in(base)) and "modelspec.hash_sha256" in metadata_of(tmp_path / "hashed")
    assert not any("--hash" in note for note in report.notes)
    blob = tmp_path / "blobs" / sha256(file_in(base))
    blob.parent.mkdir()
    shutil.move(file_in(base), blob)
    file_in(base).symlink_to(blob)
    assert merge(base, [(adapter, 1.0)], tmp_path / "cache").base_sha256 == blob.name
    small = merge(base, [(adapter, 1.0)], tmp_path / "never", hash=False)
    assert "modelspec.hash_sha256" not in metadata_of(tmp_path / "never") and small.base_sha256 == blob.name


def test_a_second_merge_keeps_the_record_of_the_first(base, adapter, tmp_path):
    merge(base, [(adapter, 1.0)], tmp_path / "one")
    merge(tmp_path / "one", [(adapter, 0.5)], tmp_path / "two")
    first, second = metadata_of(tmp_path / "one")[RECORD], json.loads(metadata_of(tmp_path / "two")[RECORD])
    assert second["before"] == first and second["base"]["name"] == "one"


def test_a_folder_of_adapters_has_one_hash_that_changes_with_any_of_its_files(tmp_path):
    pipe = tiny.sd15()
    base = tmp_path / "base"
    tiny.save(pipe, base)
    write(made.lora(tiny.layers(pipe, "to_q", "q_proj")), tmp_path / "peft", format="peft-lora", base=base)
    seen = set()
    for name in ("plain", "unet", "text_encoder"):
        if name != "plain":
            file = tmp_path / "peft" / name / "adapter_model.safetensors"
            save_file({n: t.contiguous() * 2 for n, t in load_file(file).items()}, file)
        merge(base, [(tmp_path / "peft", 1.0)], tmp_path / name)
        recorded = read_header(tmp_path / name / "unet/diffusion_pytorch_model.safetensors").metadata[RECORD]
        seen.add(json.loads(recorded)["adapters"][0]["sha256"])
    assert len(seen) == 3


def test_progress_is_told_in_bytes_and_ends_at_all_of_them(base, adapter, tmp_path):
    steps: list[tuple[int, int]] = []
    merge(base, [(adapter, 1.0)], tmp_path / "out", undo=tmp_path / "undo", progress=lambda *step: steps.append(step))
    done, totals = [d for d, _ in steps], {t for _, t in steps}
    assert done == sorted(done) and len(totals) == 1 and done[-1] == totals.pop()
    written = [p for p in (tmp_path / "out").rglob("*") if p.is_file()] + [tmp_path / "undo"]
    assert 0 <= sum(p.stat().st_size for p in written) - done[-1] < 8000, "but for the header of the undo file"


@pytest.mark.parametrize("options", [{"rounding": "down"}, {"threads": 0}])
def test_options_that_mean_nothing_are_refused(options, base, shapes, tmp_path):
    with pytest.raises(ValueError, match=r"'down'|threads 0"):
        merge(base, [(made.lora(shapes), 1.0)], tmp_path / "out", **options)


def test_a_tensor_is_reported_with_the_file_that_holds_it(tmp_path):
    pipe = tiny.sd15()
    tiny.save(pipe, tmp_path / "base")
    report = merge(tmp_path / "base", [(made.lora(tiny.layers(pipe, "to_q", "q_proj")), 1.0)], tmp_path / "out")
    assert {t.file for t in report.tensors} == {
        "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
    }  # fmt: skip
    assert all((tmp_path / "out" / t.file).exists() and t.wanted > 0 for t in report.tensors)
    assert not any(torch.isnan(torch.tensor(t.lost)) for t in report.tensors)
