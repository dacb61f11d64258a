"""What a cache folder is bound to, field by field, and what it is not (bar R5)."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import ci2p_cache as cc
from ci2p_cache import errors
from tests.support.pictures import write_image_folder
from tests.support.seals import reseal, write_json
from tests.support.tiers import thinned

OPTIONS = cc.EncodeOptions(
    encoder="bundled",
    size=32,
    views="crops:2",
    shard_samples=4,
    val_fraction=0.25,
    split="stratified",
    augment="trivial",
)

BOUND: dict[str, Any] = {
    "fingerprint.format_version": 2,
    "fingerprint.image.size": 96,
    "fingerprint.image.resize_side": 80,
    "fingerprint.image.interpolation": "bicubic",
    "fingerprint.image.exif": "apply",
    "fingerprint.image.max_pixels": 10_000,
    "fingerprint.image.decoder": "torchvision 0.1 + pillow 1.0",
    "fingerprint.views.kind": "flip",
    "fingerprint.views.num_crops": 3,
    "fingerprint.views.seed": 7,
    "fingerprint.views.augment.min_area": 0.2,
    "fingerprint.views.augment.rand_augment": 1,
    "fingerprint.views.augment.magnitude": 10,
    "fingerprint.views.augment.trivial_augment": False,
    "fingerprint.views.augment.grey": 0.5,
    "fingerprint.views.augment.blur": 0.5,
    "fingerprint.views.augment.solarize": 0.5,
    "fingerprint.views.augment.erasing": 0.5,
    "fingerprint.encoder.arch": "mbt2018",
    "fingerprint.encoder.quality": 6,
    "fingerprint.encoder.metric": "ms-ssim",
    "fingerprint.encoder.weights_sha256": "0" * 64,
    "fingerprint.encoder.precision": "bf16",
    "fingerprint.latent.dtype": "int16",
    "fingerprint.latent.step": 0.5,
    "fingerprint.latent.channels": 320,
    "fingerprint.latent.height": 6,
    "fingerprint.latent.width": 6,
    "layout.val_fraction": 0.5,
    "layout.split": "hashed",
    "layout.seed": 1,
    "layout.shard_samples": 5,
    "layout.limit": 9,
    "layout.format": "webdataset",
    "layout.codec": "none",
    "layout.level": 3,
    "layout.fold": True,
}
"""Every field that binds a folder, and another value for it."""

FREE: dict[str, Any] = {
    "batch_size": 3,
    "workers": 3,
    "devices": "cpu:2",
    "max_errors": "50%",
    "retry_failed": True,
    "rescan": True,
    "reencode_changed": True,
    "add_views": True,
    "plan_only": True,
    "shard_range": "2/3",
    "finalise": True,
    "executor": "processes",
}
"""Every option that does not."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("binding")
    source = write_image_folder(root / "src", {"ant": 7, "bee": 6})
    cc.encode(source, root / "out", OPTIONS)
    return source, root / "out"


def leaves(data: Mapping[str, Any], name: str) -> Iterator[str]:
    for key, value in data.items():
        dotted = f"{name}.{key}"
        yield from leaves(value, dotted) if isinstance(value, dict) else (dotted,)


def digests(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_no_field_is_forgotten_here(folders: tuple[Path, Path]) -> None:
    manifest = json.loads((folders[1] / "cache.json").read_text())
    bound = [name for part in ("fingerprint", "layout") for name in leaves(manifest[part], part)]
    assert bound == list(BOUND)
    # Options that are no field of the folder are free, or name what becomes a field.
    fields = {name.rpartition(".")[2] for name in bound}
    others = {field.name for field in dataclasses.fields(OPTIONS)} - fields
    # Those of the source are refused where the source has no use for them; `labels` is bound by the
    # classes, see tests/images/test_layout_commands.py.
    of_source = {"root", "image_column", "label_column", "labels"}
    assert others == {*FREE, *of_source, "encoder", "weights", "views", "augment"}


# A smaller limit is refused, a larger one takes in more: test_growth.py.
@pytest.mark.parametrize("name", thinned(name for name in BOUND if name != "layout.limit"))
def test_a_folder_made_with_another_value_is_refused_and_nothing_changes(
    folders: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    source, whole = folders
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    manifest = json.loads((out / "cache.json").read_text())
    *parts, last = name.split(".")
    record = manifest
    for part in parts:
        record = record[part]
    record[last] = BOUND[name]
    write_json(out / "cache.json", manifest)
    reseal(out)
    before = digests(out)
    with pytest.raises((errors.FingerprintMismatchError, errors.ManifestError)) as refused:
        cc.encode(source, out, OPTIONS)
    # Values that no folder can hold together are refused before they are compared.
    damaged = isinstance(refused.value, errors.ManifestError)
    assert ("cache.json is damaged" if damaged else f"{last}: ") in str(refused.value)
    assert digests(out) == before


@pytest.mark.parametrize("name", FREE)
def test_another_way_to_run_is_accepted_and_changes_no_file(
    folders: tuple[Path, Path], name: str
) -> None:
    source, whole = folders
    before = digests(whole)
    changes = {name: FREE[name]} | ({"rescan": True} if name == "reencode_changed" else {})
    summary = cc.encode(source, whole, dataclasses.replace(OPTIONS, **changes))
    assert summary.encoded_now == 0
    assert digests(whole) == before


def test_the_folder_and_its_source_may_be_moved(folders: tuple[Path, Path], tmp_path: Path) -> None:
    source, whole = folders
    shutil.copytree(source, tmp_path / "elsewhere")
    shutil.copytree(whole, tmp_path / "copy")
    assert cc.encode(tmp_path / "elsewhere", tmp_path / "copy", OPTIONS).encoded_now == 0


def test_the_options_that_bind_are_read_back_from_a_cache(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    source, _ = folders
    odd = cc.EncodeOptions(
        encoder="bundled", size=32, resize_side=80, interpolation="bicubic", exif="apply",
        max_pixels=10_000_000, views="crops:2", augment='{"grey": 0.25}', dtype="int16", step=0.5,
        format="both", codec="none",
        level=3, shard_samples=5, val_fraction=0.5, split="hashed", seed=4, limit=7,
    )  # fmt: skip
    cc.encode(source, tmp_path / "out", odd)
    read = cc.EncodeOptions.of(cc.open_cache(tmp_path / "out").manifest)
    # Whence the encoder came is not recorded.
    assert dataclasses.replace(read, encoder="bundled") == odd
