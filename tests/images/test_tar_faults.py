"""Faults in tars: bits that flip, files that are cut, gone or swapped, calls that fail."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ci2p_cache as cc
from ci2p_cache import errors
from tests.long.bitflips import run as run_bitflips
from tests.support.caches import data_digests
from tests.support.commands import Ran
from tests.support.encode_bench import KINDS, EncodeBench, spread
from tests.support.pictures import write_image_folder
from tests.support.tiers import thinned
from tests.support.warm import WarmParent

TAR = "tar/train-000001.tar"
OPTIONS = cc.EncodeOptions(
    encoder="bundled", size=32, shard_samples=4, val_fraction=0.25, devices="cpu:1"
)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """13 images as tars, and as both; read only."""
    root = tmp_path_factory.mktemp("tar-faults")
    source = write_image_folder(root / "src", {"ant": 7, "bee": 6})
    cc.encode(source, root / "webdataset", dataclasses.replace(OPTIONS, format="webdataset"))
    cc.encode(source, root / "both", dataclasses.replace(OPTIONS, format="both"))
    return {name: root / name for name in ("webdataset", "both")}


@pytest.fixture
def tars(caches: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(caches["webdataset"], tmp_path / "shards")
    return tmp_path / "shards"


def latent_bit(root: Path) -> None:
    """Flips a bit of the last latent of a tar's last sample but one."""
    data = bytearray((root / TAR).read_bytes())
    starts = [match.start() for match in re.finditer(rb"\x93NUMPY", bytes(data))]
    data[starts[1] + 200] ^= 1
    (root / TAR).write_bytes(data)


def header_bit(root: Path) -> None:
    data = bytearray((root / TAR).read_bytes())
    data[3] ^= 1
    (root / TAR).write_bytes(data)


def swap(root: Path) -> None:
    other = root / "tar/train-000000.tar"
    mine, theirs = (root / TAR).read_bytes(), other.read_bytes()
    (root / TAR).write_bytes(theirs)
    other.write_bytes(mine)


def link(root: Path) -> None:
    shutil.move(root / TAR, root.parent / "elsewhere.tar")
    (root / TAR).symlink_to(root.parent / "elsewhere.tar")


def folder(root: Path) -> None:
    (root / TAR).unlink()
    (root / TAR).mkdir()


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "latent bit": latent_bit,
    "cut": lambda root: (root / TAR).write_bytes((root / TAR).read_bytes()[:9000]),
    "cut at the end": lambda root: (root / TAR).write_bytes((root / TAR).read_bytes()[:-512]),
    "longer": lambda root: (root / TAR).write_bytes((root / TAR).read_bytes() + bytes(512)),
    "empty": lambda root: (root / TAR).write_bytes(b""),
    "gone": lambda root: (root / TAR).unlink(),
    "folder": folder,
    "link": link,
    "swapped": swap,
}


@pytest.mark.parametrize("damage", thinned(DAMAGE, step=6))
def test_a_damaged_tar_is_named_by_verify_raised_by_reading_and_repaired_to_the_same_bytes(
    caches: dict[str, Path], tars: Path, run: Callable[..., Ran], damage: str
) -> None:
    DAMAGE[damage](tars)
    with pytest.raises(errors.ShardError, match=r"shard [01] \(rows \d+ to \d+\)") as raised:
        with cc.LatentLoader(cc.open_cache(tars)["train"], batch_size=4, views=0) as loader:
            list(loader)
    if damage == "latent bit":
        assert "crc32c is wrong" in str(raised.value)
    assert f"verify {tars} --repair" in str(raised.value.hint)
    named = {finding.path: finding for finding in cc.verify(tars)}
    assert TAR in named
    assert (named[TAR].split, named[TAR].shard) == ("train", 1)
    if damage != "latent bit":
        assert TAR in {finding.path for finding in cc.verify(tars, quick=True)}
    ran = run("verify", tars, "--repair")
    assert ran.code == 0, ran.err
    assert data_digests(tars) == data_digests(caches["webdataset"])


