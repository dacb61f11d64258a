"""Layouts are found out or refused, never guessed: what people's folders look like."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

import ci2p_cache as cc
from ci2p_cache.errors import SourceError
from ci2p_cache.images.folder import FolderSource
from ci2p_cache.images.locate import open_source
from ci2p_cache.images.source import ImageSource
from tests.support.caches import with_options
from tests.support.pictures import picture

CLASSES = ("ant", "bee")


def put(root: Path, names: Iterable[str]) -> Path:
    """Writes the same small picture under each of some names."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture(1, 24, 18).save(root / name, "JPEG")
    return root


def text(path: Path, *lines: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")


def in_classes(*folders: str, classes: Iterable[str] = CLASSES) -> list[str]:
    return [f"{folder}/{name}/1.jpg" for folder in folders for name in classes]


def labelled(source: ImageSource) -> set[tuple[str | None, str, str]]:
    return {(ref.split, ref.key, source.classes[ref.label]) for ref in source.scan()}


def splits(source: ImageSource) -> dict[str | None, int]:
    found: dict[str | None, int] = {}
    for ref in source.scan():
        found[ref.split] = found.get(ref.split, 0) + 1
    return found


def refused(location: Path, match: str) -> SourceError:
    with pytest.raises(SourceError, match=match) as caught:
        list(open_source(location).scan())
    return caught.value


# --- names of splits ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (("Training", "Testing"), {"train", "test"}),
        (("training", "validation", "testing"), {"train", "val", "test"}),
        (("TRAIN", "DEV", "EVALUATION_no"), None),
        (("train", "dev", "test"), {"train", "val", "test"}),
        (("train", "eval"), {"train", "val"}),
        (("trainval", "test"), {"train", "test"}),
        (("seg_train", "seg_test"), {"train", "test"}),
        (("training_set", "test_set"), {"train", "test"}),
        (("Train Images", "Test Images"), {"train", "test"}),
        (("asl-Train-v2", "asl-Valid-v2", "asl-Test-v2"), {"train", "val", "test"}),
        (("train2017", "val2017"), {"train", "val"}),
        (("trainset", "testset", "valset"), {"train", "val", "test"}),
    ],
)
def test_splits_are_found_by_the_names_that_people_give_them(
    tmp_path: Path, folders: tuple[str, ...], found: set[str] | None
) -> None:
    put(tmp_path, in_classes(*folders))
    if found is None:
        refused(tmp_path, "beside other folders|look like splits")
        return
    source = open_source(tmp_path)
    assert source.classes == CLASSES
    assert set(splits(source)) == found
    assert all(key.split("/")[0] in CLASSES for _, key, _ in labelled(source))


def test_unusual_names_of_splits_are_said(tmp_path: Path) -> None:
    put(tmp_path, in_classes("Training", "Testing"))
    source = open_source(tmp_path)
    assert isinstance(source, FolderSource)
    assert source.layout == "split folders train, test"
    assert "taken as splits: Testing as test, Training as train" in source.notices


@pytest.mark.parametrize("name", ["test", "train", "val", "dev", "valid", "Eval"])
def test_a_class_with_the_name_of_a_split_is_a_class(tmp_path: Path, name: str) -> None:
    put(tmp_path, [f"{name}/1.jpg", "plane/1.jpg", "ship/deep/1.jpg"])
    source = open_source(tmp_path)
    assert source.classes == tuple(sorted([name, "plane", "ship"]))
    assert set(splits(source)) == {None}


