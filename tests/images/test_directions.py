"""What is not as it should be is read where it is clear, or refused with the command that helps."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ci2p_cache as cc
from ci2p_cache.encoding.progress import EncodeObserver, EncodeProgress, ProgressMeter
from ci2p_cache.encoding.reencode import reencode
from ci2p_cache.encoding.shard import parse_max_errors
from ci2p_cache.errors import SourceError, TooManyBadImagesError, UsageError
from ci2p_cache.images.locate import open_reader, open_source
from ci2p_cache.images.source import SourceOptions
from tests.support.pictures import write_image_folder
from tests.support.sources import image_table, pack, tar_bytes

PICTURE = b"\xff\xd8\xff\xe0 the start of a JPEG"
SMALL = cc.EncodeOptions(encoder="bundled", size=32, views="none", val_fraction=0.0)


def labelled(location: object, **options: Any) -> dict[str, str]:
    source = open_source(str(location), SourceOptions(**options))
    return {
        ref.key if ref.split is None else f"{ref.split}: {ref.key}": source.classes[ref.label]
        for ref in source.scan()
    }


def notices(location: object, **options: Any) -> str:
    source = open_source(str(location), SourceOptions(**options))
    list(source.scan())
    return "\n".join(source.notices)


def refused(location: object, **options: Any) -> SourceError:
    with pytest.raises(SourceError) as caught:
        labelled(location, **options)
    assert caught.value.hint
    assert str(caught.value).isprintable()
    return caught.value


def put_tar(path: Path, *names: str | tuple[str, bytes]) -> Path:
    members = [(n, PICTURE + n.encode()) if isinstance(n, str) else n for n in names]
    return pack(path, tar_bytes(members))


def inner(*names: str | tuple[str, bytes]) -> bytes:
    return tar_bytes([(n, PICTURE + n.encode()) if isinstance(n, str) else n for n in names])


def contents(location: Path) -> dict[str, bytes]:
    source, reader = open_source(location), open_reader(location)
    return {ref.key: reader.read(ref.path) for ref in source.scan()}


# --- samples of tars ------------------------------------------------------------------------------


def run_hint(error: SourceError) -> None:
    """Runs the command that an error names."""
    assert error.hint is not None
    subprocess.run(["bash", "-c", error.hint], check=True)


def test_labels_apart_from_their_images_are_put_beside_them_by_the_hint(tmp_path: Path) -> None:
    images = [f"{n}.jpg" for n in range(12)]
    labels = [(f"{n}.cls", b"ab"[n % 2 :][:1]) for n in range(12)]
    error = refused(put_tar(tmp_path / "my x.tar", *images, *labels))
    assert "0.jpg has no label beside it, and 12 label files, for example 0.cls" in str(error)
    run_hint(error)
    assert len(labelled(tmp_path / "my x-sorted.tar")) == 12


def test_json_labels_apart_are_told_of_too(tmp_path: Path) -> None:
    labels = [(f"{n}.json", b'{"label": 1}') for n in range(3)]
    error = refused(put_tar(tmp_path / "x.tar", "0.jpg", "1.jpg", "2.jpg", *labels))
    assert "3 label files, for example 0.json, have no image beside them" in str(error)


def test_dots_in_names_are_taken_out_by_the_hint(tmp_path: Path) -> None:
    members: list[str | tuple[str, bytes]] = []
    for n in range(5):
        members += [f"./a/img.{n}.jpg", (f"./a/img.{n}.cls", b"a")]
    error = refused(put_tar(tmp_path / "x.tar", *members))
    assert "img.0.jpg and a/img.1.jpg: the name of a sample ends at its first dot" in str(error)
    run_hint(error)
    assert labelled(tmp_path / "x-renamed.tar") == {f"a/img_{n}.jpg": "a" for n in range(5)}


def test_an_image_and_a_label_with_the_same_middle_belong_together(tmp_path: Path) -> None:
    path = put_tar(
        tmp_path / "x.tar", "1.final.jpg", ("1.final.cls", b"a"), "2.jpg", ("2.cls", b"b"),
        ("2.seg.cls", b"c"),
    )  # fmt: skip
    assert labelled(path) == {"1.final.jpg": "a", "2.jpg": "b"}


def test_the_fields_of_a_json_are_named_and_one_can_be_chosen(tmp_path: Path) -> None:
    fields = {"width": [1], "class_id": 1, "category": "ant", "score": 0.5, "ok": True}
    path = put_tar(tmp_path / "x.tar", "1.jpg", ("1.json", json.dumps(fields).encode()))
    error = refused(path)
    assert "its .json has the fields width, class_id, category, score, ok" in str(error)
    assert "looked for label or cls or class_name" in str(error)
    assert error.hint == "repeat the command with --label-column class_id"
    assert labelled(path, label_column="class_id") == {"1.jpg": "1"}
    assert labelled(path, label_column="category") == {"1.jpg": "ant"}
    assert "looked for ok" in str(refused(path, label_column="ok"))
    put_tar(path, "1.jpg", ("1.json", b'{"label": 2.0}'))
    assert labelled(path) == {"1.jpg": "2"}


def test_a_label_file_of_another_extension_can_be_chosen(tmp_path: Path) -> None:
    path = put_tar(tmp_path / "x.tar", "1.jpg", ("1.txt", b"ant\n"))
    assert "looked for a .cls or .json beside it; found .txt" in str(refused(path))
    assert labelled(path, label_column="txt") == {"1.jpg": "ant"}


def test_one_of_several_images_of_a_sample_can_be_chosen(tmp_path: Path) -> None:
    path = put_tar(tmp_path / "x.tar", "1.jpg", "1.png", ("1.cls", b"a"))
    error = refused(path)
    assert error.hint is not None
    assert "--image-column jpg" in error.hint
    assert labelled(path, image_column="png") == {"1.png": "a"}
    assert "1 images left out whose extension is not" in notices(path, image_column="jpg")


# --- ImageNet as it comes -------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst"])
def test_tars_of_class_folders_and_of_class_tars_are_read_as_the_folder(
    tmp_path: Path, suffix: str
) -> None:
    names = [f"{c}/{n}.jpg" for c in ("n01440764", "n01443537") for n in range(3)]
    wanted = {name: PICTURE + name.encode() for name in names}
    folders = pack(tmp_path / f"f{suffix}", tar_bytes(wanted.items()))
    assert contents(folders) == wanted
    tars = [
        (f"{c}.tar", tar_bytes([(f"./{n}.jpg", wanted[f"{c}/{n}.jpg"]) for n in range(3)]))
        for c in ("n01440764", "n01443537")
    ]
    nested = pack(tmp_path / f"t{suffix}", tar_bytes(tars))
    assert contents(nested) == wanted
    for name, data in tars:
        pack(tmp_path / "unpacked" / name, data)
    assert contents(tmp_path / "unpacked") == wanted
    for path in (folders, nested, tmp_path / "unpacked"):
        assert labelled(path) == {name: name.split("/")[0] for name in names}
        assert "no image has a label beside it" in notices(path)


@pytest.mark.parametrize("wrapper", ["", "./", "archive/", "a/b/"])
def test_splits_and_wrappers_in_a_tar_are_those_of_a_folder(tmp_path: Path, wrapper: str) -> None:
    names = ("train/a/1.jpg", "train/b/x/2.jpg", "val/a/1.jpg", "test/b/3.jpg")
    path = put_tar(tmp_path / "x.tar", *(wrapper + name for name in names))
    assert labelled(path) == {
        "train: a/1.jpg": "a", "train: b/x/2.jpg": "b", "val: a/1.jpg": "a", "test: b/3.jpg": "b",
    }  # fmt: skip


def test_split_tars_in_a_tar_and_beside_each_other_are_splits(tmp_path: Path) -> None:
    parts = {"train": inner("train/a/1.jpg", "train/b/2.jpg"), "val": inner("a/3.jpg", "b/4.jpg")}
    wanted = {
        "train: a/1.jpg": "a",
        "train: b/2.jpg": "b",
        "val: a/3.jpg": "a",
        "val: b/4.jpg": "b",
    }
    assert labelled(put_tar(tmp_path / "x.tar", *((f"{n}.tar", d) for n, d in parts.items()))) == (
        wanted
    )
    put_tar(tmp_path / "two" / "train.tar", "a/1.jpg", "b/2.jpg")
    put_tar(tmp_path / "two" / "val.tar", "a/3.jpg", "b/4.jpg")
    assert labelled(tmp_path / "two") == wanted


def test_a_class_packed_with_its_folder_is_one_class(tmp_path: Path) -> None:
    tars = [(f"{c}.tar", inner(f"{c}/1.jpg", f"./{c}/2.jpg")) for c in "ab"]
    assert set(labelled(put_tar(tmp_path / "x.tar", *tars))) == {
        "a/1.jpg", "a/2.jpg", "b/1.jpg", "b/2.jpg",
    }  # fmt: skip


def test_dots_in_the_names_of_class_folders_images_do_no_harm(tmp_path: Path) -> None:
    names = [f"{c}/image.{n:04d}.jpg" for c in "ab" for n in range(1500)]
    path = put_tar(tmp_path / "x.tar", *names)
    assert labelled(path) == {name: name[0] for name in names}


def test_a_json_of_a_class_folder_is_no_label(tmp_path: Path) -> None:
    path = put_tar(tmp_path / "x.tar", ("info.json", b"{}"), "a/1.jpg", "b/1.jpg", "b/2.jpg")
    assert set(labelled(path).values()) == {"a", "b"}


REFUSED_TARS: dict[str, tuple[bytes, str]] = {
    "flat": (inner("1.jpg", "2.jpg"), "Nor does it hold class folders"),
    "one class folder": (inner("a/1.jpg", "a/2.jpg"), "one class folder, a"),
    "splits beside others": (
        inner("train/a/1.jpg", "val/a/1.jpg", "notes/1.jpg"), "cannot be both splits and classes",
    ),
    "no train": (inner("val/a/1.jpg", "test/a/1.jpg"), "and no train folder"),
    "two folders of a split": (
        inner("train/a/1.jpg", "val/a/1.jpg", "valid/b/1.jpg"), "are both the val split",
    ),
    "a flat val": (inner("train/a/1.jpg", "train/b/1.jpg", "val/1.jpg"), "no class folders"),
    "shards in a tar": (
        inner(*[(f"part-{n:04d}.tar", inner(f"{n}.jpg")) for n in range(3)]), "called like parts",
    ),
    "class folders in numbered tars": (
        inner(*[(f"{n}.tar", inner("a/1.jpg", "b/1.jpg")) for n in range(2)]),
        "each holds the same folders (a, b)",
    ),
    "a packed tar in a tar": (
        inner(("a.tar.gz", b"x"), ("b.tgz", b"x")), "must be plain",
    ),
    "tars in tars in tars": (
        inner(("a.tar", inner(("b.tar", inner("1.jpg"))))), "tars in tars in tars are not read",
    ),
    "images beside tars": (inner(("a.tar", inner("1.jpg")), "2.jpg"), "beside tars"),
    "an inner tar cut short": (
        inner(("a.tar", inner("1.jpg")[:700]), ("b.tar", inner("1.jpg"))), "cut short",
    ),
    "an inner tar that is none": (inner(("a.tar", b"x" * 600)), "checksum is wrong"),
    "an inner tar that is empty": (inner(("a.tar", b"")), "without an end marker"),
    "an inner name that leads out": (
        inner(("a.tar", inner("../1.jpg")), ("b.tar", inner("1.jpg"))), "leads out of it",
    ),
    "something behind an inner end": (
        inner(("a.tar", inner("1.jpg") + b"x" * 512)), "continues behind its end marker",
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
@pytest.mark.parametrize("name", REFUSED_TARS)
def test_tars_that_are_not_clear_or_hostile_are_refused(
    tmp_path: Path, name: str, suffix: str
) -> None:
    data, reason = REFUSED_TARS[name]
    error = refused(pack(tmp_path / f"bad{suffix}", data))
    assert "bad" in str(error)
    assert reason in str(error)


def test_an_inner_member_cannot_reach_beyond_its_tar(tmp_path: Path) -> None:
    """A size in an inner header that covers the next inner tar ends at the inner one's end."""
    one = bytearray(inner("1.jpg"))
    header = one[:512]
    header[124:136] = b"%011o\0" % 4096
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    one[:512] = header
    data = inner(("a.tar", bytes(one[:1536])), ("b.tar", inner("1.jpg")))
    assert "cut short" in str(refused(pack(tmp_path / "x.tar", data)))


