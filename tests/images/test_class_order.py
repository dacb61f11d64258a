"""One data set has one class order, whatever it comes as: folders, lists, tars, parquet."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ci2p_cache as cc
from ci2p_cache.cache.manifest import read_manifest
from ci2p_cache.errors import SourceError
from ci2p_cache.images.locate import open_source
from tests.support.caches import make_cache
from tests.support.pictures import picture
from tests.support.seals import write_json
from tests.support.sources import Entry, image_table, pack, samples, tar_bytes

PICTURE = b"\xff\xd8\xff\xe0 the start of a JPEG"

SETS = {
    "numbers": tuple(map(str, range(12))),
    "padded": tuple(f"{number:03d}" for number in range(1, 13)),
    "sparse": ("9120", "40", "3", "100000000000"),
    "words": ("daisy", "Rose", "10 tulips", "2 tulips"),
    "mixed": ("1", "02", "x"),
}
ORDERED = {
    "numbers": SETS["numbers"],
    "padded": SETS["padded"],
    "sparse": ("3", "40", "9120", "100000000000"),
    "words": ("10 tulips", "2 tulips", "Rose", "daisy"),
    "mixed": ("02", "1", "x"),
}
"""What is whole numbers throughout is ordered by value, all else as text."""


def entries_of(names: Sequence[str], content: bytes = PICTURE) -> list[Entry]:
    return [(f"{name}/{name}-{n}.jpg", content, name) for name in names for n in range(2)]


def put_folder(root: Path, images: Sequence[Entry]) -> Path:
    for key, content, _ in images:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(content)
    return root


def put_list(root: Path, images: Sequence[Entry]) -> Path:
    put_folder(root, images)
    lines = ["path,label", *(f"{key},{name}" for key, _, name in images)]
    (root / "list.csv").write_text("\n".join(lines) + "\n")
    return root / "list.csv"


def put_parquet_list(root: Path, images: Sequence[Entry]) -> Path:
    put_folder(root, images)
    table = pa.table({"path": [i[0] for i in images], "label": [i[2] for i in images]})
    pq.write_table(table, root / "list.parquet")
    return root / "list.parquet"


def put_parquet(root: Path, images: Sequence[Entry]) -> Path:
    rows = [{"bytes": content, "path": key} for key, content, _ in images]
    root.mkdir()
    pq.write_table(pa.table({"image": rows, "label": [i[2] for i in images]}), root / "x.parquet")
    return root / "x.parquet"


def put_samples(root: Path, images: Sequence[Entry]) -> Path:
    return pack(root / "x.tar", tar_bytes(samples(images)))


def put_class_folders(root: Path, images: Sequence[Entry]) -> Path:
    return pack(root / "x.tar.gz", tar_bytes([(key, content) for key, content, _ in images]))


def put_class_tars(root: Path, images: Sequence[Entry]) -> Path:
    inner: dict[str, list[tuple[str | bytes, bytes]]] = {}
    for key, content, name in images:
        inner.setdefault(name, []).append((key.rpartition("/")[2], content))
    return pack(root / "x.tar", tar_bytes((f"{n}.tar", tar_bytes(m)) for n, m in inner.items()))


KINDS: dict[str, Callable[[Path, Sequence[Entry]], Path]] = {
    "folder": put_folder,
    "list": put_list,
    "parquet list": put_parquet_list,
    "parquet": put_parquet,
    "tar": put_samples,
    "tar of class folders": put_class_folders,
    "tar of class tars": put_class_tars,
}


def found(location: Path) -> tuple[tuple[str, ...], dict[str, int]]:
    source = open_source(location)
    return source.classes, {ref.key: ref.label for ref in source.scan()}


def told(location: Path) -> str:
    source = open_source(location)
    list(source.scan())
    return "\n".join(source.notices)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SETS)
def test_every_source_gives_the_same_classes_and_labels(
    tmp_path: Path, kind: str, name: str
) -> None:
    images = entries_of(SETS[name])
    classes, labels = found(KINDS[kind](tmp_path / "src", images))
    assert classes == ORDERED[name]
    assert labels == {key: ORDERED[name].index(own) for key, _, own in images}


@pytest.mark.parametrize("kind", KINDS)
def test_an_order_that_is_not_image_folders_is_said(tmp_path: Path, kind: str) -> None:
    notices = told(KINDS[kind](tmp_path / "src", entries_of(SETS["numbers"])))
    assert (
        "classes are ordered by their numbers: label 2 is 2; torchvision's ImageFolder sorts them "
        "as text, there label 2 is 10"
    ) in notices
    for name in ("padded", "words"):
        location = KINDS[kind](tmp_path / name, entries_of(SETS[name]))
        assert "ImageFolder" not in told(location)


@pytest.mark.parametrize("name", ["numbers", "padded"])
def test_caches_of_one_data_set_have_the_same_classes_and_labels(tmp_path: Path, name: str) -> None:
    sink = io.BytesIO()
    picture(1, 40, 30).save(sink, "JPEG")
    images = entries_of(SETS[name], sink.getvalue())
    options = cc.EncodeOptions(encoder="bundled", size=32, val_fraction=0.0, plan_only=True)
    labels = []
    for kind in ("folder", "list", "tar", "parquet"):
        out = tmp_path / f"{kind} cache"
        cc.encode(KINDS[kind](tmp_path / kind, images), out, options)
        manifest = read_manifest(out)
        assert (manifest.classes, manifest.class_order) == (ORDERED[name], "number")
        columns = pq.read_table(out / "plan.parquet").to_pydict()
        labels.append(dict(zip(columns["key"], columns["label"], strict=True)))
    assert all(own == labels[0] for own in labels)


# --- what is a class ------------------------------------------------------------------------------


def test_a_class_folder_without_images_is_no_class(tmp_path: Path) -> None:
    put_folder(tmp_path / "src", entries_of(["a", "c"]))
    (tmp_path / "src" / "b").mkdir()
    (tmp_path / "src" / "b" / "README.txt").write_text("no image")
    classes, labels = found(tmp_path / "src")
    assert classes == ("a", "c")
    assert set(labels.values()) == {0, 1}
    assert "1 folders left out that hold no image, for example b" in told(tmp_path / "src")


def test_a_class_with_images_in_one_split_alone_is_a_class(tmp_path: Path) -> None:
    put_folder(tmp_path / "src" / "train", entries_of(["1", "10"]))
    put_folder(tmp_path / "src" / "val", entries_of(["2"]))
    (tmp_path / "src" / "train" / "2").mkdir()
    assert open_source(tmp_path / "src").classes == ("1", "2", "10")


def test_declared_classes_stay_without_images_and_in_their_order(tmp_path: Path) -> None:
    images = [("1.jpg", PICTURE, "zebra"), ("2.jpg", PICTURE, "ant")]
    pq.write_table(image_table(images, ["zebra", "bee", "ant"]), tmp_path / "x.parquet")
    classes, labels = found(tmp_path / "x.parquet")
    assert classes == ("zebra", "bee", "ant")
    assert labels == {"1.jpg": 0, "2.jpg": 2}
    assert "classes are ordered as declared: label 0 is zebra" in told(tmp_path / "x.parquet")
    path = put_list(tmp_path / "list", [("a/1.jpg", PICTURE, "2"), ("a/2.jpg", PICTURE, "0")])
    (tmp_path / "list" / "classes.txt").write_text("zebra\nbee\nant\n")
    assert found(path) == (classes, {"a/1.jpg": 2, "a/2.jpg": 0})


def test_sparse_numbers_take_titles_from_an_object_of_them(tmp_path: Path) -> None:
    path = put_list(tmp_path / "src", entries_of(["9120", "3"]))
    (tmp_path / "src" / "classes.json").write_text('{"3": "cat", "9120": "dog", "7": "bird"}')
    source = open_source(path)
    assert (source.classes, source.class_titles) == (("3", "9120"), ("cat", "dog"))


def test_one_number_in_two_spellings_is_two_classes_and_is_said(tmp_path: Path) -> None:
    for kind in ("folder", "list", "tar"):
        path = KINDS[kind](tmp_path / kind, entries_of(["1", "01", "2"]))
        assert open_source(path).classes == ("01", "1", "2")
        assert "01 and 1 are one number in different spellings" in told(path)


@pytest.mark.parametrize("label", ["-7", "-2"])
def test_negative_numbers_are_refused_with_the_way_out(tmp_path: Path, label: str) -> None:
    path = put_list(tmp_path / "src", [("a/1.jpg", PICTURE, label), ("a/2.jpg", PICTURE, "1")])
    with pytest.raises(SourceError, match=f"there is a label {label}; wanted 0 or more") as caught:
        found(path)
    assert caught.value.hint == "write such labels as names, not as numbers"


def test_no_label_beside_names_makes_no_class(tmp_path: Path) -> None:
    rows = [{"bytes": PICTURE, "path": f"{n}.jpg"} for n in range(2)]
    pq.write_table(pa.table({"image": rows, "label": ["ant", "bee"]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"image": rows, "label": ["-1", "bee"]}), tmp_path / "test.parquet")
    classes, _ = found(tmp_path)
    assert classes == ("ant", "bee")
    assert "1 images without a label skipped" in told(tmp_path)


def test_rows_of_a_list_without_a_label_are_skipped_in_test_and_refused_in_train(
    tmp_path: Path,
) -> None:
    put_folder(tmp_path, entries_of("ab"))
    lines = ["path,label,split", "a/a-0.jpg,1.0,train", "b/b-0.jpg,0.0,train", "a/a-1.jpg,,test"]
    (tmp_path / "x.csv").write_text("\n".join(lines))
    assert found(tmp_path / "x.csv") == (("0", "1"), {"a/a-0.jpg": 1, "b/b-0.jpg": 0})
    assert "labels are written as 1.0; the .0 was taken off" in told(tmp_path / "x.csv")
    (tmp_path / "x.csv").write_text("\n".join([*lines, "b/b-1.jpg,,train"]))
    with pytest.raises(SourceError, match=r"row 4: b/b-1\.jpg has no label"):
        found(tmp_path / "x.csv")


# --- the types of parquet -------------------------------------------------------------------------

WORDS = ["bee", "ant", "bee", "cat"]
NUMBERS = [10, 2, 10, 0]
TYPES = {
    "string": pa.array(WORDS, pa.string()),
    "large_string": pa.array(WORDS, pa.large_string()),
    "string_view": pa.array(WORDS, pa.string_view()),
    "dictionary": pa.array(WORDS).dictionary_encode(),
    "dictionary of large_string": pa.DictionaryArray.from_arrays(
        pa.array([1, 0, 1, 2], pa.int8()),
        pa.array(["ant", "bee", "cat", "never seen"], pa.large_string()),
    ),
    "int8": pa.array(NUMBERS, pa.int8()),
    "uint64": pa.array(NUMBERS, pa.uint64()),
    "float32": pa.array(NUMBERS, pa.float32()),
    "double": pa.array(NUMBERS, pa.float64()),
    "dictionary of int64": pa.array(NUMBERS, pa.int64()).dictionary_encode(),
    "text of numbers": pa.array(map(str, NUMBERS), pa.large_string()),
}


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("form", ["images", "list"])
def test_every_type_of_label_is_read(tmp_path: Path, kind: str, form: str) -> None:
    images = entries_of("wxyz")[::2]
    put_folder(tmp_path, images)
    column: pa.Array = pa.array([{"bytes": c, "path": k} for k, c, _ in images])
    if form == "list":
        column = pa.array([key for key, *_ in images])
    name = "image" if form == "images" else "path"
    pq.write_table(pa.table({name: column, "label": TYPES[kind]}), tmp_path / "x.parquet")
    classes, labels = found(tmp_path / "x.parquet")
    assert classes == (("0", "2", "10") if TYPES[kind][0].as_py() in (10, "10")
                       else ("ant", "bee", "cat"))  # fmt: skip
    assert list(labels.values()) == ([2, 1, 2, 0] if "0" in classes else [1, 0, 1, 2])


@pytest.mark.parametrize("missing", [None, float("nan"), -1.0])
def test_a_missing_value_makes_a_column_float_and_its_row_unlabelled(
    tmp_path: Path, missing: float | None
) -> None:
    rows = [{"bytes": PICTURE, "path": f"{n}.jpg"} for n in range(2)]
    pq.write_table(pa.table({"image": rows, "label": [2.0, 0.0]}), tmp_path / "train.parquet")
    pq.write_table(pa.table({"image": rows, "label": [missing, 2.0]}), tmp_path / "test.parquet")
    assert open_source(tmp_path).classes == ("0", "2")
    assert "1 images without a label skipped" in told(tmp_path)


@pytest.mark.parametrize("view", [True, False])
def test_images_as_bytes_alone_and_as_views_are_read(tmp_path: Path, view: bool) -> None:
    kind = pa.binary_view() if view else pa.binary()
    contents = [PICTURE + bytes([n]) * 40 for n in range(3)]
    table = pa.table({"photo": pa.array(contents, kind), "label": ["b", "a", "b"]})
    pq.write_table(table, tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    assert [source.read(ref.path) for ref in source.scan()] == contents


# --- hard links in tars ---------------------------------------------------------------------------


def put_linked(
    path: Path, *members: tuple[str, bytes | str], kind: int = tarfile.GNU_FORMAT
) -> Path:
    """Writes a tar; a member whose content is text is a hard link to that name."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=kind) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.LNKTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return pack(path, sink.getvalue())


