"""Pictures: the same as diffusers draws with merged weights, whatever else is drawn beside them; and again the same."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from krona_hub import generate, merge, read
from krona_hub.errors import (
    ConflictError,
    FormatError,
    IncompleteError,
    IntegrityError,
    NoDeviceError,
    NotFoundError,
    UnknownBaseError,
    UsageError,
)
from krona_hub.images.schedulers import SAMPLERS
from tests import single_file, tiny
from tests.images import whole

PROMPT, QUICK = "a cat", {"steps": 2, "guidance": 3.0}
NEAR = 2  # of 255: sums in another order, rounded to eight bits


def apart(a, b) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def drawn_by_diffusers(pipe, seed=0, prompt=PROMPT):
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(seed)
    return pipe(prompt, num_inference_steps=2, guidance_scale=3.0, generator=noise).images[0]


@pytest.fixture(scope="module")
def compared(base, style, toy):
    return generate(base, PROMPT, adapters=[(style, 0.8), toy], images_per_prompt=2, batch=2, **QUICK)


# --- what is drawn ---------------------------------------------------------------------------------------------------


def test_a_comparison_shows_what_diffusers_draws_with_each_adapter_added_to_the_weights(compared, base, style, toy):
    assert compared.columns == ("base", "style × 0.8", "toy") and compared.rows == 2
    for column, (adapter, weight) in enumerate([(None, 0), (style, 0.8), (toy, 1)]):
        pipe = whole.sd15()
        if adapter:
            with tiny.hooked(pipe, tiny.deltas(pipe, read(adapter)), weight):
                wanted = [drawn_by_diffusers(pipe, seed) for seed in (0, 1)]
        else:
            wanted = [drawn_by_diffusers(pipe, seed) for seed in (0, 1)]
        for row in (0, 1):
            assert apart(compared.images[row * 3 + column], wanted[row]) <= NEAR


def test_the_columns_differ_and_so_do_the_seeds(compared):
    first = compared.images
    pairs = [(0, 1), (0, 2), (1, 2), (0, 3), (1, 4)]
    assert min(apart(first[a], first[b]) for a, b in pairs) > 5 * NEAR


def test_the_column_without_adapters_is_the_base_alone_bit_for_bit(compared, base):
    alone = generate(base, PROMPT, images_per_prompt=2, batch=2, **QUICK)
    assert [apart(alone.images[row], compared.images[3 * row]) for row in (0, 1)] == [0, 0]


def test_together_is_the_sum_of_the_deltas(base, style, toy):
    pipe = whole.sd15()
    deltas = {n: 0.5 * d for n, d in tiny.deltas(pipe, read(style)).items()}
    for name, delta in tiny.deltas(pipe, read(toy)).items():
        deltas[name] = deltas[name] + 0.25 * delta
    with tiny.hooked(pipe, deltas):
        wanted = drawn_by_diffusers(pipe)
    report = generate(base, PROMPT, adapters=[(style, 1.0), (toy, 0.5)], strengths=[0.5], together=True, **QUICK)
    assert report.columns == ("style × 0.5 + toy × 0.25",) and apart(report.images[0], wanted) <= NEAR


def test_a_picture_depends_neither_on_the_batch_nor_on_the_seeds_before_it(base):
    prompts = [PROMPT, "dog"]
    together = generate(base, prompts, seed=4, images_per_prompt=2, batch=3, **QUICK)
    for row, (prompt, seed) in enumerate([(PROMPT, 4), (PROMPT, 5), ("dog", 4), ("dog", 5)]):
        assert apart(generate(base, prompt, seed=seed, **QUICK).images[0], together.images[row]) <= NEAR


def test_a_batch_alone_says_how_many_pictures_a_prompt_gets(base):
    assert [p.seed for p in generate(base, PROMPT, batch=3, seed=9, dry_run=True).pictures] == [9, 10, 11]


def test_a_merged_base_beside_draws_what_the_adapter_draws(base, style, tmp_path):
    merge(base, [(style, 0.8)], tmp_path / "merged")
    report = generate(base, PROMPT, adapters=[(style, 0.8)], beside=[tmp_path / "merged"], **QUICK)
    assert report.columns == ("style × 0.8", "merged")
    assert apart(*report.images) <= NEAR


@pytest.mark.parametrize("kind", ["sdxl", "sd3", "flux"])
def test_every_kind_of_pipeline_draws_with_and_without_an_adapter(kind, folders, adapter_for):
    adapter = adapter_for(kind, kind, 4.0)
    report = generate(folders(kind), PROMPT, adapters=[adapter], compare=True, size=16, steps=2)
    assert report.columns == ("base", kind) and apart(*report.images) > NEAR
    assert report.record["guidance"] == {"sdxl": 5.0, "sd3": 7.0, "flux": 3.5}[kind] and report.images[0].size == (
        16,
        16,
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_scheduler_draws(name, base):
    report = generate(base, PROMPT, steps=4, scheduler=name)
    assert report.record["scheduler_class"] == SAMPLERS[name].kind and report.images[0].getextrema()[0][1] > 0


def test_what_a_base_of_flow_matching_does_not_take_is_told(folders):
    assert generate(folders("sd3"), PROMPT, size=16, steps=2, scheduler="heun").images
    with pytest.raises(UsageError, match="--scheduler euler"):
        generate(folders("flux"), PROMPT, size=16, scheduler="heun")
    with pytest.raises(UsageError, match="does not support a flow-matching base"):
        generate(folders("sd3"), PROMPT, size=16, scheduler="ddim")
    with pytest.raises(UsageError, match="true_cfg_scale=4"):
        generate(folders("flux"), PROMPT, size=16, negative="blurred")
    plain = generate(folders("flux"), PROMPT, size=16, steps=2)
    negative = generate(folders("flux"), PROMPT, size=16, steps=2, negative="dog", more={"true_cfg_scale": 4})
    assert apart(plain.images[0], negative.images[0]) > 0


def test_sizes_of_a_packed_latent_are_told_by_their_own_measure(folders):
    from krona_hub.images.call_pipeline import size_step

    assert size_step(whole.flux()) == 2 and size_step(whole.sd15()) == 1
    assert size_step(whole.sd3()) == 2


def test_an_argument_that_the_pipeline_does_not_take_names_the_nearest(base):
    with pytest.raises(UsageError, match="Did you mean clip_skip"):
        generate(base, PROMPT, more={"clip_skipp": 1})
    with pytest.raises(UsageError, match="--set"):
        generate(base, PROMPT, steps=1, more={"guidance_rescale": "much"})


def test_a_single_file_is_drawn_with_the_configuration_of_a_folder(base, tmp_path):
    pipe = whole.sd15()
    path = single_file.save(pipe, tmp_path / "model.safetensors")
    with single_file.known("sd15", base), pytest.raises(IncompleteError, match="lacks weights of the pipeline"):
        generate(path, PROMPT, config=base, **QUICK)
    whole.with_ldm_vae(path, pipe.vae)
    with single_file.known("sd15", base):
        report = generate(path, PROMPT, config=base, **QUICK)
    wanted = generate(base, PROMPT, **QUICK)
    assert apart(report.images[0], wanted.images[0]) <= NEAR


def test_neighbouring_columns_are_compared_pixel_by_pixel(compared):
    assert [(d.first, d.second) for d in compared.differences] == [("base", "style × 0.8"), ("style × 0.8", "toy")]
    pixels = np.stack([np.asarray(image, float) for image in compared.images]).reshape(2, 3, -1)
    for number, difference in enumerate(compared.differences):
        wanted = np.abs(pixels[:, number + 1] - pixels[:, number]).mean()
        assert difference.levels == pytest.approx(wanted)


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(base, style, toy, tmp_path_factory):
    out = tmp_path_factory.mktemp("written") / "out"
    return generate(base, [PROMPT, "a dog"], adapters=[style, (toy, 0.5)], negative="blur", out=out, **QUICK)


def test_pictures_grid_and_record_lie_in_the_folder(written):
    names = [f"{n:03}.png" for n in range(1, 7)]
    assert sorted(p.name for p in written.out.iterdir()) == [*names, "grid.png", "record.json"]
    assert [p.file for p in written.pictures] == names
    for name, image in zip(names, written.images, strict=True):
        assert apart(Image.open(written.out / name), image) == 0


def test_the_record_says_what_made_the_pictures(written, base, style, toy):
    import hashlib

    record = json.loads((written.out / "record.json").read_text())
    shas = [hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in (style, toy)]
    assert [(a["source"], a["weight"], a["sha256"]) for a in record["adapters"]] == [
        (style, 1.0, shas[0]), (toy, 0.5, shas[1]),
    ]  # fmt: skip
    assert record["base"]["source"] == base and record["base"]["fingerprint"] and record["base"]["files"]
    assert (record["seed"], record["steps"], record["guidance"], record["negative"]) == (0, 2, 3.0, "blur")
    assert record["scheduler_class"] == "DDIMScheduler" and record["size"] == [16, 16]
    assert {"krona_hub", "torch", "diffusers", "transformers"} == set(record["versions"])
    assert [p["adapters"] for p in record["pictures"]][:3] == [{}, {"style": 1.0}, {"toy": 0.5}]


def test_a_picture_carries_its_own_record_for_programs_and_for_people(written):
    info = Image.open(written.out / "006.png").info
    record = json.loads(info["krona"])
    assert record["prompts"] == ["a dog"] and [(a["name"], a["weight"]) for a in record["adapters"]] == [("toy", 0.5)]
    assert info["parameters"].splitlines()[:2] == ["a dog", "Negative prompt: blur"]
    assert "Steps: 2" in info["parameters"] and "Adapters: toy:0.5" in info["parameters"]


def test_the_grid_names_columns_and_rows(written):
    """Each label's place has ink on it, and none where there is no label; the pictures stand where they belong."""
    grid = np.asarray(Image.open(written.out / "grid.png").convert("L"))
    cells = 192, 192
    assert grid.shape[1] > 3 * cells[0] and grid.shape[0] > 2 * cells[1]
    heads = grid[: grid.shape[0] - 2 * (cells[1] + 6) - 40, -3 * (cells[0] + 6) :]
    thirds = np.array_split(heads, 3, axis=1)
    assert all((third < 128).any() for third in thirds)
    assert (grid[:, : grid.shape[1] - 3 * (cells[0] + 6) - 10] < 128).any()