@pytest.mark.parametrize(
    "names",
    [("valid", "invalid"), ("bullet_train", "strainer", "crash_test"), ("eval_a", "device")],
)
def test_words_for_splits_within_names_of_classes_mean_nothing(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    put(tmp_path, [f"{name}/1.jpg" for name in names])
    assert open_source(tmp_path).classes == tuple(sorted(names))


@pytest.mark.parametrize(
    "folders",
    [
        ("train", "test1"),
        ("Training", "PublicTest", "PrivateTest"),
        ("new_train", "val_images"),
        ("test1", "test2"),
        ("train", "unlabeled"),
    ],
)
def test_names_that_look_like_splits_and_do_not_fit_are_refused(
    tmp_path: Path, folders: tuple[str, ...]
) -> None:
    put(tmp_path, [f"{folder}/{number}.jpg" for folder in folders for number in (1, 2)])
    error = refused(tmp_path, "look like splits, not classes")
    assert "call the folders train, val and test" in (error.hint or "")


@pytest.mark.parametrize("name", ["images_part_{}", "fold{}", "images_00{}"])
def test_parts_of_one_set_are_no_classes(tmp_path: Path, name: str) -> None:
    put(tmp_path, [f"{name.format(number)}/1.jpg" for number in (1, 2)])
    error = refused(tmp_path, "look like parts of one set")
    assert "path, label and split" in (error.hint or "")


def test_splits_beside_something_else_are_refused(tmp_path: Path) -> None:
    put(tmp_path, [*in_classes("training_set", "test_set"), "single_prediction/1.jpg"])
    refused(tmp_path, r"\(test_set, training_set\) beside other folders \(single_prediction\)")


# --- what is in the folders -----------------------------------------------------------------------


def test_a_folder_that_repeats_the_source_is_refused(tmp_path: Path) -> None:
    put(tmp_path, [*in_classes(".", "flowers")])
    refused(tmp_path, r"flowers holds ant, bee, as if it were the source again")


def test_a_split_beside_its_classes_is_refused(tmp_path: Path) -> None:
    put(tmp_path, ["ant/1.jpg", "bee/1.jpg", *in_classes("val")])
    error = refused(tmp_path, "val holds ant, bee")
    assert "move val out of the source" in (error.hint or "")


def test_a_train_folder_of_folders_beside_images_is_refused(tmp_path: Path) -> None:
    put(tmp_path, [*in_classes("train"), "samples/1.jpg"])
    refused(tmp_path, r"train has the name of a split and holds folders \(ant, bee\)")


def test_versions_of_one_set_are_refused(tmp_path: Path) -> None:
    put(tmp_path, in_classes("color", "grayscale", "segmented"))
    refused(tmp_path, r"each holds the same folders \(ant, bee\)")


def test_splits_within_classes_are_refused(tmp_path: Path) -> None:
    put(tmp_path, ["ant/train/1.jpg", "ant/test/2.jpg", "bee/train/3.jpg", "bee/test/4.jpg"])
    error = refused(tmp_path, "ant holds test, train, which look like splits within a class")
    assert "train/ant/" in (error.hint or "")


# --- folders around everything --------------------------------------------------------------------


@pytest.mark.parametrize("around", ["flower_photos", "archive/data", "a/b/c/d"])
def test_single_folders_around_everything_are_looked_into(tmp_path: Path, around: str) -> None:
    put(tmp_path / around, in_classes("."))
    text(tmp_path / "LICENSE.txt", "free")
    source = open_source(tmp_path)
    assert labelled(source) == {(None, f"{name}/1.jpg", name) for name in CLASSES}
    assert any(f"{around} is the only folder" in line for line in source.notices)
    for ref in source.scan():
        assert source.read(ref.path) == (tmp_path / around / ref.key).read_bytes()


def test_splits_in_a_wrapper_are_splits(tmp_path: Path) -> None:
    put(tmp_path / "archive", in_classes("train", "val"))
    (tmp_path / "__MACOSX").mkdir()
    source = open_source(tmp_path)
    assert labelled(source) == {
        (split, f"{name}/1.jpg", name) for split in ("train", "val") for name in CLASSES
    }


def test_splits_wrapped_one_by_one_are_looked_into(tmp_path: Path) -> None:
    put(tmp_path, in_classes("seg_train/seg_train", "seg_test/seg_test"))
    put(tmp_path, ["seg_pred/seg_pred/1.jpg", "seg_pred/seg_pred/2.jpg"])
    source = open_source(tmp_path)
    assert source.classes == CLASSES
    assert splits(source) == {"train": 2, "test": 2}
    assert any("seg_pred holds 2 images without labels; skipped" in x for x in source.notices)


def test_a_folder_with_images_of_its_own_is_no_wrapper(tmp_path: Path) -> None:
    put(tmp_path, ["flowers/1.jpg", "flowers/more/2.jpg"])
    assert open_source(tmp_path).classes == ("flowers",)


# --- public data sets -----------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Tiny ImageNet as it is unzipped."""
    root = tmp_path / "tiny-imagenet-200"
    wnids = ("n01443537", "n01629819")
    for wnid in wnids:
        put(root, [f"train/{wnid}/images/{wnid}_{number}.JPEG" for number in range(2)])
        text(root / "train" / wnid / f"{wnid}_boxes.txt", f"{wnid}_0.JPEG\t0\t10\t63\t58")
    put(root, [f"val/images/val_{number}.JPEG" for number in range(3)])
    rows = [f"val_{n}.JPEG\t{wnids[n % 2]}\t0\t32\t44\t62" for n in range(3)]
    text(root / "val" / "val_annotations.txt", *rows)
    put(root, ["test/images/test_0.JPEG"])
    text(root / "wnids.txt", *wnids)
    text(root / "words.txt", "n00001740\tentity", "n01443537\tgoldfish", "n01629819\tsalamander")
    return root


@pytest.mark.parametrize("around", [True, False])
def test_tiny_imagenet_is_read_as_unzipped(tiny: Path, around: bool) -> None:
    source = open_source(tiny.parent if around else tiny)
    assert source.classes == ("n01443537", "n01629819")
    assert source.class_titles == ("goldfish", "salamander")
    assert splits(source) == {"train": 4, "val": 3}
    val = {(key, name) for split, key, name in labelled(source) if split == "val"}
    assert val == {
        ("val_0.JPEG", "n01443537"),
        ("val_1.JPEG", "n01629819"),
        ("val_2.JPEG", "n01443537"),
    }
    assert any("1 images without labels; skipped" in line for line in source.notices)


def test_tiny_imagenet_without_a_row_for_an_image_is_refused(tiny: Path) -> None:
    put(tiny, ["val/images/val_9.JPEG"])
    refused(tiny, r"val_annotations\.txt has no row for the image val_9\.JPEG")
    (tiny / "val" / "val_annotations.txt").unlink()
    error = refused(tiny, r"looked for val_annotations\.txt in it")
    assert "--labels none" in (error.hint or "")


def test_cub_is_read_with_its_own_split(tmp_path: Path) -> None:
    root = tmp_path / "CUB_200_2011"
    names = ["001.Albatross/A_1.jpg", "001.Albatross/A_2.jpg", "002.Auklet/B_1.jpg"]
    put(root / "images", [*names, "002.Auklet/B_9.jpg"])
    (root / "attributes").mkdir()
    (root / "parts").mkdir()
    text(tmp_path / "attributes.txt", "1 has_bill")
    text(root / "images.txt", *(f"{n} {name}" for n, name in enumerate(names, 1)))
    text(root / "image_class_labels.txt", "1 1", "2 1", "3 2")
    text(root / "train_test_split.txt", "1 1", "2 0", "3 1")
    text(root / "classes.txt", "1 001.Albatross", "2 002.Auklet")
    source = open_source(tmp_path)
    assert labelled(source) == {
        ("train", names[0], "001.Albatross"),
        ("test", names[1], "001.Albatross"),
        ("train", names[2], "002.Auklet"),
    }
    assert any("1 images skipped that no list names" in line for line in source.notices)
    text(root / "train_test_split.txt", "1 1", "2 0")
    refused(root, r"image 3 .* has no split in train_test_split\.txt")


def test_food_101_is_read_with_its_own_split(tmp_path: Path) -> None:
    put(tmp_path / "images", ["pizza/1.jpg", "pizza/2.jpg", "ramen/3.jpg", "ramen/4.jpg"])
    text(tmp_path / "meta" / "train.txt", "pizza/1", "ramen/3")
    text(tmp_path / "meta" / "test.txt", "pizza/2", "ramen/4", "ramen/5")
    source = open_source(tmp_path)
    assert labelled(source) == {
        ("train", "pizza/1.jpg", "pizza"),
        ("test", "pizza/2.jpg", "pizza"),
        ("train", "ramen/3.jpg", "ramen"),
        ("test", "ramen/4.jpg", "ramen"),
    }
    assert any("1 of 5 images in the lists of Food-101 are missing" in x for x in source.notices)


def test_the_oxford_pets_are_read_by_the_names_of_their_files(tmp_path: Path) -> None:
    put(tmp_path / "images", ["Abyssinian_1.jpg", "american_bulldog_10.jpg", "Abyssinian_2.jpg"])
    text(tmp_path / "images" / "Abyssinian_100.mat", "no image")
    put(tmp_path / "annotations" / "trimaps", ["Abyssinian_1.png"])
    text(tmp_path / "annotations" / "list.txt", "#Image CLASS-ID SPECIES BREED ID")
    text(tmp_path / "annotations" / "trainval.txt", "Abyssinian_1 1 1 1", "american_bulldog_10 2 2")
    text(tmp_path / "annotations" / "test.txt", "Abyssinian_2 1 1 1")
    assert labelled(open_source(tmp_path)) == {
        ("train", "Abyssinian_1.jpg", "Abyssinian"),
        ("train", "american_bulldog_10.jpg", "american_bulldog"),
        ("test", "Abyssinian_2.jpg", "Abyssinian"),
    }
    put(tmp_path / "other" / "images", ["x_1.jpg"])
    (tmp_path / "annotations").rename(tmp_path / "other" / "annotations")
    refused(tmp_path / "other", "laid out as Oxford-IIIT Pet, and none of the 2 images")


@pytest.mark.parametrize(
    ("names", "cut"),
    [
        (("cat.0.jpg", "cat.1.jpg", "dog.0.jpg"), "${f%%.*}"),
        (("Maine_Coon_1.jpg", "Maine_Coon_2.jpg", "pug_3.jpg"), "${f%_*}"),
    ],
)
def test_classes_in_the_names_of_files_are_refused_with_a_command_that_lists_them(
    tmp_path: Path, names: tuple[str, ...], cut: str
) -> None:
    put(tmp_path / "train", names)
    error = refused(tmp_path, "train has no class folders, but 3 images")
    hint = error.hint or ""
    assert f'echo "$f,{cut}"' in hint
    assert "--labels none" in hint
    # It does what it says.
    script = hint.partition("begin with the class: ")[2].partition("; then name")[0]
    subprocess.run(["bash", "-ec", script], cwd=tmp_path, check=True)
    found = {(key, name) for _, key, name in labelled(open_source(tmp_path / "train/labels.csv"))}
    assert found == {(name, re.split(r"[_.]\d", name)[0]) for name in names}


def test_a_list_or_an_archive_beside_flat_images_is_named(tmp_path: Path) -> None:
    put(tmp_path / "train", ["1.jpg", "2.jpg"])
    text(tmp_path / "labels.csv", "id,breed")
    assert f"name {tmp_path}/labels.csv as SRC" in (refused(tmp_path, "no class").hint or "")
    (tmp_path / "zips").mkdir()
    (tmp_path / "zips" / "animals.zip").write_bytes(b"PK")
    assert "animals.zip as SRC" in (refused(tmp_path / "zips", "no class folders").hint or "")


# --- through the command's function: what is refused once the images are listed -------------------


def test_one_class_is_refused(tmp_path: Path) -> None:
    put(tmp_path / "src" / "flowers", ["1.jpg", "2.jpg"])
    (tmp_path / "src" / "Annotations").mkdir()
    with pytest.raises(
        SourceError, match=r"all 2 images to train from in .* are of one class, 'flowers'"
    ) as got:
        cc.encode(tmp_path / "src", tmp_path / "out", with_options())
    assert "--labels none" in (got.value.hint or "")
    assert not (tmp_path / "out").exists()


def test_one_class_in_train_is_refused_whatever_val_has(tmp_path: Path) -> None:
    put(tmp_path / "src", ["train/ant/1.jpg", *in_classes("val")])
    with pytest.raises(SourceError, match=r"to train from in .* are of one class, 'ant'"):
        cc.encode(tmp_path / "src", tmp_path / "out", with_options())


def test_one_class_is_refused_from_a_list_too(tmp_path: Path) -> None:
    put(tmp_path, ["1.jpg", "2.jpg"])
    text(tmp_path / "list.csv", "path,label", "1.jpg,ant", "2.jpg,ant")
    with pytest.raises(SourceError, match="are of one class, 'ant'"):
        cc.encode(tmp_path / "list.csv", tmp_path / "out", with_options())


def test_labels_that_are_splits_are_refused(tmp_path: Path) -> None:
    put(tmp_path, ["1.jpg", "2.jpg"])
    text(tmp_path / "list.csv", "path,label", "1.jpg,training", "2.jpg,test")
    with pytest.raises(SourceError, match="would be 'test', 'training', which look like splits"):
        cc.encode(tmp_path / "list.csv", tmp_path / "out", with_options())


@pytest.mark.parametrize("split", ["val", "test"])
def test_a_split_none_of_whose_classes_train_knows_is_refused(tmp_path: Path, split: str) -> None:
    put(tmp_path / "src", in_classes("train"))
    put(tmp_path / "src", in_classes(split, classes=("1_ant", "2_bee")))
    with pytest.raises(
        SourceError, match=rf"none of the 2 classes of {split} in .* known to train"
    ):
        cc.encode(tmp_path / "src", tmp_path / "out", with_options())


def test_a_plan_that_was_made_is_completed_whatever_its_source_looks_like_now(
    tmp_path: Path,
) -> None:
    put(tmp_path / "src", ["ant/1.jpg", "bee/1.jpg"])
    options = with_options(plan_only=True, val_fraction=0.0)
    cc.encode(tmp_path / "src", tmp_path / "out", options)
    put(tmp_path / "src", in_classes("again"))
    refused(tmp_path / "src", "as if it were the source again")
    done = cc.encode(tmp_path / "src", tmp_path / "out", with_options(val_fraction=0.0))
    assert (done.complete, done.images) == (True, 2)