def contents_of(path: Path) -> dict[str, tuple[str, bytes]]:
    source = open_source(path)
    return {ref.key: (source.classes[ref.label], source.read(ref.path)) for ref in source.scan()}


LONG = "a/" * 70 + "far.jpg"


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst"])
@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hard_links_to_earlier_members_are_read(tmp_path: Path, suffix: str, kind: int) -> None:
    path = put_linked(
        tmp_path / f"x{suffix}",
        ("./1.jpg", PICTURE + b"1"), ("./1.cls", b"ant"),
        ("./2.jpg", "./1.jpg"), ("./2.cls", b"copies"),
        ("./3.jpg", "./2.jpg"), ("./3.cls", "1.cls"),
        (LONG, PICTURE + b"4"), (LONG.replace(".jpg", ".json"), b'{"label": "bee"}'),
        ("5.jpg", LONG), ("5.json", "./" + LONG.replace(".jpg", ".json")),
        kind=kind,
    )  # fmt: skip
    assert contents_of(path) == {
        "1.jpg": ("ant", PICTURE + b"1"),
        "2.jpg": ("copies", PICTURE + b"1"),
        "3.jpg": ("ant", PICTURE + b"1"),
        LONG: ("bee", PICTURE + b"4"),
        "5.jpg": ("bee", PICTURE + b"4"),
    }
    assert "skipped" not in told(path)


