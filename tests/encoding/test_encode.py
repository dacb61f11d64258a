"""Stage one: the cache is exactly what the encoder gives, whatever interrupts the way there."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from safetensors.torch import load_file

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.encoding.progress import EncodeObserver
from ci2p_cache.record import sealed_bytes
from tests.support.caches import SMALL, data_digests, keys_of, with_options
from tests.support.pictures import picture, write_image_folder
from tests.support.tiers import thinned
from tests.support.warm import WarmParent

if TYPE_CHECKING:
    from compressai.models import FactorizedPrior


def plain_zarr(cache_dir: Path) -> Any:
    """Opens the arrays as the README shows it, nothing of ours in between."""
    return zarr.open(cache_dir / "latents.zarr", mode="r")


@pytest.fixture(scope="module")
def cache_dir(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "shards"
    cc.encode(image_folder, out, SMALL)
    return out


def reference_model(cache_dir: Path) -> FactorizedPrior:
    """CompressAI's own class on the encoder that is in the cache, as a stranger would load it."""
    models = pytest.importorskip("compressai.models")
    model = models.FactorizedPrior(128, 192)
    state = {**model.state_dict(), **load_file(cache_dir / "encoder.safetensors")}
    model.load_state_dict(state, strict=False)
    reference: FactorizedPrior = model.eval()
    return reference


