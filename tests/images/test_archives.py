"""Tars, parquet files and lists: which files a location names, splits, labels, what is refused."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ci2p_cache.errors import ImageDecodeError, SourceError, UsageError
from ci2p_cache.images.locate import open_source
from tests.support.sources import Entry, image_table, pack, samples, tar_bytes, write_images

PICTURE = b"\xff\xd8\xff\xe0 the start of a JPEG"


def put_tar(path: Path, *labels: str, name: str = "jpg") -> Path:
    """Writes a tar with an image per label, named after the tar."""
    stem = path.name.split(".")[0]
    images = [(f"{stem}/{i}.{name}", PICTURE + bytes([i]), label) for i, label in enumerate(labels)]
    return pack(path, tar_bytes(samples(images)))


def put_parquet(path: Path, *labels: str, classes: tuple[str, ...] = ("a", "b")) -> Path:
    images = [(f"{path.stem}-{i}.jpg", PICTURE, label) for i, label in enumerate(labels)]
    return write_images(path, images, classes, 2)


def scanned(location: object) -> set[tuple[str | None, str, str]]:
    source = open_source(str(location))
    return {(ref.split, ref.key, source.classes[ref.label]) for ref in source.scan()}


def notices(location: object) -> str:
    source = open_source(str(location))
    list(source.scan())
    return "\n".join(source.notices)


class TestWhichFiles:
    @pytest.mark.parametrize("put", [put_tar, put_parquet])
    @pytest.mark.parametrize(
        ("names", "location"),
        [
            (("train-0{}", "validation-0{}", "test{}"), ""),
            (("train-0{}", "val-0{}", "test-0{}"), "{{train,val,test}}-0{}"),
            (("Train/0{}", "valid/0{}", "TEST/0{}"), ""),
            (("train/0{}", "val/0{}", "test/0{}"), "{{train,val,test}}/*{}"),
            (("data/train-00000-of-00001{}", "data/validation-0{}", "data/test-0{}"), ""),
        ],
    )  # fmt: skip
    def test_names_and_folders_announce_splits(self, tmp_path, put, names, location) -> None:
        suffix = ".tar" if put is put_tar else ".parquet"
        for name, label in zip(names, ("a", "b", "a"), strict=True):
            put(tmp_path / name.format(suffix), label)
        (tmp_path / "README.md").write_text("x")
        source = open_source(f"{tmp_path}/{location.format(suffix)}")
        found = [(ref.split, source.classes[ref.label]) for ref in source.scan()]
        assert found == [("train", "a"), ("val", "b"), ("test", "a")]

    def test_ranges_count_as_bash_does(self, tmp_path: Path) -> None:
        for number in range(8, 12):
            put_tar(tmp_path / f"x-{number:03d}.tar", "a")
        source = open_source(tmp_path / "x-{009..011}.tar")
        assert [ref.key for ref in source.scan()] == ["x-009/0.jpg", "x-010/0.jpg", "x-011/0.jpg"]
        assert [ref.path.partition(b"#")[0] for ref in source.scan()] == [
            b"x-009.tar", b"x-010.tar", b"x-011.tar",
        ]  # fmt: skip

    @pytest.mark.parametrize(
        ("location", "reason"),
        [
            ("x-{0..5}.tar", r"x-2\.tar, named by the pattern .*, is missing"),
            ("y-*.tar", "y-.* is missing"),
            ("x-{5..0}.tar", "no range"),
            ("x-{0..99999999}.tar", "no range"),
            ("{0..9}" * 7 + ".tar", "more than 1048576 files"),
            ("{x-0,x-0}.tar", "names a file twice"),
            ("z.tar", "does not exist"),
        ],
    )
    def test_what_is_not_there_is_named(self, tmp_path: Path, location: str, reason: str) -> None:
        put_tar(tmp_path / "x-0.tar", "a")
        put_tar(tmp_path / "x-1.tar", "a")
        with pytest.raises(SourceError, match=reason):
            open_source(tmp_path / location)

    def test_a_name_that_looks_like_a_pattern_is_taken_as_it_is(self, tmp_path: Path) -> None:
        put_tar(tmp_path / "x[1]{2}.tar", "a")
        assert scanned(tmp_path / "x[1]{2}.tar") == {(None, "x[1]{2}/0.jpg", "a")}

    def test_unclear_splits_are_refused(self, tmp_path: Path) -> None:
        put_tar(tmp_path / "one" / "train-0.tar", "a")
        put_tar(tmp_path / "one" / "more.tar", "a")
        with pytest.raises(SourceError, match=r"train-0\.tar announces a split and more\.tar does"):
            open_source(tmp_path / "one")
        put_tar(tmp_path / "two" / "val-0.tar", "a")
        with pytest.raises(SourceError, match="files of val and none of train"):
            open_source(tmp_path / "two")
        put_tar(tmp_path / "three" / "train" / "0.tar", "a")
        put_tar(tmp_path / "three" / "more.tar", "a")
        with pytest.raises(SourceError, match="beside the folder train"):
            open_source(tmp_path / "three")
        put_parquet(tmp_path / "two" / "train.parquet", "a")
        with pytest.raises(SourceError, match="tar and parquet files"):
            open_source(tmp_path / "two")

    def test_an_archive_beside_class_folders_leaves_them_a_folder(self, tmp_path: Path) -> None:
        put_tar(tmp_path / "all.tar", "a")
        (tmp_path / "ant").mkdir()
        (tmp_path / "ant" / "1.jpg").write_bytes(PICTURE)
        assert scanned(tmp_path) == {(None, "ant/1.jpg", "ant")}

    def test_an_output_inside_a_folder_of_archives_is_refused(self, run, tmp_path: Path) -> None:
        put_tar(tmp_path / "all.tar", "a")
        ran = run("encode", tmp_path, "--out", tmp_path / "out", "--encoder", "bundled")
        assert ran.code == UsageError.exit_code
        assert "is inside the source" in ran.err


class TestOrder:
    @pytest.mark.parametrize("is_sorted", [True, False])
    def test_images_that_come_class_by_class_are_told_of(self, run, tmp_path, is_sorted) -> None:
        labels = sorted("abcd" * 20) if is_sorted else list("abcd" * 20)
        put_tar(tmp_path / "all.tar", *labels)
        ran = run("encode", tmp_path / "all.tar", "--out", tmp_path / "out", "--encoder", "bundled",
                  "--size", "32", "--val-fraction", "0", "--plan-only")  # fmt: skip
        assert ran.code == 0, ran.err
        told = " ".join(ran.err.split())
        assert ("one class after the other" in told) == is_sorted


class TestLabels:
    def test_numbers_without_names_are_their_own(self, tmp_path: Path) -> None:
        put_tar(tmp_path / "x.tar", "10", "2", "0")
        source = open_source(tmp_path / "x.tar")
        assert [ref.label for ref in source.scan()] == [2, 1, 0]
        assert source.classes == ("0", "2", "10")
        assert "labels are 3 numbers without names, 0 to 10" in notices(tmp_path / "x.tar")

    @pytest.mark.parametrize(
        ("name", "content", "titles"),
        [
            ("classes.txt", "zebra\nant\n", ("zebra", "ant")),
            ("classes.txt", "zebra\tstriped horse\nant\n", ("striped horse", "ant")),
            ("classes.json", '["zebra", "ant"]', ("zebra", "ant")),
            ("classes.json", '{"1": "ant", "0": "zebra"}', ("zebra", "ant")),
        ],
    )
    def test_numbers_have_the_names_beside_them(self, tmp_path, name, content, titles) -> None:
        (tmp_path / name).write_text(content)
        put_tar(tmp_path / "x.tar", "1", "0")
        source = open_source(tmp_path)
        assert [source.classes[ref.label] for ref in source.scan()] == ["ant", "zebra"]
        assert source.class_titles == titles
        assert f"their names come from {tmp_path / name}" in notices(tmp_path)

    def test_synsets_have_their_titles(self, tmp_path: Path) -> None:
        (tmp_path / "classes.txt").write_text("n01440764 tench, Tinca\nn01443537 goldfish\n")
        put_tar(tmp_path / "x.tar", "1", "0")
        source = open_source(tmp_path)
        assert source.classes == ("n01440764", "n01443537")
        assert source.class_titles == ("tench, Tinca", "goldfish")
        put_tar(tmp_path / "x.tar", "n01443537", "n01440764")
        assert open_source(tmp_path).classes == source.classes
        assert open_source(tmp_path).class_titles == source.class_titles

    @pytest.mark.parametrize(
        ("name", "content", "reason"),
        [
            ("classes.txt", "a\n", "there is a label 1, but 1 classes"),
            ("classes.txt", "a\n\nb\n", "an empty line, number 2"),
            ("classes.txt", "a\na\n", "names a class twice"),
            ("classes.json", '{"a": "b"}', "gives no names for labels that are numbers"),
            ("classes.json", "[" * 10**5, "is no JSON"),
        ],
    )
    def test_names_that_do_not_fit_are_refused(self, tmp_path, name, content, reason) -> None:
        (tmp_path / name).write_text(content)
        put_tar(tmp_path / "x.tar", "1", "0")
        with pytest.raises(SourceError, match=reason):
            open_source(tmp_path).classes  # noqa: B018

    @pytest.mark.parametrize("put", [put_tar, put_parquet])
    def test_no_label_is_skipped_in_test_and_refused_in_train(self, tmp_path, put) -> None:
        suffix = ".tar" if put is put_tar else ".parquet"
        put(tmp_path / f"train{suffix}", *(("0", "1") if put is put_tar else ("a", "b")))
        put(tmp_path / f"test{suffix}", "-1", "-1", "-1")
        assert {split for split, _, _ in scanned(tmp_path)} == {"train"}
        assert "3 images without a label skipped" in notices(tmp_path)
        put(tmp_path / f"train{suffix}", *(("0", "-1") if put is put_tar else ("a", "-1")))
        with pytest.raises(SourceError, match=r"train.*label"):
            list(open_source(tmp_path).scan())

    def test_a_cls_counts_before_a_json(self, tmp_path: Path) -> None:
        members = [("1.json", b"no JSON"), ("1.jpg", PICTURE), ("1.cls", b"b")]
        members += [("2.jpg", PICTURE), ("2.json", b'{"cls": "a", "label": true}')]
        pack(tmp_path / "x.tar", tar_bytes(members))
        assert scanned(tmp_path / "x.tar") == {(None, "1.jpg", "b"), (None, "2.jpg", "a")}

    def test_archives_that_number_their_samples_anew_get_their_name_into_the_keys(
        self, tmp_path: Path
    ) -> None:
        images = [("0.jpg", PICTURE, "a"), ("1.jpg", PICTURE, "b")]
        for name in ("train-0", "train-1", "val-0"):
            pack(tmp_path / f"{name}.tar", tar_bytes(samples(images)))
        keys = {(split, key) for split, key, _ in scanned(tmp_path)}
        assert keys == {
            (name.split("-")[0], f"{name}.tar/{n}.jpg")
            for name in ("train-0", "train-1", "val-0")
            for n in (0, 1)
        }
        assert "keys are ARCHIVE/NAME" in notices(tmp_path)
        # In two splits a name may be the same.
        (tmp_path / "train-1.tar").unlink()
        assert ("val", "0.jpg") in {(split, key) for split, key, _ in scanned(tmp_path)}
        assert "ARCHIVE" not in notices(tmp_path)


class TestParquet:
    def test_keys_are_paths_only_where_all_are_fit(self, tmp_path: Path) -> None:
        good: list[Entry] = [("a/1.jpg", PICTURE, "a"), ("a/2.jpg", PICTURE, "a")]
        for name in ("../x.jpg", "/x.jpg", "a/1.jpg", "", "http://x/1.jpg", "a//b", None):
            table = image_table([*good, ("a/3.jpg", PICTURE, "a")], ["a"])
            rows = [{"bytes": PICTURE, "path": path} for path in ("a/1.jpg", "a/2.jpg", name)]
            table = table.set_column(
                0, table.schema.field(0), pa.array(rows, table.schema.field(0).type)
            )
            pq.write_table(table, tmp_path / "x.parquet")
            keys = [ref.key for ref in open_source(tmp_path / "x.parquet").scan()]
            assert keys == ["x.parquet/0", "x.parquet/1", "x.parquet/2"], name

    def test_names_of_two_cranes_get_their_number(self, tmp_path: Path) -> None:
        put_parquet(tmp_path / "x.parquet", "ant", classes=("crane", "ant", "crane"))
        source = open_source(tmp_path / "x.parquet")
        assert source.classes == ("crane (0)", "ant", "crane (2)")
        assert "several classes are called crane" in notices(tmp_path / "x.parquet")

    def test_the_names_of_imagenet_21k_fit(self, tmp_path: Path) -> None:
        names = tuple(f"n{number:08d} some words of a title" for number in range(21_841))
        put_parquet(tmp_path / "x.parquet", names[-1], classes=names)
        assert {label for _, _, label in scanned(tmp_path / "x.parquet")} == {names[-1]}

    def test_a_row_group_of_gigabytes_is_refused(self, tmp_path: Path, monkeypatch) -> None:
        monkeypatch.setattr("ci2p_cache.images.parquet._MAX_GROUP_BYTES", 10)
        put_parquet(tmp_path / "x.parquet", *"aaaaaa")
        with pytest.raises(SourceError, match=r"row group of .* bytes; it is read as a whole"):
            list(open_source(tmp_path / "x.parquet").scan())

    def test_files_of_other_names_do_not_belong_together(self, tmp_path: Path) -> None:
        put_parquet(tmp_path / "x-0.parquet", "a")
        put_parquet(tmp_path / "x-1.parquet", "a", classes=("b", "a"))
        with pytest.raises(SourceError, match=r"x-1\.parquet has other class names"):
            list(open_source(tmp_path).scan())

    @pytest.mark.parametrize(
        ("columns", "reason"),
        [
            ({"x": [1]}, "no single image column"),
            ({"image": [{"bytes": b"", "path": ""}]}, "no single label column"),
            ({"image": [{"bytes": b"", "path": ""}], "label": [1.5]}, "of type double"),
            ({"image": [{"bytes": b"", "path": ""}], "label": [None]}, "of type null"),
            ({"image": [{"bytes": b"", "path": ""}] * 2, "label": [0, None]}, "row 1 has no label"),
            ({"image": [{"bytes": b"", "path": ""}], "label": [""]}, "label of 0 characters"),
            ({"image": [], "label": []}, "no single image column"),
        ],
    )
    def test_other_columns_are_refused(self, tmp_path: Path, columns, reason: str) -> None:
        pq.write_table(pa.table(columns), tmp_path / "x.parquet")
        with pytest.raises(SourceError, match=reason):
            list(open_source(tmp_path / "x.parquet").scan())

    def test_a_file_that_was_changed_is_not_read_on(self, tmp_path: Path) -> None:
        put_parquet(tmp_path / "x.parquet", *"aaaaaa")
        source = open_source(tmp_path / "x.parquet")
        refs = list(source.scan())
        source.read(refs[0].path)
        put_parquet(tmp_path / "x.parquet", *"aaaaa")
        with pytest.raises(SourceError, match="changed while it was read"):
            source.read(refs[4].path)
        with pytest.raises(SourceError, match="has 5 rows; row 5 was wanted"):
            open_source(tmp_path / "x.parquet").read(refs[5].path)

    def test_damage_is_refused_by_name_and_ends_no_process(self, tmp_path: Path) -> None:
        path = tmp_path / "x.parquet"
        images = [(f"a/{n}.jpg", PICTURE * 40 + bytes([n]), "ab"[n % 2]) for n in range(12)]
        pq.write_table(image_table(images, "ab"), path, row_group_size=4, write_page_checksum=True)
        whole, contents = path.read_bytes(), [content for _, content, _ in images]
        rng = random.Random(4)
        refused = 0
        for step in range(150):
            data = bytearray(whole)
            if step % 3:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            else:
                del data[rng.randrange(len(data)) :]
            path.write_bytes(data)
            try:
                source = open_source(path)
                got = [source.read(ref.path) for ref in source.scan()]
            except (SourceError, ImageDecodeError) as error:
                refused += 1
                assert isinstance(error, ImageDecodeError) or "x.parquet" in str(error)  # noqa: PT017
                assert len(str(error)) < 2000  # noqa: PT017
                continue
            # Bits of the footer that name a type's annotation, the writer or statistics.
            assert got == contents
        assert refused >= 50


class TestLists:
    def put(self, tmp_path: Path, *lines: str, name: str = "x.csv") -> Path:
        for image in ("a/1.jpg", "b/1.jpg", "train/a/1.jpg", "val/a/1.jpg"):
            (tmp_path / image).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / image).write_bytes(PICTURE)
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return tmp_path / name

    def test_splits_are_taken_from_their_column(self, tmp_path: Path) -> None:
        path = self.put(
            tmp_path, "path,label,split", "train/a/1.jpg,a,train", "val/a/1.jpg,a,validation",
            '"./b/1.jpg","b, or c",TRAIN',
        )  # fmt: skip
        assert scanned(path) == {
            ("train", "a/1.jpg", "a"), ("val", "a/1.jpg", "a"), ("train", "b/1.jpg", "b, or c"),
        }  # fmt: skip

    def test_tabs_numbers_and_names_beside_it(self, tmp_path: Path) -> None:
        path = self.put(tmp_path, "label\tpath", "1\ta/1.jpg", "0\tb/1.jpg", name="x.tsv")
        (tmp_path / "classes.txt").write_text("bee\nant\n")
        assert scanned(path) == {(None, "a/1.jpg", "ant"), (None, "b/1.jpg", "bee")}

    @pytest.mark.parametrize(
        ("lines", "reason"),
        [
            (["a/1.jpg,a"], r"has the columns a/1\.jpg, a; wanted `path`, `label`"),
            ([""], "has the columns none"),
            (["path,label"], "names no labelled image"),
            (["path,label", "a/1.jpg"], "line 2, has another number of values"),
            (["path,label", "a/1.jpg,a,b"], "line 2, has another number of values"),
            (["path,label", '"a/1.jpg,a'], "is no CSV"),
            (["path,label", "a/1.jpg,"], "row 1: a/1.jpg has no label"),
            (["path,label", "/etc/passwd,a"], "row 1: `path` is '/etc/passwd'; wanted one below"),
            (["path,label", "a/../../x,a"], "wanted one below"),
            (["path,label", ",a"], "wanted one below"),
            (["path,label", "s3://x/1.jpg,a"], "is a URL"),
            (["path,label,split", "a/1.jpg,a,new"], "`split` is 'new'; wanted train, val or test"),
            (["path,label,split", "a/1.jpg,a,train", "b/1.jpg,a,"], "with a split and rows"),
            (["path,label,split", "a/1.jpg,a,val"], "no row of the split train"),
            (["path,label", "a/1.jpg,-1"], "has the label -1"),
        ],
    )  # fmt: skip
    def test_rows_that_cannot_be_used_are_refused(self, tmp_path, lines, reason) -> None:
        path = self.put(tmp_path, *lines)
        with pytest.raises(SourceError, match=reason) as caught:
            list(open_source(path).scan())
        assert "x.csv" in str(caught.value)

    def test_a_table_of_other_types_is_refused(self, tmp_path: Path) -> None:
        pq.write_table(pa.table({"path": ["a"], "label": [1.5]}), tmp_path / "x.parquet")
        with pytest.raises(SourceError, match="wanted a text, and a text or whole number"):
            list(open_source(tmp_path / "x.parquet").scan())

    def test_missing_files_are_bad_images(self, tmp_path: Path) -> None:
        source = open_source(self.put(tmp_path, "path,label", "a/1.jpg,a", "a/gone.jpg,a"))
        first, second = source.scan()
        assert source.read(first.path) == PICTURE
        with pytest.raises(ImageDecodeError, match="vanished"):
            source.read(second.path)


def test_metadata_that_is_not_what_it_should_be_is_ignored(tmp_path: Path) -> None:
    for found in ("no JSON", "[]", json.dumps({"info": {"features": {"label": 3}}})):
        table = image_table([("a/1.jpg", PICTURE, "a")], ["a"])
        pq.write_table(
            table.replace_schema_metadata({"huggingface": found}), tmp_path / "x.parquet"
        )
        assert scanned(tmp_path / "x.parquet") == {(None, "a/1.jpg", "0")}