@pytest.mark.parametrize("which", ["record.json", "", "005.png"])
def test_again_makes_the_same_pictures(which, written, tmp_path):
    report = generate(again=written.out / which, out=tmp_path / "again")
    assert report.same == len(report.pictures) == (1 if which.endswith("png") else 6)


def test_again_with_another_seed_makes_others_and_compares_nothing(written, tmp_path):
    report = generate(again=written.out / "005.png", seed=3)
    assert report.same is None and report.pictures[0].seed == 3 and report.pictures[0].prompt == "a dog"


def test_again_refuses_another_adapter_under_the_old_name(base, style, toy, tmp_path):
    copy = tmp_path / "adapter.safetensors"
    copy.write_bytes(Path(style).read_bytes())
    generate(base, PROMPT, adapters=[copy], out=tmp_path / "out", **QUICK)
    copy.write_bytes(Path(toy).read_bytes())
    with pytest.raises(IntegrityError, match="sha256"):
        generate(again=tmp_path / "out/record.json")


def test_again_finds_what_was_moved_with_its_record(base, style, tmp_path):
    (tmp_path / "a").mkdir()
    copy = tmp_path / "a/adapter.safetensors"
    copy.write_bytes(Path(style).read_bytes())
    generate(base, PROMPT, adapters=[copy], out=tmp_path / "a/out", **QUICK)
    (tmp_path / "a/out/adapter.safetensors").write_bytes(Path(style).read_bytes())
    copy.unlink()
    assert generate(again=tmp_path / "a/out/record.json").same == 1


