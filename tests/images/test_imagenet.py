"""ImageNet as it is on disks: the Kaggle tree, a flat val folder, and the development kit."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from ci2p_cache.errors import SourceError
from ci2p_cache.images.folder import FolderSource
from ci2p_cache.images.locate import open_source
from tests.support.pictures import picture

WNIDS = ("n01440764", "n01443537", "n02119789", "n02100735")
# The devkit's ids are not sorted wnids: in the real one, 1 is n02119789, the kit fox.
DEVKIT_ORDER = ("n02119789", "n02100735", "n01440764", "n01443537")
VAL_CLASSES = ("n02100735", "n01440764", "n01440764", "n02119789", "n01443537")


def put(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(1, 24, 18).save(path)


def write_train_and_val(data: Path) -> None:
    for wnid in WNIDS:
        put(data / "train" / wnid / f"{wnid}_10026.JPEG")
    for number in range(1, len(VAL_CLASSES) + 1):
        put(data / "val" / f"ILSVRC2012_val_{number:08d}.JPEG")


def write_solution(folder: Path) -> None:
    rows = [
        f"ILSVRC2012_val_{number:08d},{wnid} 111 108 441 193 {wnid} 1 2 3 4 "
        for number, wnid in enumerate(VAL_CLASSES, start=1)
    ]
    # Kaggle's rows are in no order.
    lines = ["ImageId,PredictionString", *rows[::-1]]
    (folder / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")


def write_devkit(folder: Path, classes: tuple[str, ...] = VAL_CLASSES) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [str(DEVKIT_ORDER.index(wnid) + 1) for wnid in classes]
    (folder / "ILSVRC2012_validation_ground_truth.txt").write_text("\n".join(lines) + "\n")
    # As in the real file, inner nodes of the hierarchy follow the classes, with ids above 1,000.
    rows = [(i + 1, wnid, f"words of {wnid}") for i, wnid in enumerate(DEVKIT_ORDER)]
    rows.append((1001, "n00001740", "entity"))
    kind = np.dtype([("ILSVRC2012_ID", object), ("WNID", object), ("words", object)])
    synsets = np.array(rows, dtype=kind).reshape(-1, 1)
    savemat(folder / "meta.mat", {"synsets": synsets})


def val_classes(source: FolderSource) -> tuple[str, ...]:
    refs = [ref for ref in source.scan() if ref.split == "val"]
    assert [ref.key for ref in refs] == [
        f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, len(VAL_CLASSES) + 1)
    ]
    assert all(source.read(ref.path)[:2] == b"\xff\xd8" for ref in refs)
    return tuple(source.classes[ref.label] for ref in refs)


def opened(path: Path) -> FolderSource:
    source = open_source(path)
    assert isinstance(source, FolderSource)
    return source


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    """The tree of the Kaggle competition, complete with names."""
    root = tmp_path / "imagenet"
    write_train_and_val(root / "ILSVRC" / "Data" / "CLS-LOC")
    put(root / "ILSVRC" / "Data" / "CLS-LOC" / "test" / "ILSVRC2012_test_00000001.JPEG")
    write_solution(root)
    (root / "LOC_synset_mapping.txt").write_text(
        "n01440764 tench, Tinca tinca\nn01443537 goldfish, Carassius auratus\n"
        "n02100735 English setter\nn02119789 kit fox, Vulpes macrotis\n"
    )
    (root / "ILSVRC" / "ImageSets").mkdir()
    return root


@pytest.mark.parametrize("start", ["", "ILSVRC", "ILSVRC/Data", "ILSVRC/Data/CLS-LOC"])
def test_the_kaggle_tree_is_found_from_any_of_its_folders(kaggle: Path, start: str) -> None:
    source = opened(kaggle / start)
    assert source.classes == tuple(sorted(WNIDS))
    assert source.class_titles == (
        "tench, Tinca tinca",
        "goldfish, Carassius auratus",
        "English setter",
        "kit fox, Vulpes macrotis",
    )
    assert val_classes(source) == VAL_CLASSES
    train = [(ref.key, source.classes[ref.label]) for ref in source.scan() if ref.split == "train"]
    assert train == [(f"{wnid}/{wnid}_10026.JPEG", wnid) for wnid in sorted(WNIDS)]
    assert {ref.split for ref in source.scan()} == {"train", "val"}
    notices = "\n".join(source.notices)
    assert "val come from " in notices
    assert "LOC_val_solution.csv" in notices
    assert "test holds 1 images without labels; skipped" in notices
    if start != "ILSVRC/Data/CLS-LOC":
        assert source.layout == "ImageNet"


def test_a_flat_val_beside_train_is_labelled_by_the_solution(tmp_path: Path) -> None:
    write_train_and_val(tmp_path)
    write_solution(tmp_path)
    assert val_classes(opened(tmp_path)) == VAL_CLASSES


@pytest.mark.parametrize(
    "place", [".", "data", "ILSVRC2012_devkit_t12", "ILSVRC2012_devkit_t12/data"]
)
def test_the_devkits_ids_go_through_its_own_table(tmp_path: Path, place: str) -> None:
    root = tmp_path / "CLS-LOC"
    write_train_and_val(root)
    # Beside the data, as another folder in SRC would not be a split.
    write_devkit(tmp_path / place)
    source = opened(root)
    assert val_classes(source) == VAL_CLASSES
    assert any("ILSVRC2012_validation_ground_truth.txt" in line for line in source.notices)


def test_the_devkit_beside_train_and_val_is_no_class(tmp_path: Path) -> None:
    write_train_and_val(tmp_path)
    write_devkit(tmp_path / "ILSVRC2012_devkit_t12" / "data")
    source = opened(tmp_path)
    assert source.classes == tuple(sorted(WNIDS))
    assert val_classes(source) == VAL_CLASSES


def test_the_solution_is_preferred_because_it_names_images(tmp_path: Path) -> None:
    write_train_and_val(tmp_path)
    write_solution(tmp_path)
    write_devkit(tmp_path / "ILSVRC2012_devkit_t12", VAL_CLASSES[:2])
    assert val_classes(opened(tmp_path)) == VAL_CLASSES


def test_a_flat_val_without_labels_says_which_files_would_help(tmp_path: Path) -> None:
    write_train_and_val(tmp_path)
    with pytest.raises(SourceError, match="holds 5 images, no class folders") as caught:
        open_source(tmp_path)
    for name in ("LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt"):
        assert name in str(caught.value)
    assert caught.value.hint is not None
    assert "ILSVRC2012_devkit_t12" in caught.value.hint


def test_a_ground_truth_of_another_length_is_refused(tmp_path: Path) -> None:
    write_train_and_val(tmp_path)
    write_devkit(tmp_path / "ILSVRC2012_devkit_t12" / "data", VAL_CLASSES[:4])
    with pytest.raises(SourceError, match="has 4 labels, but there are 5 images"):
        open_source(tmp_path)


@pytest.mark.parametrize("line", ["5", "0", "-1", "1001", "1.5", "n01440764", "\u0663"])
def test_a_ground_truth_id_without_a_class_is_refused(tmp_path: Path, line: str) -> None:
    write_train_and_val(tmp_path)
    data = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    write_devkit(data)
    truth = data / "ILSVRC2012_validation_ground_truth.txt"
    truth.write_text(f"1\n{line}\n2\n3\n4\n", "utf-8")
    with pytest.raises(SourceError, match=r"val_00000002\.JPEG with '.*'; wanted one of the 4 ids"):
        open_source(tmp_path)


def test_a_ground_truth_without_its_table_is_refused(tmp_path: Path) -> None:
    write_train_and_val(tmp_path)
    data = tmp_path / "ILSVRC2012_devkit_t12" / "data"
    write_devkit(data)
    (data / "meta.mat").write_bytes(b"no table at all")
    with pytest.raises(SourceError, match=r"meta\.mat is not the development kit's table"):
        open_source(tmp_path)
    (data / "meta.mat").unlink()
    with pytest.raises(SourceError, match=r"own order, which only meta\.mat beside it explains"):
        open_source(tmp_path)


def test_a_val_image_without_a_row_is_refused(tmp_path: Path) -> None:
    write_train_and_val(tmp_path)
    write_solution(tmp_path)
    put(tmp_path / "val" / "ILSVRC2012_val_00000077.JPEG")
    with pytest.raises(
        SourceError, match=r"no row for the image ILSVRC2012_val_00000077\.JPEG; it has 5 rows"
    ):
        open_source(tmp_path)


def test_part_of_val_is_enough_where_the_solution_names_images(tmp_path: Path) -> None:
    write_train_and_val(tmp_path)
    write_solution(tmp_path)
    (tmp_path / "val" / "ILSVRC2012_val_00000001.JPEG").unlink()
    source = opened(tmp_path)
    refs = [ref for ref in source.scan() if ref.split == "val"]
    assert [source.classes[ref.label] for ref in refs] == list(VAL_CLASSES[1:])


def test_a_damaged_solution_is_refused(tmp_path: Path) -> None:
    write_train_and_val(tmp_path)
    (tmp_path / "LOC_val_solution.csv").write_bytes(b"\xff\xfe,\n")
    with pytest.raises(SourceError, match=r"LOC_val_solution\.csv cannot be read"):
        open_source(tmp_path)
    os.truncate(tmp_path / "LOC_val_solution.csv", 2**30)
    with pytest.raises(SourceError, match="is larger than 67108864 bytes"):
        open_source(tmp_path)


def test_val_in_class_folders_needs_no_labels(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for wnid in WNIDS:
            put(tmp_path / "ILSVRC" / "Data" / "CLS-LOC" / split / wnid / f"{split}.JPEG")
    source = opened(tmp_path)
    assert {ref.key for ref in source.scan()} == {
        f"{wnid}/{split}.JPEG" for wnid in WNIDS for split in ("train", "val")
    }