def test_a_flipped_bit_in_a_header_is_found_by_verify_and_touches_no_read(tars: Path) -> None:
    header_bit(tars)
    assert TAR in {finding.path for finding in cc.verify(tars)}
    train = cc.open_cache(tars)["train"]
    out = np.empty(train.latent.shape, np.int8)
    for row in train.valid_rows:
        train.read_into(int(row), 1, out)


def test_every_read_is_checked_not_only_the_first(tars: Path) -> None:
    train = cc.open_cache(tars)["train"]
    out = np.empty(train.latent.shape, np.int8)
    row = int(train.valid_rows[5])
    train.read_into(row, 1, out)
    with (tars / TAR).open("r+b") as file:
        data = bytearray(file.read())
        at = data.index(out.tobytes())
        file.seek(at + 100)
        file.write(bytes([data[at + 100] ^ 8]))
    with pytest.raises(errors.ShardError, match="crc32c is wrong"):
        train.read_into(row, 1, out)


def test_of_both_a_damaged_tar_is_named_and_reading_goes_by_zarr(
    caches: dict[str, Path], tmp_path: Path, run: Callable[..., Ran]
) -> None:
    root = tmp_path / "both"
    shutil.copytree(caches["both"], root)
    latent_bit(root)
    with cc.LatentLoader(cc.open_cache(root)["train"], batch_size=4) as loader:
        assert len(list(loader)) == len(loader)
    assert {finding.path for finding in cc.verify(root)} == {TAR}
    assert run("verify", root, "--repair").code == 0
    assert data_digests(root) == data_digests(caches["both"])


def test_tars_that_no_record_lists_are_foreign(caches: dict[str, Path], tmp_path: Path) -> None:
    root = tmp_path / "both"
    shutil.copytree(caches["both"], root)
    names = {"tar/train-000099.tar", "tar/notes.txt", "tar/test.json"}
    for name in names:
        (root / name).write_bytes(b"x")
    found = {(finding.path, finding.kind) for finding in cc.verify(root, quick=True)}
    assert found == {(name, "foreign") for name in names}


def test_files_of_the_other_format_are_foreign(tars: Path) -> None:
    stray = tars / "latents.zarr/train/latents/c.0.0.0.0.0"
    stray.parent.mkdir()
    stray.write_bytes(b"x")
    found = [(finding.path, finding.kind) for finding in cc.verify(tars)]
    assert found == [("latents.zarr/train/latents/c.0.0.0.0.0", "foreign")]


def test_encoding_again_compares_with_what_the_tars_hold(tars: Path) -> None:
    summary = cc.reencode(tars, 6, seed=1)
    assert (summary.compared, summary.differing_values, summary.findings) == (6, 0, ())


@pytest.mark.slow
def test_every_fault_in_every_file_is_named_and_none_is_read_silently(tars: Path) -> None:
    # `both` takes as long again: tests/long/bitflips.py --format both.
    counts = run_bitflips(tars, trials=25, seed=5)
    assert counts.all_found, (str(counts), counts.missed)
    assert counts.faults > 100


@pytest.fixture(scope="module")
def bench(
    warm: WarmParent, tmp_path_factory: pytest.TempPathFactory
) -> tuple[EncodeBench, WarmParent]:
    made = EncodeBench(tmp_path_factory.mktemp("tar-calls"), format="both")
    if not warm.has_shim:
        pytest.skip("the shim needs Linux and a C compiler called cc")
    made.undisturbed(warm)
    return made, warm


@pytest.mark.parametrize(
    "kind", ["EIO", *(pytest.param(k, marks=pytest.mark.slow) for k in KINDS if k != "EIO")]
)
def test_a_call_on_a_tar_that_fails_is_survived_to_the_same_bytes(
    bench: tuple[EncodeBench, WarmParent], kind: str
) -> None:
    made, warm = bench
    calls = re.findall(r"^ci2p-fault \d+ \w+ (.*)$", made.told, re.MULTILINE)
    own = [at for at, path in enumerate(calls, 1) if "/tar" in path or "tar__" in path]
    assert {name for name in made.whole if name.startswith("tar/")} == {
        "tar/train-000000.tar", "tar/train-000001.tar", "tar/train.json",
    }  # fmt: skip
    points = [own[at - 1] for at in spread(len(own), 3)]
    problems = [(at, text) for at in points for text in made.fault(warm, at, kind)]
    assert not problems