@pytest.mark.parametrize("stem", ["part-{}", "0000{}", "mine_{}", "train-{}"])
def test_a_folder_of_unlabelled_shards_is_not_taken_for_class_tars(
    tmp_path: Path, stem: str
) -> None:
    for n in range(3):
        put_tar(tmp_path / f"{stem.format(n)}.tar", f"{n}.jpg")
    assert "has no label" in str(refused(tmp_path))


# --- parquet --------------------------------------------------------------------------------------


def test_a_parquet_file_of_paths_is_read_as_a_list(tmp_path: Path) -> None:
    root = write_image_folder(tmp_path / "images", {"ant": 2, "bee": 2})
    keys = ["ant/000.jpg", "bee/001.jpg"]
    table = image_table([(str(root / key), b"", key[:3]) for key in keys], ["bee", "ant"])
    rows = [{"bytes": None, "path": str(root / key)} for key in keys]
    column = pa.array(rows, table.schema.field(0).type)
    (tmp_path / "p").mkdir()
    path = tmp_path / "p" / "train-0.parquet"
    pq.write_table(table.set_column(0, table.schema.field(0), column), path)
    error = refused(path)
    assert f"{keys[0]}'; wanted one below {tmp_path / 'p'}" in str(error)
    assert error.hint == f"repeat the command with --root {root}"
    assert labelled(path, root=str(root)) == {keys[0]: "ant", keys[1]: "bee"}
    source = open_source(path, SourceOptions(root=str(root)))
    assert source.classes == ("bee", "ant")
    error = refused(tmp_path / "p" / "*.parquet")
    assert "has paths of images in `image`, for example" in str(error)
    assert error.hint is not None
    assert "--root" in error.hint


