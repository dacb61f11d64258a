"""Inspecting a cache: its card, one sample, its tree, and the picture of its reconstructions."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ci2p_cache as cc
from ci2p_cache.cache.index import read_index
from ci2p_cache.cache.summary import CacheCard, describe, describe_sample, folder_tree
from ci2p_cache.errors import (
    IncompleteCacheError,
    RefusedError,
    ResourceError,
    SourceError,
    UsageError,
)
from ci2p_cache.pictures import previews
from ci2p_cache.pictures.previews import draw_preview
from ci2p_cache.record import sealed_bytes
from tests.support.pictures import picture, write_image_folder
from tests.support.tiers import thinned

NUM_GOOD = 29


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A source with a bad file, and its cache of three train shards; read only."""
    root = tmp_path_factory.mktemp("inspect")
    source = write_image_folder(root / "images", {"ant": 12, "bee": 9, "cat": 8})
    (source / "bee" / "broken.jpg").write_bytes((source / "bee" / "000.jpg").read_bytes()[:300])
    options = cc.EncodeOptions(
        encoder="bundled", size=64, val_fraction=0.25, shard_samples=8, max_errors="1"
    )
    cc.encode(source, root / "shards", options)
    return root


@pytest.fixture
def cache(folder):
    return cc.open_cache(folder / "shards")


def png_size(path: str | Path) -> tuple[int, int]:
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return image.size


def known(values: tuple[float | None, ...]) -> list[float]:
    assert None not in values
    return [value for value in values if value is not None]


def half_encoded(cache: cc.Cache, to: Path) -> cc.Cache:
    """Copies a cache as a run leaves it that was killed while train shard 1 was missing."""
    shutil.copytree(cache.path, to)
    (to / "commits" / "train-000001.json").unlink()
    data = json.loads((to / "cache.json").read_text())
    data["state"], data["files"] = "encoding", []
    for record in data["splits"].values():
        for name in ("valid_rows", "bytes", "source_bytes", "clipped", "exif_turned"):
            record[name] = None
    (to / "cache.json").write_bytes(sealed_bytes(data))
    shutil.rmtree(to / "latents.zarr" / "train" / "valid")
    return cc.open_cache(to, partial=True)


def test_the_card_counts_what_the_arrays_hold(cache):
    card = describe(cache)
    assert card.complete
    assert [split.name for split in card.splits] == ["train", "val"]
    for split in card.splits:
        held = cache[split.name]
        assert split.shape == held.latents.shape
        assert split.rows == held.num_rows
        assert split.valid_rows == len(held.valid_rows)
        labels = held.labels[held.valid].tolist()
        assert split.class_counts == tuple(labels.count(label) for label in range(3))
    assert card.images == NUM_GOOD
    assert card.bad_images == 1
    assert sum(split.bad_rows for split in card.splits) == 1
    assert card.committed_shards == card.shards == sum(split.shards for split in card.splits)


def test_the_card_s_sizes_are_those_on_disk(folder, cache):
    card = describe(cache)
    files = [path for path in (folder / "shards").rglob("*") if path.is_file()]
    stored = [path for path in files if path.name.startswith("c.") and "latents" in path.parts]
    parts = list((folder / "shards" / "index").iterdir())
    assert card.disk_bytes == sum(path.stat().st_size for path in files)
    assert card.stored_bytes == sum(path.stat().st_size for path in [*stored, *parts])
    assert card.bytes_per_image == card.stored_bytes / NUM_GOOD
    views = sum(len(split.valid_rows) * split.num_views for split in cache.values())
    assert card.bytes_per_view == card.stored_bytes / views
    assert NUM_GOOD < views < 2 * NUM_GOOD
    good = [p for p in (folder / "images").rglob("*.jpg") if p.name != "broken.jpg"]
    assert card.source_ratio == card.stored_bytes / sum(path.stat().st_size for path in good)


