"""The folder source: layouts, odd names, odd files, and what happens when reading fails."""

from __future__ import annotations

import os
import tracemalloc
from pathlib import Path

import pytest

from ci2p_cache.errors import SourceError, UsageError
from ci2p_cache.images.folder import FolderSource
from ci2p_cache.images.locate import open_source
from ci2p_cache.images.source import ImageRef, ImageSource
from tests.support.pictures import picture


def put(path: Path, name: str = "JPEG", seed: int = 1) -> Path:
    """Writes a small picture, whatever the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        picture(seed, 24, 18).save(file, name)
    return path


def text(path: Path, content: str = "no image") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, "utf-8")
    return path


def keys(source: ImageSource) -> list[str]:
    return [ref.key for ref in source.scan()]


def labelled(source: ImageSource) -> set[tuple[str | None, str, str]]:
    return {(ref.split, ref.key, source.classes[ref.label]) for ref in source.scan()}


def notice(source: ImageSource, word: str) -> str:
    """Scans, and returns the one notice that holds a word."""
    list(source.scan())
    found = [line for line in source.notices if word in line]
    assert len(found) == 1, source.notices
    return found[0]


# --- layouts --------------------------------------------------------------------------------------


def test_class_folders_are_classes_and_nested_folders_belong_to_them(tmp_path: Path) -> None:
    for name in ("bee/2.jpg", "ant/1.jpg", "ant/deep/er/1.jpg", "Cat/1.JPG"):
        put(tmp_path / name)
    source = open_source(tmp_path)
    assert source.classes == ("Cat", "ant", "bee")
    assert source.class_titles == source.classes
    assert list(source.scan()) == [
        ImageRef("Cat/1.JPG", None, 0, b"Cat/1.JPG"),
        ImageRef("ant/1.jpg", None, 1, b"ant/1.jpg"),
        ImageRef("ant/deep/er/1.jpg", None, 1, b"ant/deep/er/1.jpg"),
        ImageRef("bee/2.jpg", None, 2, b"bee/2.jpg"),
    ]
    assert source.notices == ()
    assert isinstance(source, FolderSource)
    assert source.layout == "class folders"


def test_a_scan_repeats_itself_and_reads_what_it_names(image_folder: Path) -> None:
    source = open_source(str(image_folder))
    first = list(source.scan())
    assert list(source.scan()) == first == list(open_source(image_folder).scan())
    assert len(first) == 21
    for ref in first:
        assert source.read(ref.path) == (image_folder / ref.key).read_bytes()
    assert source.location() == str(image_folder)


@pytest.mark.parametrize(
    ("val", "test"), [("val", "test"), ("valid", "Test"), ("validation", "TEST"), ("Val", "test")]
)
def test_split_folders_have_one_class_list(tmp_path: Path, val: str, test: str) -> None:
    for name in ("train/b/1.jpg", "train/a/1.jpg", f"{val}/c/2.jpg", f"{val}/a/1.jpg"):
        put(tmp_path / name)
    put(tmp_path / test / "b" / "3.jpg")
    source = open_source(tmp_path)
    assert source.classes == ("a", "b", "c")
    assert labelled(source) == {
        ("train", "a/1.jpg", "a"),
        ("train", "b/1.jpg", "b"),
        ("val", "a/1.jpg", "a"),
        ("val", "c/2.jpg", "c"),
        ("test", "b/3.jpg", "b"),
    }
    assert [ref.split for ref in source.scan()] == ["train"] * 2 + ["val"] * 2 + ["test"]
    assert notice(source, "unknown") == "1 class (c): in val, but unknown to train"
    assert source.read(f"{val}/c/2.jpg".encode()) == (tmp_path / val / "c/2.jpg").read_bytes()


def test_train_alone_is_a_split(tmp_path: Path) -> None:
    put(tmp_path / "train" / "a" / "1.jpg")
    put(tmp_path / ".cache" / "x.jpg")
    source = open_source(tmp_path)
    assert labelled(source) == {("train", "a/1.jpg", "a")}
    assert isinstance(source, FolderSource)
    assert source.layout == "split folders train"


def test_train_among_other_folders_is_a_class(tmp_path: Path) -> None:
    for name in ("train/1.jpg", "train/steam/2.jpg", "plane/1.jpg"):
        put(tmp_path / name)
    source = open_source(tmp_path)
    assert source.classes == ("plane", "train")
    assert "train is taken as a class, because plane beside it is no split" in source.notices


def test_splits_beside_other_folders_are_refused(tmp_path: Path) -> None:
    for name in ("train/a/1.jpg", "val/a/1.jpg", "annotations/1.jpg"):
        put(tmp_path / name)
    with pytest.raises(SourceError, match=r"split folders \(train, val\) beside other folders"):
        open_source(tmp_path)


def test_splits_without_train_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "val" / "a" / "1.jpg")
    put(tmp_path / "test" / "a" / "1.jpg")
    with pytest.raises(SourceError, match="has test, val and no train folder"):
        open_source(tmp_path)


def test_two_folders_of_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train/a/1.jpg", "val/a/1.jpg", "valid/a/1.jpg"):
        put(tmp_path / name)
    with pytest.raises(SourceError, match=r"val and valid in .* are both the val split"):
        open_source(tmp_path)


def test_a_flat_train_folder_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "train" / "1.jpg")
    with pytest.raises(SourceError, match=r"train has no class folders, but 1 images.*1\.jpg"):
        open_source(tmp_path)


def test_a_flat_test_folder_is_skipped_with_a_notice(tmp_path: Path) -> None:
    put(tmp_path / "train" / "a" / "1.jpg")
    put(tmp_path / "test" / "1.jpg")
    put(tmp_path / "test" / "2", "PNG")
    source = open_source(tmp_path)
    assert labelled(source) == {("train", "a/1.jpg", "a")}
    assert "test holds 2 images without labels; skipped" in notice(source, "without labels")


def test_an_empty_split_folder_is_said(tmp_path: Path) -> None:
    put(tmp_path / "train" / "a" / "1.jpg")
    (tmp_path / "val").mkdir()
    assert "left out that hold no image, for example val" in notice(open_source(tmp_path), "val")


def test_a_class_folder_without_images_is_no_class(tmp_path: Path) -> None:
    put(tmp_path / "b" / "1.jpg")
    (tmp_path / "a").mkdir()
    source = open_source(tmp_path)
    assert source.classes == ("b",)
    assert [ref.label for ref in source.scan()] == [0]
    assert notice(source, "no image") == "1 folders left out that hold no image, for example a"


def test_images_beside_class_folders_are_counted_and_not_used(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "2.jpg", "3.png"):
        put(tmp_path / name)
    text(tmp_path / "README.md")
    source = open_source(tmp_path)
    assert keys(source) == ["a/1.jpg"]
    assert notice(source, "beside") == (
        "2 images ignored that are beside the class folders, in none of them, for example 2.jpg"
    )


# --- what is no source ----------------------------------------------------------------------------


def test_what_is_no_folder_of_images_is_refused_with_the_layouts(tmp_path: Path) -> None:
    layouts = r"wanted SRC/CLASS/image\.jpg, SRC/\{train,val,test\}/CLASS/image\.jpg"
    with pytest.raises(SourceError, match=f"nothing does not exist; {layouts}"):
        open_source(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError, match=f"no class folders, and no files; {layouts}"):
        open_source(tmp_path / "empty")
    text(tmp_path / "words" / "a.txt")
    with pytest.raises(SourceError, match=r"and 1 files that are no images, for example a\.txt"):
        open_source(tmp_path / "words")
    put(tmp_path / "flat" / "1.jpg")
    with pytest.raises(SourceError, match=rf"but 1 images, for example 1\.jpg; {layouts}"):
        open_source(tmp_path / "flat")
    with pytest.raises(SourceError, match=r"1\.jpg is a file, not a folder"):
        open_source(tmp_path / "flat" / "1.jpg")
    with pytest.raises(SourceError, match="cannot be read: Not a directory"):
        open_source(tmp_path / "flat" / "1.jpg" / "x")
    with pytest.raises(SourceError, match="location of the images is empty"):
        open_source("")


def test_class_folders_without_any_image_are_refused(tmp_path: Path) -> None:
    text(tmp_path / "a" / "1.txt")
    (tmp_path / "b").mkdir()
    with pytest.raises(SourceError, match=r"has no image in it; .*1 files") as caught:
        open_source(tmp_path)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("name", ["file:///images", "ftp://example.org/x.tar", "memory://images"])
def test_urls_of_other_kinds_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match="a URL that begins with s3://, gs://, http://, https://"):
        open_source(name)


def test_commands_are_refused() -> None:
    with pytest.raises(SourceError, match="pipe:ls is a command"):
        open_source("pipe:ls")


@pytest.mark.parametrize("name", ["a.tar", "b.TAR.GZ", "c.parquet", "d.zip", "e.csv"])
def test_folders_called_like_archives_are_folders(tmp_path: Path, name: str) -> None:
    with pytest.raises(SourceError, match=r"does not exist|is a zip archive"):
        list(open_source(tmp_path / name).scan())
    put(tmp_path / name / "a" / "1.jpg")
    assert keys(open_source(tmp_path / name)) == ["a/1.jpg"]


# --- names for people -----------------------------------------------------------------------------


def titles(tmp_path: Path, name: str, content: str) -> FolderSource:
    for folder in ("ant", "great white", "n01440764"):
        put(tmp_path / folder / "1.jpg")
    text(tmp_path / name, content)
    source = open_source(tmp_path)
    assert isinstance(source, FolderSource)
    return source


def test_classes_txt_gives_titles(tmp_path: Path) -> None:
    source = titles(
        tmp_path,
        "classes.txt",
        "\ufeffn01440764 tench, Tinca tinca\ngreat white\tCarcharodon carcharias\n\nant\nyak Yak\n",
    )
    assert source.classes == ("ant", "great white", "n01440764")
    assert source.class_titles == ("ant", "Carcharodon carcharias", "tench, Tinca tinca")
    assert source.notices == ()


def test_classes_json_gives_titles(tmp_path: Path) -> None:
    source = titles(tmp_path, "classes.json", '{"ant": "Ameise", "great white": "Hai"}')
    assert source.class_titles == ("Ameise", "Hai", "n01440764")
    assert notice(source, "names 2 of 3 classes").endswith("not, for example, n01440764")


@pytest.mark.parametrize(
    ("content", "reason"),
    [("[1]", "wants an object"), ('{"ant": 1}', "wants an object"), ("{", "is no JSON")],
)
def test_a_classes_file_of_another_form_costs_only_the_titles(
    tmp_path: Path, content: str, reason: str
) -> None:
    source = titles(tmp_path, "classes.json", content)
    assert source.class_titles == source.classes
    assert reason in notice(source, "no names for people")


def test_unreadable_text_is_said(tmp_path: Path) -> None:
    titles(tmp_path, "classes.txt", "")
    (tmp_path / "classes.txt").write_bytes(b"ant \xff\n")
    assert "cannot be read" in notice(open_source(tmp_path), "no names for people")
    os.truncate(tmp_path / "classes.txt", 2**30)
    assert "is larger than" in notice(open_source(tmp_path), "no names for people")


# --- a whole data set -----------------------------------------------------------------------------


def test_flowers_are_listed_as_torchvision_lists_them(shared_data: Path) -> None:
    torchvision = pytest.importorskip("torchvision.datasets")
    reference = torchvision.ImageFolder(str(shared_data / "flowers"))
    source = open_source(shared_data / "flowers")
    assert list(source.classes) == reference.classes
    found = [(str(shared_data / "flowers" / ref.key), ref.label) for ref in source.scan()]
    assert found == reference.samples


def test_a_scan_holds_one_folder_and_not_the_whole_source(tmp_path: Path) -> None:
    content = put(tmp_path / "one" / "c0" / "0.jpg")
    for root, num_folders in (("one", 1), ("many", 10)):
        for folder in range(num_folders):
            (tmp_path / root / f"c{folder}").mkdir(parents=True, exist_ok=True)
            for number in range(1, 1000):
                os.link(content, tmp_path / root / f"c{folder}" / f"{number}.jpg")

    def peak_bytes(root: Path) -> int:
        source = open_source(root)
        tracemalloc.start()
        num_refs = sum(1 for _ in source.scan())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert num_refs >= 999
        return peak

    assert peak_bytes(tmp_path / "many") < 2 * peak_bytes(tmp_path / "one")


def test_the_awkward_folder_is_listed_whole(shared_data: Path, tmp_path: Path) -> None:
    (tmp_path / "all").symlink_to(shared_data / "awkward")
    source = open_source(tmp_path)
    names = {path.name for path in (shared_data / "awkward").iterdir()}
    assert {ref.key for ref in source.scan()} == {
        f"all/{name}" for name in names - {"README.md", "avif.avif"}
    }
    assert "(1 .avif)" in notice(source, "not read")
    assert notice(source, "no images").endswith("all/README.md")