def reference_y(model: FactorizedPrior, file: Path, size: int, mirrored: bool) -> torch.Tensor:
    """y of one source file by torchvision and CompressAI alone, in the reference setting."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2 import functional as tv

    data = torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8)
    image = decode_jpeg(data, mode=ImageReadMode.RGB)
    image = tv.center_crop(tv.resize(image, [size], antialias=True), [size, size])
    if mirrored:
        image = image.flip(-1)
    x = (image[None].float() / 255).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        return model.g_a.to(memory_format=torch.channels_last)(x)


def assert_equals_reference(
    source: Path, cache_dir: Path, rows: list[int], dtype: str, step: float
) -> None:
    """Holds rows of plain zarr, no reader of ours, against CompressAI."""
    model = reference_model(cache_dir)
    array = plain_zarr(cache_dir)["train/latents"]
    index = pq.read_table(sorted((cache_dir / "index").glob("train-*.parquet")))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for row in rows:
            file = source / index["path"][row].as_py()
            for view in range(array.shape[1]):
                y = reference_y(model, file, array.shape[-1] * 16, mirrored=view == 1)
                if dtype in ("int8", "int16"):
                    medians = model.entropy_bottleneck._get_medians().detach()[None]
                    if step == 1.0:
                        wanted = model.entropy_bottleneck.quantize(y, "symbols", medians)
                    else:
                        wanted = torch.round((y - medians) / step)
                    wanted = wanted.clamp(-127, 127) if dtype == "int8" else wanted
                else:
                    wanted = y.to(getattr(torch, dtype))
                np.testing.assert_array_equal(array[row, view], wanted[0].numpy())
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("dtype", "step"),
    thinned(
        [("int16", 0.25), ("int8", 0.5), ("int8", 1.0), ("float16", 1.0), ("float32", 1.0)], step=3
    ),
)
def test_every_stored_value_is_what_compressai_gives(
    image_folder: Path, tmp_path: Path, dtype: str, step: float
) -> None:
    out = tmp_path / "shards"
    cc.encode(image_folder, out, with_options(dtype=dtype, step=step))
    rows = list(range(cc.open_cache(out)["train"].num_rows))
    assert_equals_reference(image_folder, out, rows, dtype, step)


@pytest.mark.slow
def test_real_photographs_at_256_px_equal_compressai(shared_data: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    cc.encode(shared_data / "flowers", out, cc.EncodeOptions(encoder="bundled", limit=60))
    train = cc.open_cache(out)["train"]
    rows = random.Random(1).sample(range(train.num_rows), 12)
    assert_equals_reference(shared_data / "flowers", out, rows, "int8", 1.0)


def test_reading_through_split_dequantises_to_the_codecs_y_hat(
    image_folder: Path, cache_dir: Path
) -> None:
    train = cc.open_cache(cache_dir)["train"]
    model = reference_model(cache_dir)
    index = pq.read_table(sorted((cache_dir / "index").glob("train-*.parquet")))
    for row in range(train.num_rows):
        y = reference_y(model, image_folder / index["path"][row].as_py(), 32, mirrored=False)
        with torch.inference_mode():
            y_hat, _ = model.entropy_bottleneck(y)
        latents, label = train[row]
        assert latents.dtype == torch.float32
        assert latents.shape == (2, 192, 2, 2)
        torch.testing.assert_close(latents[:1], y_hat, rtol=0, atol=0)
        assert cc.open_cache(cache_dir).classes[label] == index["class"][row].as_py()


def test_plain_zarr_dequantises_from_the_attributes(cache_dir: Path) -> None:
    # The three lines of the README, nothing of ours imported.
    latents = plain_zarr(cache_dir)["train/latents"]
    offset = np.asarray(latents.attrs["offset"], np.float32)[:, None, None]
    y = latents[0].astype("float32") * latents.attrs["scale"] + offset

    np.testing.assert_array_equal(y, cc.open_cache(cache_dir)["train"][0][0].numpy())
    assert latents.metadata.dimension_names == ("sample", "view", "channel", "y", "x")
    assert plain_zarr(cache_dir)["train/valid"][:].all()


def test_rows_are_mixed_and_the_split_is_stable_when_files_are_added(
    image_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    cache = cc.open_cache(cache_dir)
    assert sorted(cache.classes) == ["ant", "bee", "cat"]
    assert cache["train"].labels.tolist() != sorted(cache["train"].labels.tolist())
    more = tmp_path / "more"
    shutil.copytree(image_folder, more)
    for i in range(40):
        picture(500 + i).save(more / "bee" / f"new{i}.jpg")
    cc.encode(image_folder, tmp_path / "less", with_options(split="hashed"))
    cc.encode(more, tmp_path / "shards", with_options(split="hashed"))

    def keys(root: Path, split: str) -> set[str]:
        return set(pq.read_table(sorted((root / "index").glob(f"{split}-*")))["key"].to_pylist())

    for split in ("val", "train"):
        assert keys(tmp_path / "less", split) <= keys(tmp_path / "shards", split)


def test_split_folders_give_splits_with_one_class_list(tmp_path: Path) -> None:
    write_image_folder(tmp_path / "src" / "train", {"ant": 3, "cat": 2})
    write_image_folder(tmp_path / "src" / "val", {"bee": 1, "cat": 2})
    summary = cc.encode(tmp_path / "src", tmp_path / "out", SMALL)
    cache = cc.open_cache(tmp_path / "out")
    assert cache.classes == ("ant", "bee", "cat")
    assert summary.splits == {"train": 5, "val": 3}
    assert cache["train"].num_views == 2
    assert cache["val"].num_views == 1


def test_crops_are_stored_with_their_boxes_and_differ(image_folder: Path, tmp_path: Path) -> None:
    cc.encode(image_folder, tmp_path / "out", with_options(views="crops:3"))
    train = cc.open_cache(tmp_path / "out")["train"]
    assert train.num_views == 3
    latents, _ = train[0]
    assert not torch.equal(latents[0], latents[1])
    boxes = pq.read_table(tmp_path / "out" / "index" / "train-000000.parquet")["boxes"]
    assert len(boxes[0].as_py()) == 3


def test_a_second_run_encodes_nothing_and_changes_no_byte(
    image_folder: Path, cache_dir: Path
) -> None:
    before = data_digests(cache_dir)
    summary = cc.encode(image_folder, cache_dir, SMALL)
    assert summary.encoded_now == 0
    assert data_digests(cache_dir) == before


@pytest.mark.parametrize(
    ("devices", "batch_size"), thinned([("cpu:3", 1), ("cpu:1", 1), ("cpu:1", 5), ("cpu:3", 5)])
)
def test_run_settings_change_no_stored_value(
    image_folder: Path, cache_dir: Path, tmp_path: Path, devices: str, batch_size: int
) -> None:
    options = with_options(devices=devices, batch_size=batch_size, workers=3)
    cc.encode(image_folder, tmp_path / "out", options)
    for name in ("train", "val"):
        np.testing.assert_array_equal(
            cc.open_cache(tmp_path / "out")[name].latents[:],
            cc.open_cache(cache_dir)[name].latents[:],
        )
    # And they are accepted on a folder made with others.
    cc.encode(image_folder, tmp_path / "out", SMALL)


@pytest.mark.parametrize(
    ("field", "value"),
    thinned([
        ("size", 96), ("resize_side", 80), ("interpolation", "bicubic"), ("views", "none"),
        ("views", "crops:2"), ("dtype", "float16"), ("step", 0.5), ("precision", "bf16"),
        ("exif", "apply"), ("max_pixels", 10_000), ("val_fraction", 0.5), ("seed", 1),
        ("shard_samples", 5), ("limit", 9), ("codec", "none"), ("level", 3),
    ]),
)  # fmt: skip
def test_other_settings_are_refused_field_by_field_and_nothing_changes(
    image_folder: Path, cache_dir: Path, field: str, value: object
) -> None:
    before = data_digests(cache_dir)
    with pytest.raises(errors.FingerprintMismatchError, match=field.removeprefix("max_")):
        cc.encode(image_folder, cache_dir, with_options(**{field: value}))
    assert data_digests(cache_dir) == before


class TestWhichImagesBecomeVal:
    COUNTS: ClassVar = {"ant": 14, "bee": 9, "cat": 3}

    def counts(self, out: Path) -> dict[str, list[int]]:
        cache = cc.open_cache(out)
        return {
            name: [int(np.sum(split.labels == label)) for label in range(3)]
            for name, split in cache.items()
        }

    def test_each_class_gives_its_exact_share_and_again_when_the_cache_grows(
        self, tmp_path: Path
    ) -> None:
        source = write_image_folder(tmp_path / "src", self.COUNTS)
        cc.encode(source, tmp_path / "out", SMALL)
        assert self.counts(tmp_path / "out") == {"train": [10, 7, 2], "val": [4, 2, 1]}
        before = keys_of(tmp_path / "out")
        for number in range(6):
            picture(300 + number).save(source / "bee" / f"n{number}.jpg")
        picture(400).save(source / "cat" / "n.jpg")
        cc.encode(source, tmp_path / "out", with_options(rescan=True))
        assert self.counts(tmp_path / "out") == {"train": [10, 11, 3], "val": [4, 4, 1]}
        after = keys_of(tmp_path / "out")
        assert all(after[name][: len(keys)] == keys for name, keys in before.items())
        assert cc.verify(tmp_path / "out") == []
        # A new listing finds nothing, and the same command continues without naming the method.
        again = cc.encode(source, tmp_path / "out", with_options(rescan=True))
        assert again.encoded_now == 0

    def test_by_hash_only_where_that_is_asked_for(self, tmp_path: Path) -> None:
        source = write_image_folder(tmp_path / "src", self.COUNTS)
        cc.encode(source, tmp_path / "out", with_options(split="hashed", plan_only=True))
        with pytest.raises(errors.FingerprintMismatchError, match="split: 'hashed' in the folder"):
            cc.encode(source, tmp_path / "out", with_options(split="stratified"))
        cc.encode(source, tmp_path / "out", SMALL)
        assert cc.open_cache(tmp_path / "out").manifest.layout.split == "hashed"

    def test_a_limit_leaves_the_shares_exact(self, tmp_path: Path) -> None:
        source = write_image_folder(tmp_path / "src", self.COUNTS)
        cc.encode(source, tmp_path / "out", with_options(limit=12))
        found = self.counts(tmp_path / "out")
        for train, val in zip(found["train"], found["val"], strict=True):
            assert val == round((train + val) * 0.25)

    def test_classes_too_small_for_a_share_are_said(self, tmp_path: Path) -> None:
        source = write_image_folder(tmp_path / "src", {"ant": 2, "bee": 2})
        notices: list[str] = []

        class Observer(EncodeObserver):
            def notice(self, text: str) -> None:
                notices.append(text)

        cc.encode(source, tmp_path / "out", with_options(plan_only=True), observer=Observer())
        assert any("there is no `val`" in text for text in notices)


@pytest.mark.slow
def test_killed_at_any_time_and_run_again_gives_the_same_bytes(
    warm: WarmParent, tmp_path: Path
) -> None:
    source = write_image_folder(tmp_path / "src", {"ant": 40, "bee": 40, "cat": 40})
    options = with_options(devices="cpu:1")
    cc.encode(source, tmp_path / "whole", options)
    out = tmp_path / "killed"
    command = [
        *("encode", source, "--out", out, "--encoder", "bundled", "--size", 32),
        *("--shard-samples", 4, "--val-fraction", 0.25, "--device", "cpu:1"),
    ]
    kills = 0
    for shards in (0, 1, 4, 9, 15):
        process = warm.start(*command)
        while process.poll() is None and len(list(out.glob("commits/*"))) < shards:
            time.sleep(0.002)
        time.sleep(random.Random(shards).uniform(0, 0.05) if shards else 0.5)
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert kills >= 3
    cc.encode(source, out, options)
    assert data_digests(out) == data_digests(tmp_path / "whole")


def test_sigterm_ends_within_seconds_and_the_same_command_goes_on(
    warm: WarmParent, tmp_path: Path
) -> None:
    source = write_image_folder(tmp_path / "src", {"ant": 60, "bee": 60})
    out = tmp_path / "out"
    command = [
        *("encode", source, "--out", out, "--encoder", "bundled"),
        *("--shard-samples", 8, "--size", 64),
    ]
    process = warm.start(*command)
    while process.poll() is None and not list(out.glob("commits/*")):
        time.sleep(0.01)
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    text = process.wait(30)
    assert process.returncode == 143, text
    assert time.monotonic() - sent < 5
    assert "ci2p-cache encode" in text
    assert not (out / ".staging").exists()
    assert not (out / ".lock").exists()
    summary = cc.encode(source, out, cc.EncodeOptions(encoder="bundled", shard_samples=8, size=64))
    assert 0 < summary.encoded_now < 120
    assert not cc.verify(out)


@pytest.mark.parametrize("garbage", thinned(["empty", "half", "random", "folder", "link"], step=3))
def test_garbage_at_a_target_path_is_replaced(
    image_folder: Path, cache_dir: Path, tmp_path: Path, garbage: str
) -> None:
    out = tmp_path / "out"
    shutil.copytree(cache_dir, out)
    outside = tmp_path / "outside"
    outside.write_bytes(b"do not touch")
    for name in ("latents.zarr/train/latents/c.1.0.0.0.0", "index/train-000001.parquet",
                 "commits/train-000001.json"):  # fmt: skip
        target = out / name
        data = target.read_bytes()
        target.unlink()
        match garbage:
            case "empty":
                target.write_bytes(b"")
            case "half":
                target.write_bytes(data[: len(data) // 2])
            case "random":
                target.write_bytes(os.urandom(len(data)))
            case "folder":
                (target / "inside").mkdir(parents=True)
            case "link":
                target.symlink_to(outside)
    cc.encode(image_folder, out, SMALL)
    assert data_digests(out) == data_digests(cache_dir)
    assert outside.read_bytes() == b"do not touch"


def test_two_encoders_on_one_folder_the_second_is_refused(tmp_path: Path) -> None:
    from ci2p_cache.cache.lock import locked

    source = write_image_folder(tmp_path / "src", {"ant": 4, "bee": 4})
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out" / ".lock", what="encode"):
        with pytest.raises(errors.LockedError, match=f"process {os.getpid()}"):
            cc.encode(source, tmp_path / "out", SMALL)
    cc.encode(source, tmp_path / "out", SMALL)


class TestBadImages:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        source = write_image_folder(tmp_path / "src", {"ant": 9, "bee": 8})
        (source / "ant" / "003.jpg").write_bytes(b"<html>no image</html>")
        return source

    def test_over_the_budget_the_run_stops_and_says_how_to_go_on(
        self, source: Path, tmp_path: Path
    ) -> None:
        with pytest.raises(errors.TooManyBadImagesError, match=r"ant/003\.jpg") as caught:
            cc.encode(source, tmp_path / "out", with_options(max_errors="0"))
        assert "--max-errors" in str(caught.value.hint)

    def test_inside_the_budget_a_row_is_invalid_and_listed_and_no_other_row_moves(
        self, source: Path, tmp_path: Path
    ) -> None:
        options = with_options(max_errors="1", val_fraction=0.0)
        summary = cc.encode(source, tmp_path / "out", options)
        assert (summary.images, summary.bad) == (16, 1)
        train = cc.open_cache(tmp_path / "out")["train"]
        bad = pq.read_table(tmp_path / "out" / "errors.parquet").to_pylist()
        assert [row["key"] for row in bad] == ["ant/003.jpg"]
        assert train.valid.sum() == 16
        assert not train.valid[bad[0]["row"]]
        with pytest.raises(errors.InvalidRowError, match="could not be decoded"):
            train[bad[0]["row"]]
        assert not cc.verify(tmp_path / "out")

        picture(3).save(source / "ant" / "003.jpg")
        again = cc.encode(
            source, tmp_path / "out", with_options(val_fraction=0.0, retry_failed=True)
        )
        assert (again.images, again.bad) == (17, 0)
        assert again.encoded_now == 1
        cc.encode(source, tmp_path / "fresh", with_options(val_fraction=0.0))
        assert (data_digests(tmp_path / "out")) == data_digests(tmp_path / "fresh")

    def test_when_the_first_64_all_fail_it_stops_at_once(self, tmp_path: Path) -> None:
        for i in range(70):
            folder = tmp_path / "src" / ("ant" if i else "bee")
            folder.mkdir(parents=True, exist_ok=True)
            (folder / f"{i}.jpg").write_bytes(b"nothing")
        with pytest.raises(errors.TooManyBadImagesError, match="first 64"):
            cc.encode(tmp_path / "src", tmp_path / "out", with_options(max_errors="100%"))


def test_new_files_are_taken_in_by_rescan_only_as_rows_at_the_end(
    image_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "src"
    shutil.copytree(image_folder, source)
    cc.encode(source, tmp_path / "out", SMALL)
    before = cc.open_cache(tmp_path / "out")["train"]
    latents, labels = before.latents[:], before.labels.copy()
    for i in range(8):
        picture(900 + i).save(source / "ant" / f"zz{i}.jpg")
    assert cc.encode(source, tmp_path / "out", SMALL).encoded_now == 0
    cc.encode(source, tmp_path / "out", with_options(rescan=True))
    after = cc.open_cache(tmp_path / "out")["train"]
    assert after.num_rows > len(labels)
    np.testing.assert_array_equal(after.latents[: len(labels)], latents)
    np.testing.assert_array_equal(after.labels[: len(labels)], labels)
    assert not cc.verify(tmp_path / "out")


def test_too_many_saturated_symbols_ask_for_int16(image_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.SaturationError, match="int8") as caught:
        cc.encode(image_folder, tmp_path / "out", with_options(step=0.02))
    assert "--dtype int16" in str(caught.value.hint)
    summary = cc.encode(image_folder, tmp_path / "wide", with_options(step=0.02, dtype="int16"))
    assert summary.clipped == 0


def test_a_source_whose_path_is_not_utf8_is_encoded(image_folder: Path, tmp_path: Path) -> None:
    source = Path(os.fsdecode(os.fsencode(tmp_path) + b"/na\xefve"))
    shutil.copytree(image_folder, source)
    summary = cc.encode(source, tmp_path / "out", SMALL)
    assert summary.images == 21
    assert cc.open_cache(tmp_path / "out").manifest.source.endswith("ve")


class TestRefusedPlaces:
    def test_a_folder_that_holds_something_else_is_not_touched(
        self, image_folder: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "thesis.tex").write_text("precious")
        for overwrite in (False, True):
            with pytest.raises(errors.NotACacheError, match=r"thesis\.tex"):
                cc.encode(image_folder, tmp_path, SMALL, overwrite=overwrite)
        assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

    def test_an_output_inside_the_source_is_refused(self, image_folder: Path) -> None:
        with pytest.raises(errors.UsageError, match="inside the source"):
            cc.encode(image_folder, image_folder / "shards", SMALL)

    def test_a_failed_start_leaves_no_folder_behind(self, tmp_path: Path) -> None:
        (tmp_path / "src").mkdir()
        with pytest.raises(errors.SourceError):
            cc.encode(tmp_path / "src", tmp_path / "out", SMALL)
        assert not (tmp_path / "out").exists()

    def test_overwrite_starts_anew_with_other_settings(
        self, image_folder: Path, tmp_path: Path
    ) -> None:
        cc.encode(image_folder, tmp_path / "out", SMALL)
        cc.encode(image_folder, tmp_path / "out", with_options(views="none"), overwrite=True)
        assert cc.open_cache(tmp_path / "out")["train"].num_views == 1


def test_an_unfinished_cache_is_refused_with_the_command_that_goes_on(
    cache_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(cache_dir, out)
    manifest = json.loads((out / "cache.json").read_text())
    manifest["state"] = "encoding"
    (out / "cache.json").write_bytes(sealed_bytes(manifest))
    with pytest.raises(errors.IncompleteCacheError, match="shards are committed") as caught:
        cc.open_cache(out)
    assert "ci2p-cache encode" in str(caught.value.hint)


def test_a_cache_with_every_shard_but_no_end_is_completed_without_encoding(
    image_folder: Path, cache_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(cache_dir, out)
    manifest = json.loads((out / "cache.json").read_text())
    manifest["state"] = "encoding"
    (out / "cache.json").write_bytes(sealed_bytes(manifest))
    assert cc.encode(image_folder, out, SMALL).encoded_now == 0
    assert data_digests(out) == data_digests(cache_dir)


def test_symbols_of_an_encoder_that_has_none_are_refused_with_what_to_store(
    image_folder: Path, tmp_path: Path
) -> None:
    arch = "bmshj2018-hyperprior"
    weights = tmp_path / "weights.pth.tar"
    zoo = pytest.importorskip("compressai.zoo")
    torch.save({"state_dict": zoo.image_models[arch](1, "mse").state_dict()}, weights)
    options = with_options(encoder="official", arch=arch, quality=1, weights=weights)
    with pytest.raises(errors.UsageError, match="no symbols of its own") as caught:
        cc.encode(image_folder, tmp_path / "out", options)
    assert "--dtype float16" in str(caught.value.hint)
    assert not (tmp_path / "out").exists()


class TestDamage:
    @pytest.fixture
    def damaged(self, cache_dir: Path, tmp_path: Path) -> Path:
        shutil.copytree(cache_dir, tmp_path / "out")
        return tmp_path / "out"

    @pytest.mark.parametrize("name", ["zarr shard", "index", "labels", "encoder", "plan", "stats"])
    def test_a_flipped_bit_anywhere_is_named_by_verify(self, damaged: Path, name: str) -> None:
        path = {
            "zarr shard": "latents.zarr/train/latents/c.1.0.0.0.0",
            "index": "index/val-000000.parquet",
            "labels": "latents.zarr/train/labels/c.0",
            "encoder": "encoder.safetensors",
            "plan": "plan.parquet",
            "stats": "stats/channels.parquet",
        }[name]
        data = bytearray((damaged / path).read_bytes())
        data[len(data) // 2] ^= 4
        (damaged / path).write_bytes(data)
        assert path in {finding.path for finding in cc.verify(damaged)}

    def test_reading_a_damaged_shard_raises_and_names_it(self, damaged: Path) -> None:
        path = damaged / "latents.zarr/train/latents/c.0.0.0.0.0"
        data = bytearray(path.read_bytes())
        data[100] ^= 1
        path.write_bytes(data)
        train = cc.open_cache(damaged)["train"]
        with pytest.raises(errors.ShardError, match=r"shard 0 \(rows 0 to 3\)") as caught:
            for row in range(4):
                train[row]
        assert "verify" in str(caught.value.hint)

    def test_a_missing_and_a_foreign_shard_raise_instead_of_giving_fill_values(
        self, damaged: Path
    ) -> None:
        shards = damaged / "latents.zarr/train/latents"
        (shards / "c.0.0.0.0.0").unlink()
        shutil.copy(shards / "c.1.0.0.0.0", shards / "c.2.0.0.0.0")
        train = cc.open_cache(damaged)["train"]
        for row in (0, 8):
            with pytest.raises(errors.ShardError):
                train[row]

    def test_encoding_again_mends_what_is_missing(
        self, damaged: Path, cache_dir: Path, image_folder: Path
    ) -> None:
        (damaged / "latents.zarr/train/latents/c.0.0.0.0.0").unlink()
        summary = cc.encode(image_folder, damaged, SMALL)
        assert summary.encoded_now == 4
        assert data_digests(damaged) == data_digests(cache_dir)

    def test_checksums_are_what_sha256sum_reads(self, cache_dir: Path) -> None:
        subprocess.run(
            ["sha256sum", "--check", "--quiet", "--strict", "checksums.sha256"],
            cwd=cache_dir,
            check=True,
        )


class Told(EncodeObserver):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def notice(self, text: str) -> None:
        self.texts.append(text)


def test_what_is_left_out_and_a_disk_too_small_are_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_image_folder(tmp_path / "src", {"ant": 3, "bee": 3})
    (source / "ant" / "notes.txt").write_text("no image")
    usage = shutil.disk_usage(tmp_path)._replace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    told = Told()
    assert cc.encode(source, tmp_path / "out", SMALL, observer=told).images == 6
    assert any("notes.txt" in text for text in told.texts)
    assert any("continues after space is made" in text for text in told.texts)


def test_an_output_that_is_a_file_is_refused(image_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(errors.NotACacheError, match="is no folder"):
        cc.encode(image_folder, tmp_path / "out", SMALL)
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize("devices", ["tpu", "cpu:0", "cuda:77"])
def test_a_device_that_is_not_here_is_refused_before_the_folder_is_made(
    image_folder: Path, tmp_path: Path, devices: str
) -> None:
    with pytest.raises(errors.UsageError, match=f"`device` is '{devices}'"):
        cc.encode(image_folder, tmp_path / "out", with_options(devices=devices))
    assert list(tmp_path.iterdir()) == []