@pytest.mark.parametrize("link", ["2.jpg", "../1.jpg", "/etc/passwd", "gone.jpg", "", "3.cls"])
def test_hard_links_that_lead_elsewhere_are_not_followed(tmp_path: Path, link: str) -> None:
    path = put_linked(
        tmp_path / "x.tar", ("1.jpg", PICTURE), ("1.cls", b"a"), ("3.jpg", link), ("3.cls", b"a"),
        ("2.jpg", PICTURE), ("2.cls", b"b"),
    )  # fmt: skip
    assert set(contents_of(path)) == {"1.jpg", "2.jpg"}
    assert "1 archive members skipped that are no files" in told(path)


def test_hard_links_lie_with_what_they_lead_to_in_the_order_of_rows(tmp_path: Path) -> None:
    own = [
        (f"{n}.{end}", PICTURE if end == "jpg" else b"a") for n in "12" for end in ("jpg", "cls")
    ]
    path = put_linked(tmp_path / "x.tar", *own, ("9.jpg", "1.jpg"), ("9.cls", b"b"),
    )  # fmt: skip
    refs = list(open_source(path).scan())
    assert [ref.key for ref in refs] == ["1.jpg", "9.jpg", "2.jpg"]
    assert [ref.order for ref in refs] == [0, 1, 2]