def test_two_label_columns_or_image_columns_are_told_apart_by_an_option(tmp_path: Path) -> None:
    images = [(f"{n}.jpg", PICTURE + bytes([n]), "ab"[n]) for n in range(2)]
    table = image_table(images, ["a", "b"]).rename_columns(["img", "fine"])
    features = {
        "fine": {"names": ["a", "b"], "_type": "ClassLabel"},
        "coarse": {"names": ["all"], "_type": "ClassLabel"},
    }
    table = table.append_column("coarse", pa.array([0, 0])).append_column("mask", table["img"])
    table = table.replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    path = tmp_path / "x.parquet"
    pq.write_table(table, path)
    error = refused(path)
    assert "has no single image column" in str(error)
    assert error.hint == "repeat the command with --image-column img"
    error = refused(path, image_column="mask")
    assert "has no single label column but 2 of them, fine, coarse" in str(error)
    assert error.hint == "repeat the command with --label-column fine"
    chosen: dict[str, Any] = {"image_column": "mask", "label_column": "coarse"}
    assert labelled(path, **chosen) == {"0.jpg": "all", "1.jpg": "all"}
    source = open_source(path, SourceOptions(**chosen))
    # What reads it again knows nothing of the options.
    reader = open_reader(source.location())
    assert [reader.read(ref.path) for ref in source.scan()] == [PICTURE + b"\0", PICTURE + b"\1"]
    assert "has no single image column" in str(refused(path, image_column="none"))