def test_the_card_names_encoder_and_settings_and_survives_json(folder, cache):
    card = describe(cache)
    assert card.fingerprint.encoder.weights_sha256 == cc.load_encoder("bundled").spec.weights_sha256
    assert card.fingerprint_digest == cache.fingerprint.digest
    assert card.fingerprint.image.size == 64
    assert card.source == str(folder / "images")
    assert CacheCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card


def test_an_incomplete_cache_is_described_as_far_as_it_is_committed(cache, tmp_path):
    part = half_encoded(cache, tmp_path / "half")
    card, whole = describe(part), describe(cache)
    train = card.splits[0]
    index = [read_index(cache.path, "train", shard) for shard in (0, 2)]
    good = [
        row
        for table in index
        for row in table.select(["label", "status"]).to_pylist()
        if row["status"] == "ok"
    ]
    assert not card.complete
    assert (train.committed_shards, train.shards) == (whole.splits[0].shards - 1, 3)
    assert train.valid_rows == len(good)
    assert sum(train.class_counts) == len(good)
    assert card.splits[1] == whole.splits[1]
    assert 0 < card.stored_bytes < whole.stored_bytes


def test_a_sample_is_the_same_by_row_and_by_key(folder, cache):
    key = read_index(cache.path, "train", 1)["key"][2].as_py()
    sample = describe_sample(cache, "train", key=key)
    assert sample.row == 8 + 2
    assert sample.shard == 1
    assert sample == describe_sample(cache, "train", row=sample.row)
    data = (folder / "images" / key).read_bytes()
    with Image.open(folder / "images" / key) as image:
        assert (sample.width, sample.height, sample.mode) == (*image.size, "RGB")
    assert sample.source_bytes == len(data)
    assert sample.source_file == str(folder / "images" / key)
    assert sample.class_name == cache.classes[sample.label] == key.split("/")[0]
    assert [box["flip"] for box in sample.boxes or ()] == [False, True]
    shown = json.loads(json.dumps(sample.to_dict()))
    assert list(shown) == [
        "split", "row", "shard", "key", "label", "class_name", "class_title", "source_file",
        "source_bytes", "source_sha256", "width", "height", "mode", "format", "exif_orientation",
        "boxes", "status", "error", "clipped", "latents",
    ]  # fmt: skip
    assert [list(box) for box in shown["boxes"]] == [["top", "left", "height", "width", "flip"]] * 2
    assert {"stored_bytes", "raw_bytes", "minimum", "maximum", "mean", "zero_share"} == set(
        shown["latents"][1]
    )


def test_a_sample_s_statistics_are_those_of_the_stored_symbols(cache):
    sample = describe_sample(cache, "train", row=3)
    for view, latent in enumerate(sample.latents):
        symbols = np.asarray(cache["train"].latents[3, view]).astype(np.float64)
        assert latent.raw_bytes == symbols.size
        assert (latent.minimum, latent.maximum) == (symbols.min(), symbols.max())
        assert latent.mean == pytest.approx(symbols.mean())
        assert latent.zero_share == pytest.approx((symbols == 0).mean())


def test_the_stored_bytes_of_all_views_and_the_index_make_the_shard(cache):
    shard = cache["val"].open_shard(0).path
    rows = [row for row in cache["val"].valid_rows.tolist() if row < 8]
    stored = sum(
        latent.stored_bytes
        for row in rows
        for latent in describe_sample(cache, "val", row=row).latents
    )
    assert stored + 8 * 16 + 4 == shard.stat().st_size


def test_a_sample_that_could_not_be_decoded_says_why(cache):
    split = next(name for name in cache.splits if not cache[name].valid.all())
    row = int(np.flatnonzero(~cache[split].valid)[0])
    sample = describe_sample(cache, split, row=row)
    assert sample.key == "bee/broken.jpg"
    assert sample.status == "invalid"
    assert sample.error
    assert sample.latents == ()


