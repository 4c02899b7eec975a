"""Complete training runs on tiny base models: every family, resumed runs, outputs and errors."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from krona_hub import load_into, read
from krona_hub.errors import (
    ConflictError,
    DataError,
    DivergedError,
    IntegrityError,
    NoDeviceError,
    StoppedError,
    UsageError,
)
from krona_hub.pipelines.randomness import generator
from krona_hub.training.api import check_training, train
from krona_hub.training.configuration import read_toml
from krona_hub.training.model.device import peak_memory
from krona_hub.training.model.objective import Objective
from krona_hub.training.progress.checkpoint import saved_states
from krona_hub.training.progress.metrics import read_metrics, series
from tests.shared import shared


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "flux"])
def test_every_family_trains_and_its_adapter_reads_back(kind, bases, quick):
    quick |= {"base": bases(kind), "steps": 2, "held_out": 1, "validate_every": 1}
    report = train(quick)
    adapter = read(report.adapter, base=quick["base"])
    assert adapter.parameters == report.parameters > 0
    assert any(d.low_rank_delta().any() for d in adapter.layers.values())
    assert len(report.validation) == 3 and report.steps == 2
    assert adapter.provenance.training["steps"] == 2 and adapter.provenance.method == "trained"


def test_a_training_lowers_the_loss_of_what_it_sees(quick, photos):
    quick |= {"steps": 40, "learning_rate": 0.02, "validation_data": photos, "validate_every": 40, "batch_size": 2}
    (_, before), *_, (_, after) = train(quick).validation
    assert after < 0.97 * before


def test_the_run_folder_has_settings_metrics_and_checkpoints(quick):
    quick |= {"checkpoint_every": 1, "keep_checkpoints": 2}
    report = train(quick)
    run = Path(quick["output"])
    assert read_toml(run / "config.toml")["steps"] == 4
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert {"loss", "smooth_loss", "learning_rate", "gradient_norm", "epoch", "seconds"} <= set(rows[0])
    assert sorted(saved_states(run)) == [3, 4] and report.adapter.is_file()


def test_the_same_settings_give_the_same_bytes(quick, tmp_path):
    first = train(quick).adapter.read_bytes()
    assert train(quick, output=str(tmp_path / "again")).adapter.read_bytes() == first
    assert train(quick, output=str(tmp_path / "other"), seed=1).adapter.read_bytes() != first


FULL = {"ema": 0.9, "flip": True, "caption_dropout": 0.3, "noise_offset": 0.1, "accumulation": 2, "schedule": "cosine",
        "warmup": 2, "held_out": 1, "validate_every": 2, "steps": 6}  # fmt: skip


def stop_after(step):
    """Return a progress callback that sends SIGINT, as Ctrl-C does, after a step."""
    import os
    import signal

    def on_step(report):
        if report.step == step:
            os.kill(os.getpid(), signal.SIGINT)

    return on_step


def test_ctrl_c_saves_and_a_resumed_run_ends_in_the_same_bytes(quick, tmp_path):
    whole = train(quick | FULL).adapter.read_bytes()
    run = tmp_path / "stopped"
    with pytest.raises(StoppedError, match=r"--resume") as caught:
        train(quick | FULL, output=str(run), progress=stop_after(2))
    assert caught.value.exit_code == 130 and max(saved_states(run)) == 3
    torch.manual_seed(99)  # what happened in between must not matter
    report = train(resume_from=run)
    assert report.adapter.read_bytes() == whole
    assert [row["step"] for row in read_metrics(run) if "loss" in row] == [1, 2, 3, 4, 5, 6]
    assert [step for step, _ in report.validation] == [0, 2, 4, 6]


def test_a_resumed_run_forgets_what_was_measured_after_its_checkpoint(quick):
    quick |= {"checkpoint_every": 2, "steps": 5}
    with pytest.raises(StoppedError):
        train(quick, progress=stop_after(2))
    run = Path(quick["output"])
    for step, folder in saved_states(run).items():
        if step > 2:
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    assert max(row["step"] for row in read_metrics(run)) == 3
    train(resume_from=run)
    assert [row["step"] for row in read_metrics(run)] == [1, 2, 3, 4, 5]


def test_a_run_goes_on_longer_but_not_with_other_pictures_or_settings(quick, photos, tmp_path):
    import shutil

    own = tmp_path / "own"
    shutil.copytree(photos, own)
    report = train(quick | {"data": str(own)})
    assert train(resume_from=report.run, steps=5).steps == 5
    with pytest.raises(UsageError, match="learning_rate"):
        train(resume_from=report.run, learning_rate=0.5)
    (own / "0.png").unlink()
    with pytest.raises(IntegrityError, match="other images"):
        train(resume_from=report.run, steps=6)


def test_a_folder_that_holds_a_training_is_not_written_over(quick):
    train(quick)
    with pytest.raises(ConflictError, match="--resume"):
        train(quick)


def test_a_loss_that_is_no_number_stops_with_the_last_good_checkpoint(quick, monkeypatch):
    broken_at(monkeypatch, 3)
    with pytest.raises(DivergedError, match=r"step 3.*checkpoint is step 2"):
        train(quick | {"checkpoint_every": 1})


def test_a_batch_without_a_number_is_left_out_on_request(quick, monkeypatch):
    broken_at(monkeypatch, 3)
    report = train(quick | {"nan": "skip"})
    adapter = read(report.adapter, base=quick["base"])
    assert report.skipped == 1 and all(t.isfinite().all() for d in adapter.layers.values() for t in d.tensors)
    assert read_metrics(report.run)[2]["loss"] is None


def test_a_run_that_was_stopped_by_such_a_batch_goes_on_without_it(quick, monkeypatch):
    broken_at(monkeypatch, 3)
    with pytest.raises(DivergedError, match=r"--resume .* --nan skip") as stopped:
        train(quick | {"checkpoint_every": 1})
    assert quick["output"] in str(stopped.value)
    report = train(resume_from=quick["output"], nan="skip")
    assert (report.steps, report.skipped) == (4, 1)


def test_a_run_does_not_go_back_and_stays_as_it_was(quick):
    run = train(quick).run
    before = (run / "config.toml").read_bytes()
    with pytest.raises(UsageError, match="4 steps"):
        train(resume_from=run, steps=2)
    assert (run / "config.toml").read_bytes() == before


def test_a_run_goes_on_with_no_second_set_of_settings(quick, tmp_path):
    run = train(quick).run
    (tmp_path / "other.toml").write_text("steps = 6")
    with pytest.raises(UsageError, match=r"other\.toml"):
        train(tmp_path / "other.toml", resume_from=run)
    with pytest.raises(UsageError, match="paper-sd"):
        train(preset="paper-sd", resume_from=run)


def test_a_run_does_not_go_on_with_other_pictures_of_the_class(quick, photos, tmp_path):
    import shutil

    own = tmp_path / "class"
    shutil.copytree(photos, own)
    run = train(quick | {"prior_data": str(own), "prior_prompt": "a toy"}).run
    Image.new("RGB", (16, 16), "red").save(own / "0.png")
    with pytest.raises(IntegrityError, match="other images"):
        train(resume_from=run, steps=5)


def test_a_training_that_does_not_begin_leaves_no_folder(quick, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError):
        train(quick | {"data": str(tmp_path / "none")})
    assert not Path(quick["output"]).exists()


def test_peak_memory_is_in_bytes_on_systems_that_count_in_kilobytes_and_in_bytes(monkeypatch):
    from psutil import Process

    held = Process().memory_info().rss
    assert 0.5 * held < peak_memory() < 100 * held
    counted = peak_memory()
    monkeypatch.setattr("sys.platform", "darwin")
    assert peak_memory() == pytest.approx(counted / 1024, rel=0.1)


def test_the_command_that_goes_on_with_a_run_can_be_pasted_into_a_shell(quick, tmp_path):
    quick |= {"output": str(tmp_path / "my toy")}
    train(quick)
    with pytest.raises(ConflictError) as caught:
        train(quick)
    assert f"--resume '{tmp_path}/my toy'," in caught.value.fix


def test_a_run_folder_that_is_a_file_is_told(quick, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConflictError, match="is not a folder"):
        train(quick | {"output": str(tmp_path / "file")})


def broken_at(monkeypatch, step):
    plain = Objective.loss
    monkeypatch.setattr(
        Objective, "loss", lambda self, x, given, at, samples: plain(self, x, given, at, samples) * (
            float("nan") if at == step - 1 else 1.0)
    )  # fmt: skip


def test_encoders_are_called_once_per_picture_and_never_after(quick, monkeypatch):
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel

    calls = []
    encode, forward = AutoencoderKL.encode, CLIPTextModel.forward
    monkeypatch.setattr(AutoencoderKL, "encode", lambda *a, **k: calls.append("vae") or encode(*a, **k))
    monkeypatch.setattr(CLIPTextModel, "forward", lambda *a, **k: calls.append("text") or forward(*a, **k))
    seen = []
    train(quick | {"steps": 12}, progress=lambda p: seen.append(len(calls)))
    assert calls.count("vae") == 5 and calls.count("text") == 1 and len(set(seen)) == 1


def test_without_the_cache_the_numbers_are_the_same(quick, tmp_path):
    kept = read(train(quick).adapter, base=quick["base"])
    anew = read(train(quick, cache=False, output=str(tmp_path / "anew")).adapter, base=quick["base"])
    for layer, delta in kept.layers.items():
        for a, b in zip(delta.tensors, anew[layer].tensors, strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-7)


def test_text_encoders_learn_too(quick):
    report = train(quick | {"text_encoders": "attn", "steps": 2})
    adapter = read(report.adapter, base=quick["base"])
    assert set(adapter.components) == {"unet", "text_encoder"}
    assert any(d.low_rank_delta().any() for n, d in adapter.layers.items() if n.startswith("text_encoder"))


def test_an_earlier_adapter_is_a_start(quick, tmp_path):
    first = train(quick)
    report = train(quick, init=str(first.adapter), learning_rate=0.0, weight_decay=0.0, output=str(tmp_path / "two"))
    old, new = (read(r.adapter, base=quick["base"]) for r in (first, report))
    assert all(torch.equal(a, b) for n, d in old.layers.items() for a, b in zip(d.tensors, new[n].tensors, strict=True))


def test_prior_pictures_change_what_is_learned(quick, photos, tmp_path):
    plain = train(quick).adapter.read_bytes()
    both = train(quick, prior_data=photos, prior_prompt="a toy", output=str(tmp_path / "prior"))
    assert both.adapter.read_bytes() != plain


PRIOR = {"prior_pictures": 3, "prior_prompt": "a toy", "sample_steps": 2}


@pytest.mark.slow
def test_the_base_draws_pictures_of_the_class_once(quick, tmp_path):
    run, folder = Path(quick["output"]), tmp_path / "class"
    train(quick | PRIOR)
    drawn = {path.name: path.read_bytes() for path in (run / "prior").iterdir()}
    assert len(drawn) == 6 and check_training(quick | PRIOR, timed=True).prior_pictures == 3
    train(quick | PRIOR, prior_data=str(folder), output=str(tmp_path / "two"))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == drawn
    times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    train(quick | PRIOR, prior_data=str(folder), output=str(tmp_path / "three"), steps=2)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == times
    with pytest.raises(DataError, match="another base model, prompt"):
        train(quick | PRIOR, prior_data=str(folder), prior_prompt="a cat", output=str(tmp_path / "four"))


def test_pictures_of_the_class_take_the_alternatives_of_their_prompt_in_turn(quick):
    more = {"prior_pictures": 6, "prior_prompt": "a {red|blue} {cat|dog|cow}", "sample_steps": 2}
    run = train(quick | more, steps=1).run
    captions = [path.read_text().split() for path in (run / "prior").glob("*.txt")]
    assert sorted(c for _, c, _ in captions) == ["blue"] * 3 + ["red"] * 3
    assert sorted(a for _, _, a in captions) == ["cat"] * 2 + ["cow"] * 2 + ["dog"] * 2


def test_a_prompt_with_alternatives_is_no_caption(quick, photos):
    with pytest.raises(DataError, match="5 images have no caption"):
        train(quick, prior_data=photos, prior_prompt="a {red|blue} toy")


@pytest.mark.slow
def test_the_base_itself_can_be_the_class(quick, photos, tmp_path):
    """The loss against the base model is zero until the training images have changed the adapter."""
    alone = train(quick, steps=1, output=str(tmp_path / "alone"))
    more = {"prior_data": photos, "prior_prompt": "a toy", "prior_target": "base", "prior_weight": 50.0}
    kept = train(quick | more, steps=1, output=str(tmp_path / "kept"))
    assert same(alone, kept, quick["base"])
    longer = [train(quick | extra, steps=4, output=str(tmp_path / str(n))) for n, extra in enumerate(({}, more))]
    assert not same(*longer, quick["base"])


def same(one, other, base):
    one, other = (read(report.adapter, base=base).layers for report in (one, other))
    return all(torch.allclose(d.dense(), other[name].dense(), atol=1e-7) for name, d in one.items())


def test_the_trigger_word_is_not_put_in_front_of_the_class(quick, photos, tmp_path, monkeypatch):
    from krona_hub.training.data.encoding import Encoder

    requests, text = [], Encoder.text
    monkeypatch.setattr(Encoder, "text", lambda self, captions: requests.extend(captions) or text(self, captions))
    train(quick, trigger_word="sks", caption_template="art: {caption}", prior_data=photos, prior_prompt="a toy")
    assert set(requests) == {"sks, art: a photo", "a toy"}


@pytest.mark.slow
def test_a_stopped_run_keeps_its_pictures_of_the_class(quick, tmp_path):
    whole = train(quick | PRIOR, output=str(tmp_path / "whole")).adapter.read_bytes()
    with pytest.raises(StoppedError):
        train(quick | PRIOR, progress=stop_after(1))
    assert train(resume_from=quick["output"]).adapter.read_bytes() == whole


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "flux"])
def test_samples_are_drawn_with_fixed_seeds_into_a_grid(kind, bases, quick):
    own = {"base": bases(kind), "learning_rate": 0.05, "sample_prompts": ["a", "b"], "sample_steps": 2}
    report = train(quick | own | {"sample_every": 2})
    folder = report.run / "samples"
    assert len(list(folder.glob("step-*.png"))) == 6
    assert Image.open(folder / "grid.png").size == (2 * 16 + 4, 3 * 16 + 2 * 4)
    assert pixels(folder / "step-0000000-1.png") != pixels(folder / "step-0000004-1.png")


@pytest.mark.parametrize("kind", ["sd15", "sdxl", "sd3", "flux"])
def test_the_last_sample_is_what_the_written_adapter_draws(kind, bases, quick):
    from diffusers import DiffusionPipeline

    own = {"base": bases(kind), "learning_rate": 0.05, "sample_prompts": ["a", "b"], "sample_steps": 2}
    report = train(quick | own | {"sample_every": 4, "sample_guidance": 3.0})
    pipe = DiffusionPipeline.from_pretrained(own["base"])
    load_into(pipe, report.adapter)
    drawn = pipe("b", num_inference_steps=2, guidance_scale=3.0, height=16, width=16,
                 generator=generator(0, "sample", 1)).images[0]  # fmt: skip
    apart = np.subtract(drawn, Image.open(report.run / "samples" / "step-0000004-1.png"), dtype=int)
    assert abs(apart).max() <= 1


def pixels(path):
    return Image.open(path).tobytes()


def test_exports_hold_the_same_delta(quick):
    report = train(quick | {"export": ["lora", "lycoris"], "rank": 2})
    assert len(report.exports) == 2
    mine = read(report.adapter, base=quick["base"])
    for path in report.exports:
        theirs = read(path, base=quick["base"])
        for layer, delta in mine.layers.items():
            assert torch.allclose(delta.dense(), theirs[layer].dense(), atol=1e-6)


def test_the_papers_rows_export_as_diffusekrona(quick):
    report = train(quick | {"rows": "shuffled", "shape": "8x4", "export": ["diffusekrona"]})
    mine, theirs = read(report.adapter, base=quick["base"]), read(report.exports[0], base=quick["base"])
    assert all(torch.allclose(d.dense(), theirs[n].dense(), atol=1e-6) for n, d in mine.layers.items())


def test_a_check_says_what_a_training_does_and_writes_nothing(quick):
    plan = check_training(quick, timed=True)
    assert not Path(quick["output"]).exists()
    report = train(quick)
    assert (plan.parameters, plan.layers, plan.pictures) == (report.parameters, report.layers, 5)
    assert plan.seconds_per_step > 0 and plan.peak_memory > plan.memory > 4 * 4 * plan.parameters


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"device": "cuda:7"}, NoDeviceError, "cuda:7"),
        ({"optimizer": "adamm"}, UsageError, "adamw"),
        ({"optimizer": "prodigy"}, UsageError, "--learning-rate 1"),
        ({"optimizer": "schedule-free", "schedule": "cosine"}, UsageError, "--schedule"),
        ({"trackers": ["tensorbord"]}, UsageError, "tensorboard"),
        ({"prior_pictures": 3}, UsageError, "--prior-prompt"),
        ({"schedule": "cosin"}, UsageError, "cosine"),
        ({"quantize": "nf4"}, NoDeviceError, "bitsandbytes"),
        ({"validate_every": 2}, UsageError, "held-out"),
    ],
)
def test_what_cannot_be_is_told_before_it_starts(given, error, words, quick):
    with pytest.raises(error, match=words):
        train(quick | given)


@pytest.mark.parametrize("resolution", [64, 128])
def test_real_photographs_train_through_the_whole_path(resolution, bases, quick):
    own = {"base": bases("photographs"), "data": str(shared("real", "photos", "duck_toy"))}
    report = train(quick | own | {"resolution": resolution, "steps": 2, "flip": True})
    assert report.steps == 2 and report.last_loss > 0


def test_metrics_are_whole_lines_even_after_a_crash(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert series(read_metrics(tmp_path), "loss") == [(1, 2.0)]
