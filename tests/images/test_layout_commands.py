"""What the commands say of a layout, and caches without labels from encode to train."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ci2p_cache as cc
from ci2p_cache.errors import FingerprintMismatchError, SourceError
from ci2p_cache.images.locate import open_reader, open_source
from ci2p_cache.images.source import SourceOptions
from tests.support.caches import with_options
from tests.support.commands import Ran
from tests.support.pictures import picture
from tests.support.sources import entries, pack, samples, tar_bytes

ENCODE = ("--encoder", "bundled", "--size", "32", "--views", "none", "--shard-samples", "8")
UNLABELLED = with_options(labels="none", views="none")


def put(root: Path, *names: str) -> Path:
    for seed, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed, 40, 34).save(root / name, "JPEG")
    return root


def test_encode_says_splits_classes_and_counts_before_and_after(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    names = [f"{s}/{c}/{n}.jpg" for s in ("Training", "Testing") for c in "ab" for n in (1, 2)]
    source = put(tmp_path / "src", *names)
    done = run("encode", source, "--out", tmp_path / "out", *ENCODE)
    assert done.code == 0, done.err
    assert "plan: 8 images (train 4, test 4), 2 classes: a 4, b 4" in done.err
    assert "taken as splits: Testing as test, Training as train" in done.err
    assert "8 images (train 4, test 4), 2 classes, complete" in done.out
    again = run("encode", source, "--out", tmp_path / "out", *ENCODE, "--json")
    assert "plan: 8 images (train 4, test 4), 2 classes" in again.err
    assert json.loads(again.out)["classes"] == 2


def test_many_classes_are_summed_up(run: Callable[..., Ran], tmp_path: Path) -> None:
    names = [f"c{n:02d}/{i}.jpg" for n in range(12) for i in range(1 + n % 2)]
    source = put(tmp_path / "src", *names)
    done = run("encode", source, "--out", tmp_path / "out", *ENCODE, "--plan-only")
    assert "12 classes: c00 1, c01 2" in done.err
    assert ", ... (1 to 2 images each)" in done.err


def test_a_refusal_leaves_nothing_and_names_the_way_out(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    source = put(tmp_path / "src", "1.jpg", "2.jpg")
    ran = run("encode", source, "--out", tmp_path / "out", *ENCODE)
    assert ran.code == 3
    assert "--labels none" in ran.err
    assert not (tmp_path / "out").exists()


def test_images_without_labels_are_encoded_and_train_refuses_them(
    run: Callable[..., Ran], tmp_path: Path
) -> None:
    source, out = put(tmp_path / "src", "1.jpg", "deep/2.jpg", "deep/er/3.jpg"), tmp_path / "out"
    options = (*ENCODE, "--labels", "none", "--val-fraction", "0")
    done = run("encode", source, "--out", out, *options)
    assert done.code == 0, done.err
    assert "plan: 3 images (train 3), no labels" in done.err
    assert "3 images (train 3), no labels, complete" in done.out
    assert f"next: ci2p-cache inspect {out}" in done.out
    cache = cc.open_cache(out)
    assert cache.classes == ()
    assert cache["train"].labels.tolist() == [-1, -1, -1]
    for command in ("inspect", "status", "verify"):
        ran = run(command, out)
        assert ran.code == 0, ran.err
    trained = run("train", out, "--model", "vitds_tiny", "--out", tmp_path / "runs")
    assert trained.code == 3
    assert "was encoded without labels (--labels none)" in trained.err
    assert "try:" in trained.err
    assert not (tmp_path / "runs").exists()


def test_labels_bind_the_folder(tmp_path: Path) -> None:
    source, out = put(tmp_path / "src", "a/1.jpg", "b/2.jpg"), tmp_path / "out"
    cc.encode(source, out, UNLABELLED)
    with pytest.raises(FingerprintMismatchError, match="`labels` 'none', 'auto' is asked for"):
        cc.encode(source, out, with_options(views="none"))
    assert cc.encode(source, out, UNLABELLED).encoded_now == 0
    assert cc.EncodeOptions.of(cc.open_cache(out).manifest).labels == "none"


def test_a_cache_without_labels_grows_and_is_repaired(tmp_path: Path) -> None:
    source, out = put(tmp_path / "src", "a/1.jpg", "b/2.jpg"), tmp_path / "out"
    cc.encode(source, out, UNLABELLED)
    put(tmp_path / "src", "c/3.jpg")
    cc.encode(source, out, with_options(labels="none", views="none", rescan=True))
    cache = cc.open_cache(out)
    assert sum(len(split.labels) for split in cache.values()) == 3
    assert all((split.labels == -1).all() for split in cache.values())


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (("1.jpg", "x/2.jpg"), {(None, "1.jpg"), (None, "x/2.jpg")}),
        (("all/1.jpg", "all/x/2.jpg"), {(None, "all/1.jpg"), (None, "all/x/2.jpg")}),
        (("train/1.jpg", "val/2.jpg"), {("train", "1.jpg"), ("val", "2.jpg")}),
        (
            ("d/seg_train/a/1.jpg", "d/seg_test/2.jpg", "d/seg_pred/3.jpg"),
            {("train", "a/1.jpg"), ("test", "2.jpg"), ("train", "seg_pred/3.jpg")},
        ),
        (("part_1/1.jpg", "part_2/1.jpg"), {(None, "part_1/1.jpg"), (None, "part_2/1.jpg")}),
    ],
)
def test_without_labels_all_images_below_the_source_or_its_splits_count(
    tmp_path: Path, names: tuple[str, ...], found: set[tuple[str | None, str]]
) -> None:
    source = open_source(put(tmp_path, *names), SourceOptions(labels="none"))
    refs = list(source.scan())
    assert {(ref.split, ref.key) for ref in refs} == found
    assert {ref.label for ref in refs} == {-1}
    assert source.classes == source.class_titles == ()
    assert all(source.read(ref.path) for ref in refs)


@pytest.mark.parametrize("names", [("train/1.jpg", "test1/2.jpg"), ("a/train/1.jpg", "a/test/2.jpg",
                                   "b/train/1.jpg", "b/test/2.jpg")])  # fmt: skip
def test_splits_that_would_be_mixed_are_refused_without_labels_too(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    with pytest.raises(SourceError, match="look like splits"):
        open_source(put(tmp_path, *names), SourceOptions(labels="none"))


def without_labels(location: Path) -> set[tuple[str | None, str]]:
    source = open_source(location, SourceOptions(labels="none"))
    refs = list(source.scan())
    assert {ref.label for ref in refs} == {-1}
    assert source.classes == source.class_titles == ()
    for ref in refs:
        assert source.read(ref.path) == open_reader(source.location()).read(ref.path)
    return {(ref.split, ref.key) for ref in refs}


def test_labels_of_a_tar_can_be_left_aside(image_folder: Path, tmp_path: Path) -> None:
    tar = pack(tmp_path / "x.tar", tar_bytes(samples(entries(image_folder))))
    assert len(without_labels(tar)) == 21


def test_a_tar_needs_no_labels_where_they_do_not_count(tmp_path: Path) -> None:
    image = (put(tmp_path / "src", "1.jpg") / "1.jpg").read_bytes()
    loose = pack(tmp_path / "x.tar", tar_bytes([("1.jpg", image), ("2.jpg", image)]))
    assert without_labels(loose) == {(None, "1.jpg"), (None, "2.jpg")}
    members = [(f"d/seg_{s}/{c}/1.jpg", image) for s in ("train", "test") for c in "ab"]
    splits = pack(tmp_path / "y.tar", tar_bytes([*members, ("d/seg_pred/3.jpg", image)]))
    found = {(split, f"{name}/1.jpg") for split in ("train", "test") for name in "ab"}
    assert without_labels(splits) == found | {("train", "seg_pred/3.jpg")}
    odd = [("1.jpg", image), ("1.json", b"no json"), ("2.jpg", image), ("2.cls", b"-1")]
    assert len(without_labels(pack(tmp_path / "z.tar", tar_bytes(odd)))) == 2
    with pytest.raises(SourceError, match="has no image in it"):
        without_labels(pack(tmp_path / "none.tar", tar_bytes([("1.txt", b"text")])))


def test_a_list_needs_no_labels_where_they_do_not_count(tmp_path: Path) -> None:
    put(tmp_path, "1.jpg", "x/2.jpg")
    for text in ("path\n1.jpg\nx/2.jpg\n", "path,label\n1.jpg,\nx/2.jpg,-1\n"):
        table = tmp_path / "list.csv"
        table.write_text(text)
        assert without_labels(table) == {(None, "1.jpg"), (None, "x/2.jpg")}
    pq.write_table(pa.table({"path": ["1.jpg", "x/2.jpg"]}), tmp_path / "list.parquet")
    assert without_labels(tmp_path / "list.parquet") == {(None, "1.jpg"), (None, "x/2.jpg")}
    table.write_text("file\n1.jpg\n")
    with pytest.raises(SourceError, match="has the columns file; wanted `path` and"):
        without_labels(table)


def test_a_refused_list_says_what_else_was_found(tmp_path: Path) -> None:
    put(tmp_path, "img/1.jpg", "img/2.jpg")
    table = tmp_path / "list.csv"
    table.write_text("path,label\nimg\\1.jpg,daisy\nimg\\2.jpg,daisy\n")
    with pytest.raises(SourceError, match=r"are of one class, 'daisy'; wanted .*backslash"):
        cc.encode(table, tmp_path / "out", with_options(views="none"))


@pytest.mark.parametrize("path", ["1.jpg", None])
def test_parquet_needs_no_labels_where_they_do_not_count(tmp_path: Path, path: str | None) -> None:
    image = (put(tmp_path / "src", "1.jpg") / "1.jpg").read_bytes()
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    column = pa.array([{"bytes": image, "path": path}], kind)
    pq.write_table(pa.table({"image": column}), tmp_path / "train-0.parquet")
    key = path or "train-0.parquet/0"
    assert without_labels(tmp_path / "train-0.parquet") == {("train", key)}
    pq.write_table(pa.table({"image": pa.array([image])}), tmp_path / "x.parquet")
    assert without_labels(tmp_path / "x.parquet") == {(None, "x.parquet/0")}