def test_a_key_that_is_not_there_is_answered_with_one_like_it(cache):
    key = describe_sample(cache, "train", row=0).key
    for wrong in (key.replace(".jpg", ".jpeg"), key.split("/")[1], key.upper()):
        with pytest.raises(UsageError, match="no sample of split 'train'") as caught:
            describe_sample(cache, "train", key=wrong)
        assert ".jpg" in str(caught.value.hint)
    with pytest.raises(UsageError) as caught:
        describe_sample(cache, "train", key=key.replace(".jpg", ".png"))
    assert caught.value.hint == f"did you mean {key}?" or key.split("/")[1] in str(
        caught.value.hint
    )


@pytest.mark.parametrize(("row", "key"), [(None, None), (0, "ant/000.jpg")])
def test_a_sample_wants_a_row_or_a_key_and_not_both(cache, row, key):
    with pytest.raises(UsageError, match="one of `row` and `key`"):
        describe_sample(cache, "train", row=row, key=key)


@pytest.mark.parametrize("row", [-1, 10_000])
def test_a_row_outside_the_split_is_refused(cache, row):
    with pytest.raises(UsageError, match=f"row {row} is not in split 'train'"):
        describe_sample(cache, "train", row=row)


def test_a_row_that_is_not_encoded_yet_is_said_to_be(cache, tmp_path):
    part = half_encoded(cache, tmp_path / "half")
    with pytest.raises(IncompleteCacheError, match="row 9 of split 'train' is in shard 1"):
        describe_sample(part, "train", row=9)
    assert describe_sample(part, "train", row=3) == describe_sample(cache, "train", row=3)


def test_the_tree_accounts_for_every_file(folder, cache):
    entries = folder_tree(cache.path)
    files = [path for path in cache.path.rglob("*") if path.is_file()]
    assert sum(entry.files for entry in entries) == len(files)
    assert sum(entry.bytes for entry in entries) == sum(path.stat().st_size for path in files)
    by_path = {entry.path: entry for entry in entries}
    assert by_path["latents.zarr/train/latents/"].shards == 3
    assert by_path["index/"].files == by_path["commits/"].files == describe(cache).shards
    assert by_path["cache.json"].files == 1