@pytest.mark.parametrize("name", ["train-0.parquet", "x.parquet"])
def test_splits_within_a_parquet_file_of_images_are_refused(tmp_path: Path, name: str) -> None:
    table = image_table([(f"{n}.jpg", PICTURE + bytes([n]), "ab"[n]) for n in range(2)], ["a", "b"])
    pq.write_table(table.append_column("split", pa.array(["train", "test"])), tmp_path / name)
    assert "has a column `split` with test, train, and its name says" in str(
        refused(tmp_path / name)
    )
    path = tmp_path / "train.parquet"
    pq.write_table(table.append_column("split", pa.array(["Train", "train"])), path)
    assert labelled(path) == {"train: 0.jpg": "a", "train: 1.jpg": "b"}


# --- lists ----------------------------------------------------------------------------------------


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("img/a/1.jpg", "img/b/2.jpg", "img/b/3 x.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(PICTURE)
    return tmp_path / "img"


def put_list(images: Path, *lines: str, name: str = "x.csv") -> Path:
    path = images.parent / name
    path.write_text("\r\n".join(lines) + "\r\n", newline="")
    return path


@pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_delimiter_is_found_out(images: Path, delimiter: str, name: str) -> None:
    lines = ["path,label,note", "img/a/1.jpg,a,x", "img/b/2.jpg,b,y"]
    path = put_list(images, *(line.replace(",", delimiter) for line in lines), name=name)
    assert labelled(path) == {"img/a/1.jpg": "a", "img/b/2.jpg": "b"}


def test_splits_that_a_list_would_leave_aside_are_refused(images: Path) -> None:
    path = put_list(images, "path,label,Split", "img/a/1.jpg,a,train", "img/b/2.jpg,b,test")
    assert "has a column 'Split'; wanted `split`" in str(refused(path))
    rows = ["path,label", "img/train/1.jpg,a", "img/train/2.jpg,b", "img/test/1.jpg,a"]
    error = refused(put_list(images, *rows))
    assert "paths in the folders test, train and no column `split`" in str(error)
    assert "would be mixed" in str(refused(put_list(images, *rows), labels="none"))
    rows = [f"{row},{split}" for row, split in zip(rows, ("split", *["train"] * 3), strict=True)]
    assert len(labelled(put_list(images, *rows))) == 3


def test_a_delimiter_within_names_does_not_count(images: Path) -> None:
    path = put_list(images, 'path;label;"a,b,c,d"', "img/a/1.jpg;a, or b;x")
    assert labelled(path) == {"img/a/1.jpg": "a, or b"}


def test_columns_of_other_names_are_named_by_options(images: Path) -> None:
    path = put_list(images, "Filename,Breed,split", "img/a/1.jpg,a,train", "img/b/2.jpg,b,val")
    error = refused(path)
    assert "has the columns Filename, Breed, split; wanted `path`, `label`" in str(error)
    assert error.hint == "repeat the command with --image-column Filename --label-column Breed"
    options: dict[str, Any] = {"image_column": "Filename", "label_column": "Breed"}
    assert labelled(path, **options) == {"train: img/a/1.jpg": "a", "val: img/b/2.jpg": "b"}
    error = refused(path, image_column="Filename")
    assert error.hint == "repeat the command with --label-column Breed"
    source = open_source(path, SourceOptions(**options))
    assert open_reader(source.location()).read(next(source.scan()).path) == PICTURE


def test_parquet_lists_have_the_same_options(images: Path) -> None:
    path = images.parent / "x.parquet"
    pq.write_table(pa.table({"file": ["img/a/1.jpg"], "kind": ["a"], "n": [1]}), path)
    error = refused(path)
    assert error.hint == (
        "if it lists paths: repeat the command with --image-column file --label-column NAME"
    )
    options: dict[str, Any] = {"image_column": "file", "label_column": "kind"}
    assert labelled(path, **options) == {"img/a/1.jpg": "a"}
    source = open_source(path, SourceOptions(**options))
    assert open_reader(source.location()).read(next(source.scan()).path) == PICTURE


def test_two_label_columns_of_a_list_are_told_apart(images: Path) -> None:
    path = put_list(images, "path,label,label_name", "img/a/1.jpg,0,ant")
    assert labelled(path) == {"img/a/1.jpg": "0"}
    assert labelled(path, label_column="label_name") == {"img/a/1.jpg": "ant"}
    error = refused(put_list(images, "path,label,label", "img/a/1.jpg,0,ant"))
    assert "has 2 columns called `label`; wanted one" in str(error)


def test_a_list_without_a_first_line_of_names_gets_one_by_the_hint(images: Path) -> None:
    path = put_list(images, "img/a/1.jpg,a", "img/b/2.jpg,b")
    error = refused(path)
    assert error.hint is not None
    command = re.search(r"sed .*", error.hint)
    assert command is not None
    subprocess.run(["bash", "-c", command[0]], check=True)
    assert labelled(path) == {"img/a/1.jpg": "a", "img/b/2.jpg": "b"}


def test_a_list_of_excel_in_utf16_is_refused_with_the_way_out(images: Path) -> None:
    path = images.parent / "x.csv"
    path.write_text("path,label\nimg/a/1.jpg,a\n", encoding="utf-16")
    error = refused(path)
    assert "is text in UTF-16" in str(error)
    assert shlex.quote(str(path)) in (error.hint or "")


def test_backslashes_are_read_as_slashes(images: Path) -> None:
    path = put_list(images, "path,label", "img\\a\\1.jpg,a", ".\\img\\b\\3 x.jpg,b")
    assert labelled(path) == {"img/a/1.jpg": "a", "img/b/3 x.jpg": "b"}
    assert "paths of the list have backslashes; they were read as slashes" in notices(path)
    (images.parent / "odd\\name.jpg").write_bytes(PICTURE)
    path = put_list(images, "path,label", "odd\\name.jpg,a")
    assert labelled(path) == {"odd\\name.jpg": "a"}
    assert "backslashes" not in notices(path)


@pytest.mark.parametrize(
    "bad", ["..\\..\\x.jpg", "C:\\data\\1.jpg", "C:/data/1.jpg", "\\\\s\\1.jpg"]
)
def test_backslashes_lead_nowhere_else(images: Path, bad: str) -> None:
    assert "wanted one below" in str(refused(put_list(images, "path,label", f"{bad},a")))


def test_a_list_without_suffixes_says_which(images: Path) -> None:
    error = refused(put_list(images, "path,label", "img/a/1,a", "img/b/2,b"))
    assert "there is no file img/a/1, but img/a/1.jpg" in str(error)
    assert "+= '.jpg'" in (error.hint or "")


def test_files_that_are_not_there_are_told_of_before_the_run(images: Path) -> None:
    path = put_list(images, "path,label", "a/1.jpg,a", "b/2.jpg,b")
    told = notices(path)
    assert f"none of the first files of the list is there, for example {images.parent}" in told
    assert "--root names the folder" in told
    assert "none of the first" not in notices(path, root=str(images))


def test_absolute_paths_below_the_list_or_the_root_are_taken(images: Path) -> None:
    path = put_list(images, "path,label", f"{images}/a/1.jpg,a", f"{images}/b/../b/2.jpg,b")
    assert set(labelled(path)) == {"img/a/1.jpg", "img/b/2.jpg"}
    other = images.parent / "lists"
    other.mkdir()
    path = path.rename(other / "x.csv")
    error = refused(path)
    assert error.hint == f"repeat the command with --root {images}"
    assert set(labelled(path, root=str(images))) == {"a/1.jpg", "b/2.jpg"}
    # A path from the list's own folder, where the root has no such.
    path.write_text("path,label\n../img/a/1.jpg,a\nb/2.jpg,b\n")
    assert set(labelled(path, root=str(images))) == {"a/1.jpg", "b/2.jpg"}
    assert "--root" in (refused(path).hint or "")


def test_links_are_followed_where_they_lead_to_the_root(images: Path) -> None:
    (images.parent / "linked").symlink_to(images)
    path = put_list(images, "path,label", f"{images.parent}/linked/a/1.jpg,a")
    assert labelled(path, root=str(images)) == {"a/1.jpg": "a"}
    path = put_list(images, "path,label", f"{images}/a/1.jpg,a")
    assert labelled(path, root=str(images.parent / "linked")) == {"a/1.jpg": "a"}
    outside = images.parent / "outside"
    outside.mkdir()
    (outside / "1.jpg").write_bytes(PICTURE)
    path = put_list(images, "path,label", f"{outside}/1.jpg,a")
    refused(path, root=str(images))


def test_a_root_that_is_no_folder_is_refused(images: Path) -> None:
    path = put_list(images, "path,label", "a/1.jpg,a")
    with pytest.raises(SourceError, match="gone is no folder"):
        open_source(path, SourceOptions(root=str(images / "gone")))


@pytest.mark.parametrize("option", ["root", "image_column", "label_column"])
def test_an_option_that_a_folder_has_no_use_for_is_refused(images: Path, option: str) -> None:
    options: dict[str, Any] = {option: "x"}
    with pytest.raises(UsageError, match=f"`{option}` is 'x', and the images are folders"):
        open_source(images, SourceOptions(**options))


@pytest.mark.parametrize("executor", ["local", pytest.param("processes", marks=pytest.mark.slow)])
def test_a_cache_of_a_list_with_a_root_is_read_again_without_options(
    run, tmp_path: Path, executor: str
) -> None:
    root = write_image_folder(tmp_path / "images", {"ant": 3, "bee": 3})
    (tmp_path / "lists").mkdir()
    lines = ["file;kind", *(f"{p};{p.parent.name}" for p in sorted(root.rglob("*.jpg")))]
    path = tmp_path / "lists" / "x.csv"
    path.write_text("\n".join(lines))
    out = tmp_path / "out"
    command = ["encode", path, "--out", out, "--encoder", "bundled", "--size", "32", "--root", root,
               "--image-column", "file", "--label-column", "kind", "--executor", executor,
               "--device", "cpu:1"]  # fmt: skip
    ran = run(*command)
    assert ran.code == 0, ran.err
    assert cc.open_cache(out).classes == ("ant", "bee")
    summary = reencode(out, 4)
    assert (summary.compared, summary.differing_values) == (4, 0)
    ran = run(*command)
    assert "planned from" not in ran.err


# --- the error budget and the time left -----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "total", "allowed"),
    [("0.1%", 60, 1), ("0.1%", 2, 1), ("0.1%", 1, 0), ("0.1%", 1999, 1), ("0.1%", 2000, 2),
     ("0%", 60, 0), ("0", 60, 0), ("5", 3, 5), ("100%", 1, 1), ("1%", 0, 0)],
)  # fmt: skip
def test_a_share_allows_at_least_one_image_and_never_all(
    text: str, total: int, allowed: int
) -> None:
    assert parse_max_errors(text, total) == allowed


