"""WebDataset tars: the same latents as in zarr, read by us and by stock webdataset."""

from __future__ import annotations

import dataclasses
import gc
import hashlib
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
import zarr

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.cache.containers import npy_header
from ci2p_cache.runs.files import EpochRecord
from ci2p_cache.training.records import TrainObserver
from tests.support.caches import data_digests
from tests.support.commands import REPO, Ran
from tests.support.pictures import write_image_folder
from tests.support.seals import reseal

pytestmark = pytest.mark.usefixtures("nano")


OPTIONS = cc.EncodeOptions(
    encoder="bundled", size=64, shard_samples=4, val_fraction=0.25, max_errors="1"
)
FORMATS = ("zarr", "webdataset", "both")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """21 images of three classes, one of them no image."""
    root = write_image_folder(
        tmp_path_factory.mktemp("tars") / "src", {"ant": 9, "bee": 7, "cat": 5}
    )
    (root / "bee" / "002.jpg").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def caches(source: Path) -> dict[str, Path]:
    """The same images in each format; read only."""
    found = {}
    for name in FORMATS:
        found[name] = source.parent / name
        cc.encode(source, found[name], dataclasses.replace(OPTIONS, format=name))  # type: ignore[arg-type]  # a name of FORMATS
    return found


@pytest.fixture
def tars(caches: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the cache that has tars only."""
    shutil.copytree(caches["webdataset"], tmp_path / "shards")
    return tmp_path / "shards"


def epochs(path: Path, *, count: int = 2, **options: Any) -> list[tuple[Any, ...]]:
    with cc.LatentLoader(cc.open_cache(path)["train"], batch_size=5, seed=3, **options) as loader:
        return [
            (batch.stored, batch.latents, batch.labels, batch.rows)
            for _ in range(count)
            for batch in loader
        ]


def same(one: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> bool:
    return len(one) == len(other) and all(
        torch.equal(a, b)
        for x, y in zip(one, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )


class TestWritten:
    def test_a_tar_holds_a_triple_for_each_valid_row_and_nothing_of_the_machine(
        self, caches: dict[str, Path]
    ) -> None:
        cache = cc.open_cache(caches["webdataset"])
        for name, split in cache.items():
            rows = []
            for shard in range(split.record.num_shards):
                with tarfile.open(cache.path / f"tar/{name}-{shard:06d}.tar") as tar:
                    members = tar.getmembers()
                for member in members:
                    assert (member.uid, member.gid, member.mtime, member.mode) == (0, 0, 0, 0o644)
                    assert (member.uname, member.gname, member.pax_headers) == ("", "", {})
                    assert member.isreg()
                names = [member.name for member in members]
                own = sorted({int(text[:9]) for text in names})
                ends = (".latent.npy", ".cls", ".json")
                assert names == [f"{row:09d}{end}" for row in own for end in ends]
                rows += own
            assert rows == split.valid_rows.tolist()

    def test_formats_share_their_files_and_a_second_run_gives_the_same_bytes(
        self, caches: dict[str, Path], source: Path, tmp_path: Path
    ) -> None:
        zarr_only, tar_only, both = (data_digests(caches[name]) for name in FORMATS)
        ours = {name for name in both if name.startswith("tar/")}
        assert ours == {name for name in tar_only if name.startswith("tar/")}
        assert {"tar/train-000000.tar", "tar/train.json", "tar/val.json"} < ours
        assert not [name for name in zarr_only if name.startswith("tar/")]
        assert not [name for name in tar_only if "/latents/" in name]
        for name in both:
            if name.startswith("tar/"):
                assert both[name] == tar_only[name]
            if name.startswith("latents.zarr/"):
                assert both[name] == zarr_only[name]
        cc.encode(source, tmp_path / "again", dataclasses.replace(OPTIONS, format="both"))
        assert data_digests(tmp_path / "again") == both

    def test_a_shard_that_is_lost_is_written_again_to_the_same_bytes(
        self, tars: Path, source: Path
    ) -> None:
        before = data_digests(tars)
        (tars / "tar/train-000001.tar").unlink()
        summary = cc.encode(source, tars, dataclasses.replace(OPTIONS, format="webdataset"))
        assert summary.encoded_now == 4
        assert data_digests(tars) == before

    def test_the_index_says_where_each_views_values_lie(self, caches: dict[str, Path]) -> None:
        for name in ("webdataset", "both"):
            cache = cc.open_cache(caches[name])
            train = cache["train"]
            for shard in range(train.record.num_shards):
                data = (cache.path / f"tar/train-{shard:06d}.tar").read_bytes()
                table = pq.read_table(cache.path / f"index/train-{shard:06d}.parquet")
                for row in table.to_pylist():
                    assert (row["tar_offset"] is None) == (row["status"] != "ok")
                    for view, start in enumerate(row["tar_offset"] or ()):
                        raw = data[start : start + train.latent.num_bytes]
                        assert google_crc32c.value(raw) == row["latent_crc32c"][view]
                        out = np.empty(train.latent.shape, np.int8)
                        train.read_into(row["row"], view, out)
                        assert raw == out.tobytes()
        index = pq.read_table(caches["zarr"] / "index/train-000000.parquet")
        assert index["tar_offset"].null_count == index.num_rows

    @pytest.mark.parametrize("dtype", ["int8", "int16", "float16", "float32"])
    def test_the_npy_header_is_numpys_own(self, dtype: str) -> None:
        for shape in ((2, 19, 16, 8), (1, 3, 4, 2), (0, 1, 320, 8, 8)):
            values = (np.arange(np.prod(shape)) % 100).astype(dtype).reshape(shape)
            data = npy_header(dtype, shape) + values.tobytes()
            found = np.load(io.BytesIO(data), allow_pickle=False)
            assert found.dtype == dtype
            assert np.array_equal(found, values)
            assert (len(data) - values.nbytes) % 64 == 0

    def test_the_systems_tar_lists_it_without_a_word(self, caches: dict[str, Path]) -> None:
        path = shutil.which("tar")
        if path is None:
            pytest.skip("there is no tar command here")
        file = caches["both"] / "tar/val-000000.tar"
        told = subprocess.run([path, "-tf", file], capture_output=True, text=True, check=True)
        assert told.stderr == ""
        assert told.stdout.splitlines()[0].endswith(".latent.npy")

    def test_zarr_holds_labels_and_valid_and_says_where_the_latents_are(
        self, caches: dict[str, Path]
    ) -> None:
        group: Any = zarr.open(caches["webdataset"] / "latents.zarr", mode="r")
        other: Any = zarr.open(caches["zarr"] / "latents.zarr", mode="r")
        assert sorted(group["train"].array_keys()) == ["labels", "valid"]
        for name in ("labels", "valid"):
            assert np.array_equal(group[f"train/{name}"][:], other[f"train/{name}"][:])
        with pytest.raises(errors.UsageError, match="in tars, not in a zarr array") as refused:
            _ = cc.open_cache(caches["webdataset"])["train"].latents
        assert "ci2p-cache convert" in str(refused.value.hint)

    def test_the_list_of_tars_counts_their_samples(self, caches: dict[str, Path]) -> None:
        root = caches["both"]
        listed = json.loads((root / "tar/train.json").read_text())
        train = cc.open_cache(root)["train"]
        assert sum(each["nsamples"] for each in listed["shardlist"]) == len(train.valid_rows)
        for each in listed["shardlist"]:
            assert (root / "tar" / each["url"]).stat().st_size == each["filesize"]
        assert listed["scale"] == train.scale
        assert np.allclose(listed["offset"], train.offset)

    def test_another_format_is_another_layout(self, tars: Path, source: Path) -> None:
        before = data_digests(tars)
        with pytest.raises(
            errors.FingerprintMismatchError,
            match=r"format: 'webdataset' in the folder, 'zarr' asked for",
        ):
            cc.encode(source, tars, OPTIONS)
        assert data_digests(tars) == before

    @pytest.mark.slow
    def test_the_command_encodes_inspects_and_forecasts_them(
        self, run: Callable[..., Ran], source: Path, tmp_path: Path
    ) -> None:
        words = (
            "encode", source, "--out", tmp_path / "out", "--encoder", "bundled", "--size", "64",
            "--shard-samples", "4", "--val-fraction", "0.25", "--max-errors", "1", "--format",
        )  # fmt: skip
        forecast = json.loads(run(*words, "both", "--dry-run", "--json").out)
        assert run(*words, "both").code == 0
        size = sum(path.stat().st_size for path in (tmp_path / "out").rglob("*") if path.is_file())
        assert abs(forecast["disk_bytes"] - size) < 0.05 * size
        assert "format      both" in run("inspect", tmp_path / "out").out
        tree = json.loads(run("inspect", tmp_path / "out", "--tree", "--json").out)
        shards = {entry["path"]: entry["shards"] for entry in tree}
        assert shards["tar/"] == 6
        assert run("inspect", tmp_path / "out", "--row", "0").code == 0
        assert run("verify", tmp_path / "out").code == 0

    def test_a_disk_that_is_too_small_is_told_before(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told: list[str] = []

        class Told(cc.EncodeObserver):
            def notice(self, text: str) -> None:
                told.append(text)

        need = 21 * 2 * 192 * 16
        usage = shutil._ntuple_diskusage(10**9, 10**9, need)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        for name, warned in (("zarr", False), ("webdataset", True)):
            told.clear()
            options = dataclasses.replace(OPTIONS, format=name, val_fraction=0.0)  # type: ignore[arg-type]  # as above
            cc.encode(source, tmp_path / name, options, observer=Told())
            assert any("will be written" in text for text in told) == warned


class Epochs(TrainObserver):
    """Keeps the losses of a training run."""

    def __init__(self) -> None:
        self.seen: list[tuple[float | None, ...]] = []

    def epoch(self, record: EpochRecord) -> None:
        self.seen.append((record.train_loss, record.val_loss, record.val_top1))


class TestRead:
    @pytest.mark.parametrize("name", ["webdataset", "both"])
    @pytest.mark.parametrize("shuffle", [True, "blocks", False])
    def test_the_same_seed_gives_bitwise_the_same_batches_as_from_zarr(
        self, caches: dict[str, Path], name: str, shuffle: Any
    ) -> None:
        wanted = epochs(caches["zarr"], shuffle=shuffle)
        assert same(epochs(caches[name], shuffle=shuffle), wanted)
        assert same(epochs(caches[name], shuffle=shuffle, threads=3), wanted)

    def test_a_resident_split_is_the_same(self, caches: dict[str, Path]) -> None:
        found = []
        for name in ("zarr", "webdataset"):
            split = cc.open_cache(caches[name])["train"]
            with cc.ResidentLoader(split, batch_size=5, seed=3) as loader:
                found.append([(batch.stored, batch.labels, batch.rows) for batch in loader])
        assert same(*found)

    def test_training_loses_the_same(self, caches: dict[str, Path], tmp_path: Path) -> None:
        losses: list[list[tuple[float | None, ...]]] = []
        for name in ("zarr", "webdataset"):
            told = Epochs()
            spec = cc.TrainSpec(model="vitds_nano", epochs=2, batch_size=8)
            cc.train(
                caches[name], spec=spec, runs_dir=tmp_path, name=name, device="cpu",
                observers=[told],
            )  # fmt: skip
            losses.append(told.seen)
        assert len(losses[0]) == 2
        assert losses[0] == losses[1]

    def test_both_is_read_from_zarr(self, caches: dict[str, Path], tmp_path: Path) -> None:
        shutil.copytree(caches["both"], tmp_path / "both")
        shutil.rmtree(tmp_path / "both/tar")
        assert same(epochs(tmp_path / "both"), epochs(caches["zarr"]))

    def test_few_files_are_open_at_a_time(
        self, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ci2p_cache.cache.shard_reader._max_open", lambda: 1)
        assert same(epochs(caches["webdataset"]), epochs(caches["zarr"]))

    def test_a_tar_replaced_while_it_is_known_is_refused(
        self, tars: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ci2p_cache.cache.shard_reader._max_open", lambda: 1)
        train = cc.open_cache(tars)["train"]
        out = np.empty(train.latent.shape, np.int8)
        rows = [int(rows[0]) for rows in np.split(train.valid_rows, [4, 8])[:2]]
        for row in rows:
            train.read_into(row, 0, out)
        first, second = (tars / f"tar/train-00000{number}.tar" for number in (0, 1))
        second.unlink()
        shutil.copyfile(first, second)
        train.read_into(rows[0], 0, out)
        with pytest.raises(errors.ShardError, match="shard 1"):
            train.read_into(rows[1], 0, out)


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
class TestStock:
    @pytest.fixture(autouse=True)
    def _left_open(self) -> Iterator[None]:
        """Webdataset leaves its files to the garbage collector: it takes them here."""
        yield
        gc.collect()

    def test_the_lines_in_the_docs_read_it(
        self, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        page = (REPO / "docs" / "storage.md").read_text()
        blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        code = next(block for block in blocks if "webdataset" in block)
        shutil.copytree(caches["webdataset"], tmp_path / "shards")
        monkeypatch.chdir(tmp_path)
        names: dict[str, Any] = {}
        exec(code, names)
        train = cc.open_cache("shards")["train"]
        found = list(names["dataset"])
        assert len(found) == len(train.valid_rows)
        for (latents, label), row in zip(found, train.valid_rows, strict=True):
            y, wanted = train[int(row)]
            assert label == wanted
            scaled = latents.astype("float32") * train.scale + train.offset[:, None, None]
            assert torch.equal(torch.from_numpy(scaled), y)

    @pytest.mark.parametrize("name", FORMATS)
    def test_the_lines_in_the_caches_own_readme_run(
        self, caches: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str
    ) -> None:
        monkeypatch.chdir(caches[name])
        text = Path("README.md").read_text()
        assert "@" not in text
        blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
        assert len(blocks) == {"zarr": 2, "webdataset": 2, "both": 3}[name]
        split = cc.open_cache(".")["train"]
        for code in blocks:
            import pandas

            names: dict[str, Any] = {"pandas": pandas}
            exec(code, names)
            if "y" in names:
                assert np.array_equal(names["y"], split[int(split.valid_rows[0])][0].numpy())

    def test_every_split_and_what_the_json_says(self, caches: dict[str, Path]) -> None:
        cache = cc.open_cache(caches["both"])
        for name, split in cache.items():
            urls = [str(path) for path in sorted(cache.path.glob(f"tar/{name}-*.tar"))]
            samples = list(webdataset.WebDataset(urls, shardshuffle=False))
            assert len(samples) == len(split.valid_rows)
            for sample, row in zip(samples, split.valid_rows, strict=True):
                assert sample["__key__"].endswith(f"{row:09d}")
                told = json.loads(sample["json"])
                assert told["row"] == row
                assert told["class"] == cache.classes[told["label"]]
                values = np.load(io.BytesIO(sample["latent.npy"]), allow_pickle=False)
                assert values.shape == split.shape[1:]
                crcs = [google_crc32c.value(view.tobytes()) for view in values]
                assert crcs == told["latent_crc32c"]


def vouch(root: Path) -> None:
    """Makes every record of a cache fit what is there, checksums.sha256 included."""
    reseal(root)
    path = root / "checksums.sha256"
    names = [line.partition("  ")[2] for line in path.read_text().splitlines()]
    digests = [hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names]
    path.write_text(
        "".join(f"{digest}  {name}\n" for digest, name in zip(digests, names, strict=True))
    )
    reseal(root)


def places_of(path: Path, change: Callable[[list[Any]], None], column: str) -> None:
    """Writes an index part with another column, and makes the cache vouch for it."""
    root = path.parent.parent
    table = pq.read_table(path)
    values = table[column].to_pylist()
    change(values)
    number = table.schema.get_field_index(column)
    field = table.schema.field(number)
    table = table.set_column(number, field, pa.array(values, field.type))
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)
    vouch(root)


class TestHostile:
    """An index part that vouches for itself and leads elsewhere."""

    def refused(self, root: Path, match: str) -> None:
        train = cc.open_cache(root)["train"]
        out = np.empty(train.latent.shape, np.int8)
        with pytest.raises(errors.ShardError, match=match):
            train.read_into(int(train.valid_rows[0]), 0, out)
        assert "tar/train-000000.tar" in {finding.path for finding in cc.verify(root)}

    @pytest.mark.parametrize("place", [2**62, 10**6])
    def test_a_place_outside_the_file(self, tars: Path, place: int) -> None:
        def change(values: list[Any]) -> None:
            values[-1][1] = place

        places_of(tars / "index/train-000000.parquet", change, "tar_offset")
        self.refused(tars, "points outside the file")

    def test_a_place_before_it(self, tars: Path) -> None:
        def change(values: list[Any]) -> None:
            values[0][0] = -512

        places_of(tars / "index/train-000000.parquet", change, "tar_offset")
        self.refused(tars, "before the tar's beginning")

    @pytest.mark.parametrize("column", ["tar_offset", "latent_crc32c"])
    def test_too_few_of_them(self, tars: Path, column: str) -> None:
        def change(values: list[Any]) -> None:
            del values[0][0]

        places_of(tars / "index/train-000000.parquet", change, column)
        self.refused(tars, "not one offset and checksum")

    def test_another_latents_place(self, tars: Path) -> None:
        def change(values: list[Any]) -> None:
            values[0], values[1] = values[1], values[0]

        places_of(tars / "index/train-000000.parquet", change, "tar_offset")
        self.refused(tars, "crc32c is wrong|other places")

    def test_a_tar_of_other_members_with_the_same_latents_is_found_by_a_full_verify(
        self, tars: Path
    ) -> None:
        path = tars / "tar/train-000000.tar"
        data = bytearray(path.read_bytes())
        at = data.index(b".cls") + 512 - data.index(b".cls") % 512
        data[at] = ord("7")
        path.write_bytes(data)
        vouch(tars)
        assert same(epochs(tars, count=1), epochs(tars, count=1))
        found = [(finding.path, finding.problem) for finding in cc.verify(tars)]
        assert ("tar/train-000000.tar", "it is not what the index and the latents make") in found