@pytest.mark.slow
def test_card_and_sample_need_no_compressai(cache):
    code = f"""
        import sys

        class Block:
            def find_spec(self, name, path=None, target=None):
                if name.partition(".")[0] == "compressai":
                    raise ImportError("compressai is blocked")

        sys.meta_path.insert(0, Block())
        import ci2p_cache as cc
        from ci2p_cache.cache.summary import describe, folder_tree
        from ci2p_cache.cache.summary import describe_sample

        cache = cc.open_cache({str(cache.path)!r})
        print(describe(cache).images, len(folder_tree(cache.path)))
        print(describe_sample(cache, "train", row=0).key)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == str(NUM_GOOD)
    assert done.stdout.split()[-1] == describe_sample(cache, "train", row=0).key


def test_the_preview_decodes_smooth_pictures_well(cache, tmp_path):
    result = draw_preview(cache, tmp_path / "out" / "preview.png", count=3)
    width, height = png_size(result.path)
    assert width > 5 * 256
    assert height > 3 * 256
    assert result.rounded
    for sample in result.samples:
        card = describe_sample(cache, "train", key=sample.key)
        assert sample.row == card.row
        assert sample.source == "unchanged"
        assert sample.stored_bytes == tuple(latent.stored_bytes for latent in card.latents)
        assert all(25 < value < 60 for value in known(sample.psnr_db))
        assert all(0.1 < value < 8 for value in known(sample.bpp))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["preview.png"]
    # The default rows are spread over the split and hold latents.
    rows = [sample.row for sample in result.samples]
    assert rows == sorted(set(rows))
    assert len(rows) == 3
    assert set(rows) <= set(cache["train"].valid_rows.tolist())
    assert rows[-1] - rows[0] > cache["train"].num_rows / 2


def test_the_preview_s_psnr_is_that_of_a_reconstruction_made_by_hand(cache, tmp_path):
    result = draw_preview(cache, tmp_path / "a.png", split="val", rows=[0])
    encoder = cc.load_encoder("bundled")
    y, _ = cache["val"][0]
    decoded = encoder.decode(y).clamp(0, 1)[0]
    card = describe_sample(cache, "val", row=0)
    with Image.open(card.source_file) as image:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    from torchvision.transforms.v2.functional import center_crop, resize

    square = center_crop(resize(pixels, [64], antialias=True), [64, 64]) / 255
    psnr_db = -10 * math.log10(float((decoded - square).square().mean()))
    assert len(result.samples[0].psnr_db) == 1
    assert result.samples[0].psnr_db[0] == pytest.approx(psnr_db, abs=1e-3)
    assert result.samples[0].bpp[0] == pytest.approx(float(encoder.bits(y)[0]) / 64**2)


def test_encode_and_inspect_say_the_same_size(run, folder):
    shown = [
        run("encode", folder / "images", "--out", folder / "shards", "--encoder", "bundled",
            "--size", 64, "--val-fraction", 0.25, "--shard-samples", 8, "--max-errors", 1),
        run("inspect", folder / "shards"),
    ]  # fmt: skip
    sizes = [re.findall(r"(?m)^  size .*?, (.* per view, .* source files)$", r.out) for r in shown]
    assert len(sizes[0]) == 1
    assert sizes[0] == sizes[1]


def test_by_default_every_class_is_shown_once(cache, tmp_path, monkeypatch):
    result = draw_preview(cache, tmp_path / "a.png", split="val")
    assert [sample.class_title for sample in result.samples] == ["ant", "bee", "cat"]
    monkeypatch.setattr(previews, "_MAX_SAMPLES", 2)
    result = draw_preview(cache, tmp_path / "a.png", split="val")
    assert [sample.class_title for sample in result.samples] == ["ant", "cat"]


def test_all_maps_have_one_colour_scale(cache, tmp_path):
    rows = cache["train"].valid_rows[[0, -1]].tolist()
    heights = []
    for shown in (rows[:1], rows):
        path = draw_preview(cache, tmp_path / "a.png", rows=shown).path
        with Image.open(path) as image:
            heights.append(image.height)
            pixels = np.asarray(image.convert("RGB"))
    # The brightest colour is where the highest value of all maps is, and there alone.
    bright = np.flatnonzero((pixels == (253, 231, 36)).all(axis=-1).any(axis=1))
    in_rows = {int(y) // (heights[1] - heights[0]) for y in bright - 40}
    assert len(in_rows - {2}) == 1


@pytest.mark.slow
def test_more_rows_than_there_are_draws_all_of_them(cache, tmp_path):
    result = draw_preview(cache, tmp_path / "a.png", split="val", count=64)
    assert [sample.row for sample in result.samples] == cache["val"].valid_rows.tolist()


@pytest.fixture
def moved(cache, folder, tmp_path):
    """A copy of the cache and of its source, whose manifest speaks of a place that is gone."""
    shutil.copytree(cache.path, tmp_path / "shards")
    shutil.copytree(folder / "images", tmp_path / "images")
    manifest = tmp_path / "shards" / "cache.json"
    data = json.loads(manifest.read_text())
    data["source"] = str(tmp_path / "gone")
    manifest.write_bytes(sealed_bytes(data))
    return cc.open_cache(tmp_path / "shards")


def test_a_preview_works_without_the_source(moved, tmp_path):
    result = draw_preview(moved, tmp_path / "a.png", count=1)
    png_size(result.path)
    for sample in result.samples:
        assert sample.source == "missing"
        assert sample.psnr_db == (None, None)
        assert all(value > 0 for value in known(sample.bpp))


def test_a_source_that_was_moved_can_be_named(moved, tmp_path):
    result = draw_preview(moved, tmp_path / "a.png", count=1, source=tmp_path / "images")
    assert [sample.source for sample in result.samples] == ["unchanged"]
    with pytest.raises(SourceError, match="nowhere"):
        draw_preview(moved, tmp_path / "a.png", source=tmp_path / "nowhere")


def test_a_changed_or_deleted_original_is_not_compared_with(moved, tmp_path):
    rows = moved["train"].valid_rows[:3].tolist()
    keys = [describe_sample(moved, "train", row=row).key for row in rows]
    picture(999, 101, 77).save(tmp_path / "images" / keys[0])
    (tmp_path / "images" / keys[1]).unlink()
    result = draw_preview(moved, tmp_path / "a.png", rows=rows, source=tmp_path / "images")
    assert [sample.source for sample in result.samples] == ["changed", "missing", "unchanged"]
    assert result.samples[0].psnr_db == (None, None)
    assert min(known(result.samples[2].psnr_db)) > 25


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_a_float_cache_is_decoded_without_rounding(image_folder, tmp_path, dtype):
    options = cc.EncodeOptions(encoder="bundled", size=64, val_fraction=0.25, dtype=dtype, limit=6)
    cc.encode(image_folder, tmp_path / "shards", options)
    floats = cc.open_cache(tmp_path / "shards")
    result = draw_preview(floats, tmp_path / "a.png", count=1)
    assert not result.rounded
    for sample in result.samples:
        assert min(known(sample.psnr_db)) > 25
        assert all(value > 0 for value in known(sample.bpp))


@pytest.mark.slow
def test_the_rate_of_a_float_cache_is_that_of_its_rounded_latents(image_folder, tmp_path):
    samples = []
    for dtype in ("int16", "float32"):
        options = cc.EncodeOptions(encoder="bundled", size=64, dtype=dtype, limit=5)
        cc.encode(image_folder, tmp_path / dtype, options)
        cache = cc.open_cache(tmp_path / dtype)
        samples.append(draw_preview(cache, tmp_path / f"{dtype}.png", rows=[1]).samples[0])
    rounded, floats = samples
    assert floats.key == rounded.key
    assert floats.bpp == pytest.approx(rounded.bpp, rel=1e-6)
    assert all(a > b for a, b in zip(known(floats.psnr_db), known(rounded.psnr_db), strict=True))
    assert min(floats.stored_bytes) > 4 * max(rounded.stored_bytes)


@pytest.mark.slow
def test_crops_are_shown_beside_their_own_originals(image_folder, tmp_path):
    options = cc.EncodeOptions(encoder="bundled", size=64, views="crops:3", limit=4)
    cc.encode(image_folder, tmp_path / "shards", options)
    result = draw_preview(cc.open_cache(tmp_path / "shards"), tmp_path / "a.png", count=1)
    assert len(result.samples[0].psnr_db) == 2
    assert min(known(result.samples[0].psnr_db)) > 25
    assert png_size(result.path)[0] > 6 * 256


def test_odd_names_are_drawn_as_text(tmp_path):
    names = {"$x_1^2$ {a}": 1, "\u82b1 flower": 1, "stra\u00dfe": 1}
    source = write_image_folder(tmp_path / "images", names)
    options = cc.EncodeOptions(encoder="bundled", size=64, val_fraction=0)
    cc.encode(source, tmp_path / "shards", options)
    result = draw_preview(cc.open_cache(tmp_path / "shards"), tmp_path / "a.png")
    assert {sample.class_title for sample in result.samples} == set(names)


def test_a_preview_of_a_half_encoded_cache_shows_what_is_committed(cache, tmp_path):
    part = half_encoded(cache, tmp_path / "half")
    result = draw_preview(part, tmp_path / "a.png", count=3)
    assert all(not 8 <= sample.row < 16 for sample in result.samples)
    assert all(min(known(sample.psnr_db)) > 25 for sample in result.samples)


def test_rows_that_cannot_be_drawn_are_refused(cache, tmp_path):
    bad = next(name for name in cache.splits if not cache[name].valid.all())
    row = int(np.flatnonzero(~cache[bad].valid)[0])
    with pytest.raises(UsageError, match="holds no latent"):
        draw_preview(cache, tmp_path / "a.png", split=bad, rows=[row])
    with pytest.raises(UsageError, match="row 999 is not in split"):
        draw_preview(cache, tmp_path / "a.png", rows=[999])
    with pytest.raises(UsageError, match="0 samples to draw"):
        draw_preview(cache, tmp_path / "a.png", rows=[])
    assert not (tmp_path / "a.png").exists()


def test_a_place_that_cannot_be_written_is_said_to_be(cache, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ResourceError, match="cannot write the picture"):
        draw_preview(cache, tmp_path / "file" / "a.png", count=1)


@pytest.fixture(scope="module")
def drawn(folder, tmp_path_factory):
    """A picture of one sample; read only."""
    path = tmp_path_factory.mktemp("drawn") / "first.png"
    return draw_preview(cc.open_cache(folder / "shards"), path, count=1).path


class TestWhereThePictureGoes:
    @pytest.mark.parametrize(
        ("name", "kind"),
        thinned(
            [("a.jpg", "JPEG"), ("a.jpeg", "JPEG"), ("a.PNG", "PNG"), ("a.png", "PNG")], step=4
        ),
    )
    def test_it_is_of_the_format_that_its_name_says(self, cache, drawn, tmp_path, name, kind):
        wanted = png_size(drawn)
        for _ in range(2):
            # The second time in the place of the first.
            draw_preview(cache, tmp_path / name, count=1)
            with Image.open(tmp_path / name) as image:
                image.load()
                assert (image.format, image.size) == (kind, wanted)

    @pytest.mark.slow
    def test_a_pdf_is_one_and_the_same_again(self, cache, tmp_path):
        path = tmp_path / "a.pdf"
        draw_preview(cache, path, count=1)
        first = path.read_bytes()
        assert first.startswith(b"%PDF-")
        draw_preview(cache, path, count=1)
        assert path.read_bytes() == first

    @pytest.mark.parametrize("name", ["x.svg", "x.webp", "x.txt", "x", "x.png.zip", "png"])
    def test_another_suffix_is_refused_before_anything_is_shown(self, run, cache, tmp_path, name):
        ran = run("inspect", cache.path, "--row", "0", "--picture", tmp_path / name)
        assert (ran.code, ran.out) == (2, "")
        assert "does not end in .pdf or .jpeg or .jpg or .png" in " ".join(ran.err.split())
        assert not list(tmp_path.iterdir())

    def test_a_photograph_is_not_replaced(self, run, cache, tmp_path):
        # Whoever takes --picture for the picture to look at must not lose it.
        photo = write_image_folder(tmp_path / "photos", {"ant": 1}) / "ant" / "000.jpg"
        before = photo.read_bytes()
        ran = run("inspect", cache.path, "--picture", photo)
        assert (ran.code, ran.out) == (4, "")
        assert "is no picture of ci2p-cache" in " ".join(ran.err.split())
        assert photo.read_bytes() == before
        (tmp_path / "empty.png").touch()
        with pytest.raises(RefusedError, match=r"empty\.png is there already"):
            draw_preview(cache, tmp_path / "empty.png")

    def test_a_folder_in_its_place_is_refused_by_name(self, cache, tmp_path):
        (tmp_path / "a.png").mkdir()
        for path in (tmp_path, tmp_path / "a.png"):
            with pytest.raises(UsageError, match="is a folder; wanted a file"):
                draw_preview(cache, path)

    def test_neither_the_cache_nor_its_images_take_it_in(self, cache, folder, tmp_path):
        with pytest.raises(UsageError, match="is in the cache"):
            draw_preview(cache, cache.path / "look.png")
        for place in ("ant", "new"):
            with pytest.raises(UsageError, match=r"among the images.*--rescan"):
                draw_preview(cache, folder / "images" / place / "look.png")
        assert not (folder / "images" / "new").exists()
        (tmp_path / "link").symlink_to(folder / "images" / "ant")
        with pytest.raises(UsageError, match="among the images"):
            draw_preview(cache, tmp_path / "link" / "look.png")

    def test_a_url_is_no_folder_of_that_name(self, cache, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UsageError, match="is a URL"):
            draw_preview(cache, "s3://bucket/look.png")
        assert not list(tmp_path.iterdir())
