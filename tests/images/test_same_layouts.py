"""One data set has one answer, through its folder, a zip and a tar of it: images or a refusal."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from ci2p_cache.errors import SourceError
from ci2p_cache.images.locate import open_source
from ci2p_cache.images.source import Labels, SourceOptions
from tests.images.test_layouts import in_classes
from tests.images.test_zip import jpeg
from tests.support.sources import pack, tar_bytes

Found = set[tuple[str | None, str, str | None]]

FORMS = ["folder", "zip", "tar", "tar.gz"]
CUB = [f"{c}/{n}.jpg" for c in ("1.Auk", "2.Owl") for n in range(2)]
TRAIN = "train/ant/1.jpg", "train/bee/2.jpg"


def made(root: Path, files: Mapping[str, str], form: str) -> Path:
    """Writes files, images where no text is given, as a folder or in an archive."""
    members = [
        (name, content.encode() if content else jpeg(seed))
        for seed, (name, content) in enumerate(files.items())
    ]
    if form == "zip":
        with zipfile.ZipFile(root / "x.zip", "w") as archive:
            for name, content in members:
                archive.writestr(name, content)
        return root / "x.zip"
    if form != "folder":
        return pack(root / f"x.{form}", tar_bytes(members))
    for name, content in members:
        (root / "x" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "x" / name).write_bytes(content)
    return root / "x"


def found(location: Path, labels: Labels = "auto") -> Found:
    source = open_source(location, SourceOptions(labels=labels))
    return {
        (ref.split, ref.key, source.classes[ref.label] if ref.label >= 0 else None)
        for ref in source.scan()
    }


def images(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "")


READ: dict[str, tuple[dict[str, str], Found]] = {
    "CUB-200-2011": (
        images(*(f"CUB/images/{name}" for name in CUB))
        | {
            "CUB/images.txt": "".join(f"{n} {name}\n" for n, name in enumerate(CUB)),
            "CUB/train_test_split.txt": "0 1\n1 0\n2 1\n3 0\n",
            "CUB/classes.txt": "1 1.Auk\n2 2.Owl\n",
        },
        {("test" if "/1" in name else "train", name, name[:5]) for name in CUB},
    ),
    "Food-101": (
        images("f/images/pizza/1.jpg", "f/images/ramen/2.jpg", "f/images/ramen/3.jpg")
        | {"f/meta/train.txt": "pizza/1\nramen/2\n", "f/meta/test.txt": "ramen/3\n"},
        {
            ("train", "pizza/1.jpg", "pizza"),
            ("train", "ramen/2.jpg", "ramen"),
            ("test", "ramen/3.jpg", "ramen"),
        },
    ),
    "Tiny ImageNet": (
        images("t/train/n1/images/1.JPEG", "t/train/n2/images/2.JPEG", "t/val/images/v.JPEG")
        | images("t/test/images/t.JPEG")
        | {"t/val/val_annotations.txt": "v.JPEG\tn2\t0\t0\t9\t9\n"},
        {
            ("train", "n1/images/1.JPEG", "n1"),
            ("train", "n2/images/2.JPEG", "n2"),
            ("val", "v.JPEG", "n2"),
        },
    ),
    "splits in folders of their own": (
        images("seg_train/seg_train/ant/1.jpg", "seg_train/seg_train/bee/2.jpg")
        | images("seg_test/seg_test/bee/3.jpg", "seg_pred/seg_pred/4.jpg"),
        {
            ("train", "ant/1.jpg", "ant"),
            ("train", "bee/2.jpg", "bee"),
            ("test", "bee/3.jpg", "bee"),
        },
    ),
    "annotations beside the images": (
        images("Images/ant/1.jpg", "Images/bee/2.jpg")
        | {"Annotation/ant/1": "<xml>", "Annotation/bee/2": "<xml>"},
        {(None, "ant/1.jpg", "ant"), (None, "bee/2.jpg", "bee")},
    ),
    "splits beside a folder without images": (
        images(*TRAIN, "val/bee/3.jpg") | {"models/a.h5": "weights"},
        {
            ("train", "ant/1.jpg", "ant"),
            ("train", "bee/2.jpg", "bee"),
            ("val", "bee/3.jpg", "bee"),
        },
    ),
    "images beside split folders": (
        images(*TRAIN, "val/bee/3.jpg", "cover.png", "train/4.jpg"),
        {
            ("train", "ant/1.jpg", "ant"),
            ("train", "bee/2.jpg", "bee"),
            ("val", "bee/3.jpg", "bee"),
        },
    ),
}

REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "the source again in itself": (
        images("ant/1.jpg", "bee/1.jpg", *in_classes("all")), "as if it were the source again",
    ),
    "versions of one set": (
        images(*in_classes("color", "gray")), "splits or versions of one set",
    ),
    "splits within classes": (
        images(*in_classes("ant", "bee", classes=("train", "test"))), "splits within a class",
    ),
    "a flat val without labels": (images(*TRAIN, "val/3.jpg"), "nothing says what they show"),
}  # fmt: skip

UNLABELLED: dict[str, tuple[list[str], set[tuple[str | None, str]] | str]] = {
    "flat splits": (["train/1.jpg", "val/2.jpg"], {("train", "1.jpg"), ("val", "2.jpg")}),
    "a folder around": (["d/i/1.jpg", "d/i/2.jpg"], {(None, "i/1.jpg"), (None, "i/2.jpg")}),
    "splits beside others": ([*TRAIN, "val/ant/1.jpg", "x/1.jpg"], "beside other folders"),
    "names like splits": (["train/1.jpg", "test1/2.jpg"], "look like splits"),
    "no train": (["val/1.jpg", "test/2.jpg"], "no train folder"),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", READ)
def test_a_layout_is_read_alike_from_a_folder_and_from_archives(
    tmp_path: Path, name: str, form: str
) -> None:
    files, wanted = READ[name]
    assert found(made(tmp_path, files, form)) == wanted


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", REFUSED)
def test_a_layout_that_could_mean_two_things_is_refused_from_each(
    tmp_path: Path, name: str, form: str
) -> None:
    files, reason = REFUSED[name]
    with pytest.raises(SourceError, match=reason) as caught:
        found(made(tmp_path, files, form))
    assert caught.value.hint


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", UNLABELLED)
def test_images_without_labels_have_the_same_splits_and_keys_from_each(
    tmp_path: Path, name: str, form: str
) -> None:
    files, wanted = UNLABELLED[name]
    path = made(tmp_path, images(*files), form)
    if isinstance(wanted, str):
        with pytest.raises(SourceError, match=wanted):
            found(path, "none")
    else:
        assert found(path, "none") == {(split, key, None) for split, key in wanted}


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_without_images_is_said(tmp_path: Path, form: str) -> None:
    source = open_source(made(tmp_path, images(*TRAIN) | {"notes/a.txt": "text"}, form))
    list(source.scan())
    assert any("no image" in line for line in source.notices), source.notices


def test_a_deep_folder_in_an_archive_needs_no_deep_stack(tmp_path: Path) -> None:
    deep = "x/" * 1900
    files, wanted = READ["Food-101"]
    path = made(tmp_path, files | images(f"f/images/{deep}1.jpg"), "tar")
    assert found(path) == wanted


def test_a_list_of_a_data_set_that_is_too_large_is_refused_in_a_tar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ci2p_cache.images.tar_listing._MAX_TEXT_BYTES", 10)
    with pytest.raises(SourceError, match=r"train\.txt is larger than"):
        found(made(tmp_path, READ["Food-101"][0], "tar"))