class Seen(EncodeObserver):
    def __init__(self) -> None:
        self.notices: list[str] = []
        self.etas: list[float | None] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def progress(self, progress: EncodeProgress) -> None:
        self.etas.append(progress.eta_seconds)


def test_a_run_says_at_its_start_how_many_may_fail(tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "src", {"ant": 4, "bee": 4})
    (source / "ant" / "000.jpg").write_bytes(b"no image")
    seen = Seen()
    assert cc.encode(source, tmp_path / "out", SMALL, observer=seen).bad == 1
    assert (
        "the run stops if more than 1 of 8 images cannot be decoded (--max-errors 0.1%)"
        in seen.notices
    )
    (source / "bee" / "000.jpg").write_bytes(b"no image")
    with pytest.raises(TooManyBadImagesError, match="2 images could not be decoded, 1 are allowed"):
        cc.encode(source, tmp_path / "two", SMALL)
    none = dataclasses.replace(SMALL, max_errors="0")
    with pytest.raises(TooManyBadImagesError, match="1 images could not be decoded, 0 are allowed"):
        cc.encode(source, tmp_path / "none", none)


def test_the_time_left_is_told_after_the_warm_up(tmp_path: Path) -> None:
    now, seen = [0.0], Seen()
    meter = ProgressMeter(seen, total=1020, done=0, bad=0, clock=lambda: now[0])
    # Three seconds until the decoders are there, a burst, then 60 images a second.
    now[0] = 3.0
    for _ in range(20):
        meter.count(True, 0.0)
    for _ in range(1000):
        now[0] += 1 / 60
        meter.count(True, 0.0)
    assert seen.etas[0] is None
    told = [eta for eta in seen.etas if eta is not None]
    # 17 seconds in all, of which two are the warm-up.
    assert told[0] == pytest.approx(1000 / 60 - 2, abs=0.2)
    assert told == sorted(told, reverse=True)
    assert len(told) > 100