def test_what_holds_no_record_says_so(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    for name in ("x.json", "x.png", "broken.png"):
        with pytest.raises(FormatError, match="contains no record"):
            generate(again=tmp_path / name)
    with pytest.raises(NotFoundError):
        generate(again=tmp_path / "nothing.json")


def test_overwriting_takes_away_the_pictures_of_the_run_before_and_nothing_else(base, tmp_path):
    out = tmp_path / "out"
    generate(base, PROMPT, images_per_prompt=3, out=out, **QUICK)
    (out / "notes.txt").write_text("mine")
    (out / "004.png").write_text("mine")
    with pytest.raises(ConflictError, match="--overwrite"):
        generate(base, PROMPT, out=out, **QUICK)
    generate(base, PROMPT, out=out, overwrite=True, **QUICK)
    assert sorted(p.name for p in out.iterdir()) == ["001.png", "004.png", "notes.txt", "record.json"]


def test_a_folder_of_other_things_is_never_written_to(base, tmp_path):
    (tmp_path / "holiday.png").write_text("mine")
    with pytest.raises(ConflictError, match="not an output of krona generate"):
        generate(base, PROMPT, out=tmp_path, overwrite=True)


def test_nothing_is_written_by_a_dry_run_or_where_the_base_is_wrong(base, style, tmp_path):
    report = generate(base, PROMPT, adapters=[style], compare=True, out=tmp_path / "out", dry_run=True)
    assert not report.written and [p.column for p in report.pictures] == ["base", "style"]
    with pytest.raises(UnknownBaseError, match="weights of the base model are needed"):
        generate("sdxl", PROMPT, out=tmp_path / "out")
    with pytest.raises(UnknownBaseError, match="is not a pipeline"):
        generate(Path(base) / "unet", PROMPT, out=tmp_path / "out")
    with pytest.raises(UsageError, match="variant"):
        generate(base, PROMPT, variant="fp16", out=tmp_path / "out")
    with pytest.raises(NoDeviceError, match="Device cuda:77 is not available"):
        generate(base, PROMPT, device="cuda:77", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_progress_counts_steps_of_all_pictures_to_the_end(base, style):
    seen = []
    generate(base, [PROMPT, "b"], adapters=[style], compare=True, batch=2, images_per_prompt=1, steps=3,
             progress=lambda done, total: seen.append((done, total)))  # fmt: skip
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (12, 12) and {total for _, total in seen} == {12}


def test_a_prompt_without_the_trigger_words_and_one_that_is_cut_are_told(base, style, tmp_path):
    from dataclasses import replace

    from krona_hub import write

    adapter = read(style)
    adapter = replace(adapter, provenance=replace(adapter.provenance, trigger_words=("zorbi",)))
    write(adapter, tmp_path / "toy.safetensors", base=base)
    notes = generate(base, "a " * 40, adapters=[tmp_path / "toy.safetensors"], steps=1).notes
    assert any("zorbi" in note for note in notes) and any("uses the first 16" in note for note in notes)
    notes = generate(base, "a zorbi", adapters=[tmp_path / "toy.safetensors"], steps=1).notes
    assert not any("zorbi" in note for note in notes)
