"""The branches of the cache's own rooms that no story of its own leads to."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.cache import shard_reader
from ci2p_cache.cache.codecs import CODECS, FRAMES
from ci2p_cache.cache.commit import FileRecord, read_commit
from ci2p_cache.cache.containers import index_crc32c, open_zarr, pack_shard
from ci2p_cache.cache.index import ChannelSums, read_index, read_sums
from ci2p_cache.cache.lock import locked
from ci2p_cache.cache.manifest import read_manifest, refuse_difference
from ci2p_cache.cache.shard_reader import ShardReader
from ci2p_cache.cache.staging import StagingArea
from ci2p_cache.parquet import parquet_bytes, read_parquet
from ci2p_cache.record import read_sealed
from tests.support.caches import flip, with_options
from tests.support.pictures import write_image_folder
from tests.support.seals import reseal, write_json

SHARD = "latents.zarr/train/latents/c.0.0.0.0.0"
INDEX = "index/train-000000.parquet"
COMMIT = "commits/train-000000.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corners")
    write_image_folder(root / "src", {"ant": 6, "bee": 5})
    cc.encode(root / "src", root / "shards", with_options())
    return root / "shards"


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "shards")
    return tmp_path / "shards"


def reseal_all(root: Path) -> None:
    """Makes all digests fit; the checksums, which would still tell, are lost."""
    (root / "checksums.sha256").unlink()
    reseal(root)


def edit_index(root: Path, column: str, change: Callable[[list[Any]], list[Any]]) -> None:
    table = pq.read_table(root / INDEX)
    number = table.column_names.index(column)
    values = pa.array(change(table[column].to_pylist()), table.schema.field(number).type)
    table = table.set_column(number, table.schema.field(number), values)
    (root / INDEX).write_bytes(parquet_bytes(table))
    reseal_all(root)


class TestCommit:
    @pytest.mark.parametrize("path", ["/x", "../x", "a/../x", "a\\x", "", "a//x", "./x"])
    def test_a_path_that_leads_out_is_no_file_of_a_cache(self, path: str) -> None:
        with pytest.raises(errors.UsageError, match="would leave the cache folder"):
            FileRecord(path=path, bytes=0, sha256="")

    @pytest.mark.parametrize(
        ("content", "match"),
        [("[]", "wanted an object"), ("{", "not JSON"), ("{}", "does not fit"),
         ('{"sha256": 7}', "does not fit"), ('{"sha256": "\\u00e9"}', "does not fit")],
    )  # fmt: skip
    def test_a_record_of_another_form_is_damaged(
        self, cache: Path, content: str, match: str
    ) -> None:
        (cache / COMMIT).write_text(content)
        with pytest.raises(errors.ManifestError, match=match):
            read_commit(cache, "train", 0)

    def test_an_intact_record_of_another_shard_or_with_other_fields_is_damaged(
        self, cache: Path
    ) -> None:
        shutil.copy(cache / "commits/train-000001.json", cache / COMMIT)
        with pytest.raises(errors.ManifestError, match="speaks of train shard 1"):
            read_commit(cache, "train", 0)
        write_json(cache / COMMIT, read_sealed(cache / COMMIT)[0] | {"more": 1, "sha256": ""})
        with pytest.raises(errors.ManifestError, match="unknown fields"):
            read_commit(cache, "train", 0)

    def test_a_record_in_a_place_that_is_no_folder_cannot_be_read(self, cache: Path) -> None:
        shutil.rmtree(cache / "commits")
        (cache / "commits").write_text("")
        with pytest.raises(errors.ManifestError, match="cannot be read"):
            read_commit(cache, "train", 0)

    @pytest.mark.parametrize(
        ("number", "kind"),
        [(errno.ENOSPC, errors.DiskFullError), (errno.EIO, errors.ResourceError)],
    )
    def test_a_failed_write_leaves_nothing_and_says_what_gets_on(
        self, tmp_path: Path, number: int, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: int) -> None:
            raise OSError(number, os.strerror(number))

        with StagingArea(tmp_path) as staging:
            monkeypatch.setattr("os.fsync", fail)
            with pytest.raises(kind, match="What was committed before is safe"):
                staging.put_json("index/a", {})
            assert not (tmp_path / "index").exists()
        assert list(tmp_path.iterdir()) == []

    def test_staging_that_cannot_be_made_is_a_resource_error_and_others_keep_theirs(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with StagingArea(tmp_path, name="one"):
            with StagingArea(tmp_path, name="two") as staging:
                assert staging.put_json("a", {"b": 1}).bytes == (tmp_path / "a").stat().st_size
                assert list(staging.scratch("x").iterdir()) == []
            assert len(list(tmp_path.glob(".staging/one-*"))) == 1
            (tmp_path / ".staging" / "three").mkdir()
            monkeypatch.setattr(
                "ci2p_cache.cache.staging.remove_path",
                lambda path: (_ for _ in ()).throw(OSError(errno.EACCES, "no")),
            )
            with pytest.raises(errors.ResourceError, match="no"):
                StagingArea(tmp_path, name="three").__enter__()


class TestLock:
    def test_it_names_its_holder_and_waits_for_nobody(self, tmp_path: Path) -> None:
        path = tmp_path / ".lock"
        with locked(path, what="encode"):
            with pytest.raises(errors.LockedError, match=f"encode on host .*{os.getpid()}"):
                locked(path, what="repair").__enter__()
            path.write_text("no JSON")
            with pytest.raises(errors.LockedError, match="an unnamed process"):
                locked(path, what="repair").__enter__()
        assert not path.exists()

    def test_a_lock_that_was_removed_meanwhile_is_taken_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        import fcntl

        path, honest, calls = tmp_path / ".lock", fcntl.flock, [0]

        def flock(descriptor: int, how: int) -> None:
            honest(descriptor, how)
            calls[0] += 1
            if calls[0] == 1:
                path.unlink()
            elif calls[0] == 2:
                path.unlink()
                path.write_text("another's")
                os.utime(path, (0, 0))

        monkeypatch.setattr("fcntl.flock", flock)
        with locked(path, what="encode"):
            assert json.loads(path.read_text())["pid"] == os.getpid()
        assert calls[0] == 4

    def test_without_flock_the_age_of_the_file_decides(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def flock(descriptor: int, how: int) -> None:
            raise OSError(errno.ENOLCK, "no locks here")

        monkeypatch.setattr("fcntl.flock", flock)
        path = tmp_path / ".lock"
        with locked(path, what="encode"):
            with pytest.raises(errors.LockedError, match=f"encode on host .*{os.getpid()}"):
                locked(path, what="repair").__enter__()
            os.utime(path, (0, 0))
            with locked(path, what="repair"):
                assert json.loads(path.read_text())["what"] == "repair"
                third = json.loads(path.read_text()) | {"pid": 4711}
            path.write_text(json.dumps(third))
        assert json.loads(path.read_text()) == third

    def test_another_failure_to_lock_is_a_resource_error(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def flock(descriptor: int, how: int) -> None:
            raise OSError(errno.EIO, "no locks here")

        monkeypatch.setattr("fcntl.flock", flock)
        with pytest.raises(errors.ResourceError, match="no locks here"):
            locked(tmp_path / ".lock", what="encode").__enter__()


class TestManifest:
    def test_each_difference_is_listed(self, whole: Path) -> None:
        manifest = read_manifest(whole)
        made, layout = manifest.fingerprint, manifest.layout
        refuse_difference(whole, manifest, made, layout)
        with pytest.raises(errors.FingerprintMismatchError) as caught:
            other = dataclasses.replace(made, image=dataclasses.replace(made.image, exif="apply"))
            refuse_difference(whole, manifest, other, dataclasses.replace(layout, seed=9))
        assert "image.exif: 'ignore' in the folder, 'apply' asked for" in str(caught.value)
        assert "seed: 0 in the folder, 9 asked for" in str(caught.value)

    def test_another_version_names_what_wrote_it(self, cache: Path) -> None:
        data = json.loads((cache / "cache.json").read_text())
        write_json(cache / "cache.json", data | {"format_version": 9, "software": "later"})
        with pytest.raises(errors.ManifestError, match="format version 9") as caught:
            read_manifest(cache)
        assert "later" in str(caught.value.hint)

    def test_one_that_cannot_be_read_is_an_error_of_its_own(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: object) -> int:
            raise OSError(errno.EIO, "the disk is ill")

        monkeypatch.setattr("ci2p_cache.record.os.open", fail)
        with pytest.raises(errors.ManifestError, match="the disk is ill"):
            read_manifest(cache)


class TestVerify:
    @pytest.mark.parametrize(
        ("column", "change", "problem"),
        [
            ("row", lambda v: v[::-1], "does not list its rows one after another"),
            ("status", lambda v: ["invalid", *v[1:]], "not those of the rows that the index calls"),
            ("latent_crc32c", lambda v: [[1] * len(v[0]), *v[1:]], "row 0 view 1 is not the"),
            ("latent_crc32c", lambda v: [v[0][:1], *v[1:]], "row 0 has not one checksum per view"),
            ("latent_crc32c", lambda v: [None, *v[1:]], "row 0 has not one checksum per view"),
        ],
    )
    def test_an_index_whose_digest_fits_is_held_against_the_chunks(
        self, cache: Path, column: str, change: Any, problem: str
    ) -> None:
        edit_index(cache, column, change)
        found = [f.problem for f in cc.verify(cache) if f.path == SHARD]
        assert any(problem in text for text in found), found

    def test_an_index_of_no_form_whose_digest_fits_is_named_with_its_shard(
        self, cache: Path
    ) -> None:
        (cache / INDEX).write_bytes(b"PAR1")
        reseal_all(cache)
        assert any("index of train shard 0" in f.problem for f in cc.verify(cache))

    def test_a_chunk_whose_digest_fits_is_still_decoded(self, cache: Path) -> None:
        flip(cache / SHARD, 0.1)
        reseal_all(cache)
        assert any("is damaged" in f.problem for f in cc.verify(cache) if f.path == SHARD)

    @pytest.mark.parametrize(
        ("change", "problem"),
        [
            ({"rows": 3}, "it speaks of 3 rows from 0"),
            ({"fingerprint": "0" * 64}, "another fingerprint"),
            ({"files": []}, "it lists other files"),
        ],
    )
    def test_a_record_that_does_not_belong_here_is_damaged(
        self, cache: Path, change: dict[str, Any], problem: str
    ) -> None:
        write_json(cache / COMMIT, json.loads((cache / COMMIT).read_text()) | change)
        (finding,) = (f for f in cc.verify(cache, quick=True) if f.path == COMMIT)
        assert problem in finding.problem
        (damaged,) = cc.status(cache).damaged
        assert problem in damaged

    @pytest.mark.parametrize("lost", [SHARD, INDEX])
    def test_files_without_record_and_without_checksums_are_missing_or_left(
        self, cache: Path, lost: str
    ) -> None:
        for name in (COMMIT, "checksums.sha256", lost):
            (cache / name).unlink()
        found = {f.path for f in cc.verify(cache, quick=True)}
        assert found == {COMMIT, "checksums.sha256", lost}

    def test_a_file_that_cannot_be_read_is_damaged(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(_: Path) -> str:
            raise OSError(errno.EIO, "the disk is ill")

        monkeypatch.setattr("ci2p_cache.cache.commit.sha256_file", fail)
        assert all("the disk is ill" in f.problem for f in cc.verify(cache, quick=True))

    def test_a_quick_verify_leaves_large_files_unread(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ci2p_cache.cache.verify._SMALL_BYTES", 0)
        flip(cache / SHARD, 0.1)
        assert cc.verify(cache, quick=True) == []


class TestIndex:
    def test_sums_over_nothing_and_sums_that_are_damaged(self, whole: Path) -> None:
        nothing = ChannelSums.of(np.zeros((0, 3, 2, 2)), np.zeros(3))
        assert (nothing.count, nothing.low.tolist()) == (0, [np.inf] * 3)
        table = read_index(whole, "train", 0)
        assert read_sums(table).count > 0
        for text in (b"[]", b"{", b'{"count": 1, "surprise": 2}', b"[" * 10**5):
            with pytest.raises(errors.ShardError, match="channel sums"):
                read_sums(table.replace_schema_metadata({b"ci2p_channel_sums": text}))

    def test_a_parquet_file_is_read_whole_or_in_part_but_not_through_a_link(
        self, whole: Path, tmp_path: Path
    ) -> None:
        path = whole / INDEX
        assert read_parquet(path).num_columns == len(pq.read_schema(path).names)
        assert read_parquet(path, ["row"]).column_names == ["row"]
        (tmp_path / "link").symlink_to(path)
        with pytest.raises(OSError, match="is a link"):
            read_parquet(tmp_path / "link")
        with pytest.raises(OSError, match="another schema"):
            read_parquet(path, schemas=[pa.schema([("row", pa.int64())])])

    def test_a_text_that_many_rows_repeat_is_not_unpacked(self, tmp_path: Path) -> None:
        table = pa.table({"key": ["k" * 2**20] * 64, "number": [1] * 64})
        pq.write_table(table, tmp_path / "x", compression="zstd", dictionary_pagesize_limit=2**24)
        with pytest.raises(OSError, match="key would unpack to 67108864 bytes"):
            read_parquet(tmp_path / "x")


def shard_of(index: np.ndarray, body: bytes) -> bytes:
    data = index.astype("<u8").tobytes()
    return body + data + struct.pack("<I", google_crc32c.value(data))


class TestShard:
    codec = CODECS["none"](level=1, chunk_bytes=24)

    def opened(self, path: Path, data: bytes, chunks: int) -> ShardReader:
        path.write_bytes(data)
        return open_zarr(path, num_chunks=chunks, codec=self.codec, file_bytes=len(data),
                         index_crc=index_crc32c(data))  # fmt: skip

    @pytest.mark.parametrize(
        ("index", "match"),
        [
            ([[0, 2000]], "larger than raw ones"),
            ([[0, 28], [20, 28]], "overlap"),
            ([[2**63, 2**63]], "points outside"),
            ([[0, 3000]], "points outside"),
        ],
    )
    def test_an_index_that_cannot_be_is_refused(
        self, tmp_path: Path, index: list[list[int]], match: str
    ) -> None:
        data = shard_of(np.array(index, np.uint64), bytes(2500))
        with pytest.raises(errors.ShardError, match=match):
            self.opened(tmp_path / "c", data, len(index))

    def test_a_file_that_is_too_short_missing_a_link_or_a_pipe_is_refused(
        self, tmp_path: Path
    ) -> None:
        with pytest.raises(errors.ShardError, match="too short"):
            self.opened(tmp_path / "c", bytes(30), 2)
        with pytest.raises(errors.ShardError, match="at most"):
            self.opened(tmp_path / "c", bytes(30), 2**23)
        (tmp_path / "link").symlink_to(tmp_path / "c")
        os.mkfifo(tmp_path / "pipe")
        for name in ("none", "link", "pipe"):
            with pytest.raises(errors.ShardError, match=name):
                open_zarr(tmp_path / name, num_chunks=1, codec=self.codec, file_bytes=30,
                          index_crc=0)  # fmt: skip

    def test_a_file_that_shrinks_while_it_is_open_is_noticed(self, tmp_path: Path) -> None:
        chunk = self.codec.encode(memoryview(bytes(24)))
        file = self.opened(tmp_path / "c", b"".join(pack_shard([chunk, None])), 2)
        os.truncate(tmp_path / "c", 9)
        out = np.empty(24, np.uint8)
        with pytest.raises(errors.ShardError, match="ends after 9 of 28 bytes"):
            file.read_into(0, out)
        with pytest.raises(errors.ShardError, match="holds no data"):
            file.read_into(1, out)

    @pytest.mark.parametrize(
        "frame",
        [b"", b"\x28\xb5\x2f\xfd" + bytes(10), b"\x28\xb5\x2f\xfd\xc0" + bytes(20), b"x" * 20,
         b"\x28\xb5\x2f\xfd\x20\x18" + b"\xff" * 20],
    )  # fmt: skip
    def test_what_is_no_frame_is_refused(self, frame: bytes) -> None:
        codec = FRAMES(level=1, chunk_bytes=24)
        with pytest.raises(ValueError, match=r"wanted 24|[Zz]std"):
            codec.decode_into(frame, np.empty(24, np.uint8))

    @pytest.mark.parametrize("size", [24, 300, 70_000])
    def test_frames_of_every_size_of_header_are_read(self, size: int) -> None:
        codec = FRAMES(level=1, chunk_bytes=size)
        raw = np.random.default_rng(0).integers(0, 9, size).astype(np.uint8)
        out = np.empty(size, np.uint8)
        codec.decode_into(codec.encode(memoryview(raw.tobytes())), out)
        np.testing.assert_array_equal(out, raw)

    def test_a_wrong_checksum_or_size_of_an_uncompressed_chunk_is_refused(self) -> None:
        chunk = bytearray(self.codec.encode(memoryview(bytes(24))))
        with pytest.raises(ValueError, match="wanted 28"):
            self.codec.decode_into(bytes(chunk[:-1]), np.empty(24, np.uint8))
        chunk[3] ^= 1
        with pytest.raises(ValueError, match="crc32c"):
            self.codec.decode_into(bytes(chunk), np.empty(24, np.uint8))


class TestStore:
    def test_a_cache_is_a_mapping_of_its_splits(self, whole: Path) -> None:
        cache = cc.open_cache(whole)
        assert (list(cache), len(cache), "train" in cache, "x" in cache) == (
            list(cache.splits), len(cache.splits), True, False)  # fmt: skip
        assert cache.class_titles == cache.classes == ("ant", "bee")
        assert "splits=" in repr(cache)
        with pytest.raises(errors.UsageError, match="no split 'x'"):
            _ = cache["x"]

    def test_rows_are_read_by_number_from_either_end(self, whole: Path) -> None:
        split = cc.open_cache(whole)["train"]
        y, label = split[-1]
        last, same = split[len(split) - 1]
        assert (y.shape, label) == (split.shape[1:], same)
        assert (y == last).all()
        for row in (len(split), -len(split) - 1):
            with pytest.raises(IndexError, match=f"row {row} of"):
                _ = split[row]

    def test_a_damaged_shard_names_its_rows_when_read(self, cache: Path) -> None:
        (cache / COMMIT).unlink()
        with pytest.raises(errors.ShardError, match=r"shard 0 \(rows 0 to 3\): it has no commit"):
            _ = cc.open_cache(cache)["train"][0]
        data = json.loads((cache / "commits/train-000001.json").read_text())
        for change, match in (({"fingerprint": "0" * 64}, "another fingerprint"),
                              ({"files": []}, "does not list")):  # fmt: skip
            write_json(cache / "commits/train-000001.json", data | change)
            with pytest.raises(errors.ShardError, match=match):
                _ = cc.open_cache(cache)["train"][4]

    def test_zarrs_own_array_is_given_only_where_its_metadata_fits(self, cache: Path) -> None:
        path = cache / "latents.zarr/train/latents/zarr.json"
        honest = path.read_text()
        for change, match in (
            ({"shape": [9, 2, 192, 4, 4]}, "the manifest says"),
            ({"codecs": [{"name": "surprise"}]}, "cannot be opened"),
        ):
            path.write_text(json.dumps(json.loads(honest) | change))
            reseal(cache)
            with pytest.raises(errors.ManifestError, match=match):
                _ = cc.open_cache(cache)["train"].latents
        path.write_text(honest)
        reseal(cache)
        split = cc.open_cache(cache)["train"]
        assert split.latents.shape == split.shape

    def test_a_row_whose_image_was_bad_holds_nothing(self, tmp_path: Path) -> None:
        source = write_image_folder(tmp_path / "src", {"ant": 2, "bee": 1})
        (source / "ant" / "bad.jpg").write_bytes(b"\xff\xd8 nothing")
        cc.encode(source, tmp_path / "out", with_options(max_errors="1", val_fraction=0))
        split = cc.open_cache(tmp_path / "out")["train"]
        (bad,) = np.flatnonzero(~split.valid)
        with pytest.raises(errors.InvalidRowError, match=r"holds no latent.*errors\.parquet"):
            _ = split[int(bad)]

    def test_a_split_without_rows_or_commits_is_empty(self, cache: Path) -> None:
        data = json.loads((cache / "cache.json").read_text())
        data["splits"]["val"] |= {"rows": 0, "valid_rows": 0}
        write_json(cache / "cache.json", data)
        shutil.rmtree(cache / "commits")
        split = cc.open_cache(cache)["val"]
        assert (len(split), split.labels.shape, split.valid.shape) == (0, (0,), (0,))
        assert split.committed() == []
        foreign = {f.path for f in cc.verify(cache, quick=True) if f.kind == "foreign"}
        assert "index/val-000000.parquet" in foreign


def test_raw_shards_that_were_swapped_are_told_apart(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cc.encode(
        whole.parent / "src", tmp_path / "out",
        with_options(dtype="float16", codec="none", val_fraction=0),
    )  # fmt: skip
    first, second = (tmp_path / "out" / SHARD.replace("c.0", f"c.{n}") for n in (0, 1))
    content = first.read_bytes()
    assert len(content) == second.stat().st_size
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    found = cc.verify(tmp_path / "out", quick=True)
    assert [f.shard for f in found] == [0, 1]
    monkeypatch.setattr("ci2p_cache.cache.verify._SMALL_BYTES", 0)
    assert [f.shard for f in cc.verify(tmp_path / "out", quick=True)] == [0, 1]
    split = cc.open_cache(tmp_path / "out")["train"]
    with pytest.raises(errors.ShardError, match="not the shard of this index part"):
        _ = split[0]
    last = len(split) - 1
    assert split[last][0].isfinite().all()


def test_a_raw_shard_of_bad_images_alone_holds_nothing_to_tell_it_by(tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "src", {"ant": 2, "bee": 1})
    for number in range(9):
        (source / "ant" / f"bad{number}.jpg").write_bytes(b"\xff\xd8 nothing")
    options = with_options(max_errors="99", codec="none", val_fraction=0, shard_samples=1)
    cc.encode(source, tmp_path / "out", options)
    assert cc.verify(tmp_path / "out") == []


@pytest.mark.parametrize("stride", [40, pytest.param(4, marks=pytest.mark.slow)])
def test_a_flipped_bit_anywhere_in_a_footer_ends_no_process(cache: Path, stride: int) -> None:
    # pyarrow aborts where a column's histogram does not fit its levels; 1 of 1,000 random flips.
    path = cache / INDEX
    data = path.read_bytes()
    wanted = read_parquet(path)
    start = len(data) - 8 - struct.unpack("<I", data[-8:-4])[0]
    texts = data.index(b"ARROW:schema", start)
    rng = np.random.default_rng(0)
    for place in [*range(start, texts, stride), *range(texts, len(data), 16 * stride)]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(flipped)
        try:
            found = read_parquet(path)
        except OSError:
            continue
        # What no checksum covers, a name or a statistic, its digest in the commit record does.
        assert found.num_rows == wanted.num_rows or place < texts


def test_few_files_open_and_no_index_kept_change_no_value(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = [value.clone() for value, _ in (cc.open_cache(cache)["train"][row] for row in (0, 5))]
    monkeypatch.setattr(shard_reader, "_max_open", lambda: 1)
    monkeypatch.setattr(shard_reader, "_MAX_INDEX_BYTES", 0)
    split = cc.open_cache(cache)["train"]
    for _ in range(2):
        for row, value in zip((0, 5), wanted, strict=True):
            assert split[row][0].equal(value)
