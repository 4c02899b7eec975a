"""Image files of every kind, the sources of captions, and the order of training examples."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from krona_hub.errors import DataError, NotFoundError
from krona_hub.pipelines.randomness import noise, permutation
from krona_hub.training.configuration import checked
from krona_hub.training.data.batches import Batches
from krona_hub.training.data.captions import fixed_caption, sample_caption
from krona_hub.training.data.dataset import image_folder, read_folder, split_held_out
from krona_hub.training.data.images import bucket_sizes, fitted, nearest_bucket, open_image
from tests.shared import shared


def saved(tmp_path, image, name="a.png", **more):
    image.save(tmp_path / name, **more)
    return tmp_path / name


def pixels(path):
    return np.asarray(open_image(path))


# --- images ----------------------------------------------------------------------------------------------------------


def test_a_phone_picture_is_turned_upright(tmp_path):
    image = Image.new("RGB", (20, 10), "black")
    image.paste("white", (0, 0, 5, 10))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise by a quarter
    path = saved(tmp_path, image, "a.jpg", exif=exif, quality=95)
    upright = pixels(path)
    assert upright.shape == (20, 10, 3)
    assert upright[1].mean() > 240 and upright[-2].mean() < 15


def test_what_is_transparent_becomes_white_in_every_mode(tmp_path):
    clear = Image.new("RGBA", (4, 4), (200, 0, 0, 0))
    assert (pixels(saved(tmp_path, clear)) == 255).all()
    assert (pixels(saved(tmp_path, clear.convert("LA"), "b.png")) == 255).all()
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    assert (pixels(saved(tmp_path, palette, "c.png", transparency=1)) == 255).all()


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    deep = np.array([[0, 128 * 257, 65535]], np.uint16)
    assert pixels(saved(tmp_path, Image.fromarray(deep)))[0, :, 0].tolist() == [0, 128, 255]


def test_cmyk_grey_and_palette_become_rgb(tmp_path):
    for name, mode in (("a.jpg", "CMYK"), ("b.png", "L"), ("c.png", "P"), ("d.png", "1")):
        path = saved(tmp_path, Image.new("RGB", (8, 8), "white").convert(mode), name)
        assert pixels(path).shape == (8, 8, 3) and pixels(path).min() > 250


def test_a_broken_picture_is_named(tmp_path):
    good = saved(tmp_path, Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), "a.jpg")
    short, text, empty = tmp_path / "short.jpg", tmp_path / "text.png", tmp_path / "empty.webp"
    short.write_bytes(good.read_bytes()[:700])
    text.write_text("<html>")
    empty.write_bytes(b"")
    for path in (short, text, empty):
        with pytest.raises(DataError, match=path.name):
            open_image(path)


def test_a_picture_whose_exif_is_broken_is_named(tmp_path, monkeypatch):
    from PIL import ImageOps

    def broken(image):
        raise struct.error("required argument is not an integer")

    path = saved(tmp_path, Image.new("RGB", (8, 8)))
    monkeypatch.setattr(ImageOps, "exif_transpose", broken)
    with pytest.raises(DataError, match=r"a\.png is corrupt"):
        open_image(path)


def test_a_decompression_bomb_is_refused(tmp_path):
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    import zlib

    chunk = b"IHDR" + header
    body = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(DataError, match=r"bomb\.png"):
        open_image(tmp_path / "bomb.png")


def test_a_picture_is_scaled_to_cover_its_bucket_and_cut_in_the_middle():
    image = Image.new("RGB", (30, 10), "black")
    image.paste("white", (10, 0, 20, 10))
    cut, corner = fitted(image, (10, 10))
    assert (cut == 255).all() and corner == (0, 10)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_bad_files_are_all_named_and_left_out_on_request(tmp_path):
    saved(tmp_path, Image.new("RGB", (8, 8)))
    for name in ("x.png", "y.jpg"):
        (tmp_path / name).write_text("no picture")
    with pytest.raises(DataError, match=r"2 of 3.*x\.png.*y\.jpg"):
        read_folder(tmp_path, "a photo")
    data = read_folder(tmp_path, "a photo", skip_bad=True)
    assert [e.path.name for e in data.examples] == ["a.png"] and set(data.bad) == {"x.png", "y.jpg"}


def test_captions_come_from_metadata_then_text_files_then_the_prompt(tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png", "in/c.png", "d.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "from the\ttable"}) + "\n\n")
    (tmp_path / "in/metadata.jsonl").write_text(json.dumps({"file_name": "c.png", "caption": "from below"}))
    (tmp_path / "a.txt").write_text("not this")
    (tmp_path / "b.txt").write_text("\ufefffrom\nthe file \n", "utf-8")
    captions = {e.path.name: e.caption for e in read_folder(tmp_path, "the prompt").examples}
    assert captions == {
        "a.png": "from the table", "b.png": "from the file", "c.png": "from below", "d.png": "the prompt"
    }  # fmt: skip


def test_a_picture_without_a_caption_and_a_broken_table_are_told(tmp_path):
    saved(tmp_path, Image.new("RGB", (8, 8)))
    with pytest.raises(DataError, match=r"no caption: a\.png"):
        read_folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}')
    with pytest.raises(DataError, match=r"Line 1 of metadata\.jsonl"):
        read_folder(tmp_path, "x")


def test_a_table_as_windows_and_other_tools_write_it_is_read(tmp_path):
    saved(tmp_path, Image.new("RGB", (8, 8)))
    row = json.dumps({"file_name": "a.png", "text": "one\u2028line"}, ensure_ascii=False)
    (tmp_path / "metadata.jsonl").write_bytes(f"\ufeff{row}\r\n".encode())
    assert [e.caption for e in read_folder(tmp_path).examples] == ["one line"]


def test_a_table_that_is_no_utf8_or_names_what_is_not_there_is_told(tmp_path):
    saved(tmp_path, Image.new("RGB", (8, 8)))
    table = tmp_path / "metadata.jsonl"
    table.write_bytes('{"file_name": "a.png", "text": "café"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"metadata\.jsonl is not valid UTF-8"):
        read_folder(tmp_path, "x")
    table.write_text('{"file_name": "b.png", "text": "a toy"}')
    with pytest.raises(DataError, match=r"do not exist: b\.png"):
        read_folder(tmp_path, "x")
    assert [e.caption for e in read_folder(tmp_path, "x", skip_bad=True).examples] == ["x"]


def test_a_missing_and_an_empty_folder_are_told(tmp_path):
    with pytest.raises(NotFoundError):
        read_folder(tmp_path / "none")
    with pytest.raises(DataError, match="No images found"):
        read_folder(tmp_path)


def test_real_photographs_are_read():
    data = read_folder(shared("real", "photos", "monster_toy"), "a photo")
    assert len(data.examples) == 5 and all(min(e.size) > 100 for e in data.examples)


def test_held_out_pictures_are_not_trained_on(photos):
    data, held = split_held_out(read_folder(photos, "x"), 2, lambda n: permutation(n, 3, "held out"))
    names = {e.path.name for e in held}
    assert len(held) == 2 and not names & {e.path.name for e in data.examples} and len(data.examples) == 3
    with pytest.raises(DataError):
        split_held_out(data, 3, lambda n: list(range(n)))


def test_the_fingerprint_sees_pixels_and_captions(tmp_path):
    saved(tmp_path, Image.new("RGB", (8, 8)))
    first = read_folder(tmp_path, "x").fingerprint
    assert read_folder(tmp_path, "y").fingerprint != first
    saved(tmp_path, Image.new("RGB", (8, 8), "red"))
    assert read_folder(tmp_path, "x").fingerprint != first


# --- captions, buckets, order ----------------------------------------------------------------------------------------


def test_shuffled_captions_keep_their_first_parts_and_their_words():
    settings = checked({"caption_shuffle": True, "keep_parts": 2, "trigger_word": "sks"})
    drawn = {sample_caption("one, two, three, four", settings, step, 0) for step in range(20)}
    assert len(drawn) > 2 and all(d.startswith("sks, one, ") for d in drawn)
    assert {frozenset(d.split(", ")) for d in drawn} == {frozenset({"sks", "one", "two", "three", "four"})}


def test_captions_are_dropped_as_often_as_asked():
    settings = checked({"caption_dropout": 0.25})
    empty = sum(not sample_caption("x", settings, step, 0) for step in range(400))
    assert 70 < empty < 130
    assert fixed_caption("x", settings) == "x"


@pytest.mark.parametrize(("resolution", "multiple"), [(64, 16), (512, 64), (1024, 64), (100, 16)])
def test_buckets_are_multiples_and_no_larger_than_the_square(resolution, multiple):
    sizes = bucket_sizes(resolution, multiple)
    assert all(w % multiple == h % multiple == 0 and w * h <= resolution**2 for w, h in sizes)
    assert {(h, w) for w, h in sizes} == set(sizes)
    assert nearest_bucket((7, 7), sizes) == (resolution // multiple * multiple,) * 2


def test_every_picture_comes_once_an_epoch_in_groups_of_one_bucket():
    batches = Batches(("a", "b", "a", "b", "a", "a"), 2, 1, 1, seed=1)
    for epoch in range(3):
        parts = [batches.parts(epoch * 3 + i, 0)[0] for i in range(batches.per_epoch)]
        assert sorted(i for p in parts for i in p.examples) == list(range(6))
        assert all(len({batches.buckets[i] for i in p.examples}) == 1 for p in parts)


def test_two_processes_share_the_pictures_that_one_would_have():
    one, two = (Batches(("a",) * 7, n, 3, p, seed=1) for n, p in ((4, 1), (2, 2)))
    for step in range(5):
        for number in range(3):
            whole = one.parts(step, 0)[number]
            halves = [two.parts(step, process)[number] for process in (0, 1)]
            assert whole.examples == halves[0].examples + halves[1].examples
            assert whole.samples == halves[0].samples + halves[1].samples


def test_noise_belongs_to_the_sample_and_not_to_the_batch():
    together, alone = noise((2, 3, 3), 7, 5, [0, 1], 0.1), noise((2, 3, 3), 7, 5, [1], 0.1)
    assert (together[1] == alone[0]).all() and (together[0] != together[1]).any()
    assert (noise((2, 3, 3), 7, 6, [1], 0.1) != alone).any()


def test_a_run_that_is_named_as_the_shipped_pictures_does_not_hide_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = image_folder("zorbi")
    run = tmp_path / "zorbi"
    run.mkdir()
    assert image_folder("zorbi") == shipped  # it is empty yet
    Image.new("RGB", (8, 8)).save(run / "sample.png")
    (run / "config.toml").touch()
    assert image_folder("zorbi") == shipped
    (run / "config.toml").unlink()
    assert image_folder("zorbi") == Path("zorbi")