def test_hard_links_in_class_folders_and_class_tars_are_read(tmp_path: Path) -> None:
    path = put_linked(tmp_path / "x.tar", ("ant/1.jpg", PICTURE + b"1"), ("bee/2.jpg", "ant/1.jpg"))
    assert contents_of(path)["bee/2.jpg"] == ("bee", PICTURE + b"1")
    inner = put_linked(tmp_path / "i.tar", ("1.jpg", PICTURE + b"2"), ("./2.jpg", "1.jpg"))
    outer = tar_bytes(
        [("ant.tar", inner.read_bytes()), ("bee.tar", tar_bytes([("3.jpg", PICTURE)]))]
    )
    assert contents_of(pack(tmp_path / "y.tar", outer))["ant/2.jpg"] == ("ant", PICTURE + b"2")


def test_a_label_that_links_to_what_is_no_label_is_refused(tmp_path: Path) -> None:
    path = put_linked(tmp_path / "x.tar", ("1.jpg", PICTURE), ("1.cls", "1.jpg"))
    with pytest.raises(SourceError, match=r"1\.cls is a hard link to \d+ bytes of no label"):
        found(path)


# --- the manifest ---------------------------------------------------------------------------------


def test_the_manifest_records_the_order(tmp_path: Path) -> None:
    for name, order in (("sparse", "number"), ("words", "text")):
        source = put_folder(tmp_path / name, entries_of(SETS[name]))
        options = cc.EncodeOptions(encoder="bundled", size=32, plan_only=True)
        cc.encode(source, tmp_path / f"{name} out", options)
        assert json.loads((tmp_path / f"{name} out/cache.json").read_text())["class_order"] == order


@pytest.mark.parametrize(
    ("classes", "order"),
    [(("1", "10", "2"), "text"), (("1", "2", "10"), "number"), (("b", "a", "c"), "declared")],
)
def test_a_manifest_of_before_keeps_its_classes(
    tmp_path: Path, classes: tuple[str, ...], order: str
) -> None:
    out = make_cache(tmp_path / "out", {"train": {"x": 2, "y": 2, "z": 2}})
    path = out / "cache.json"
    data = json.loads(path.read_text())
    data.update(classes=classes, class_titles=classes)
    del data["class_order"]
    write_json(path, data)
    manifest = read_manifest(out)
    assert manifest.classes == classes
    assert manifest.class_order == order
