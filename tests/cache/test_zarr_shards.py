"""Our shards are zarr's shards: what we pack zarr-python reads, what it writes we read."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.codecs import Crc32cCodec, ZstdCodec

from ci2p_cache.cache.codecs import CODECS, ChunkCodec
from ci2p_cache.cache.containers import index_crc32c, open_zarr, pack_shard
from ci2p_cache.cache.shard_reader import ShardReader
from ci2p_cache.errors import ShardError
from ci2p_cache.specs import CodecName, DType

SHAPE = (3, 2, 4)


def compressor(name: str) -> ZstdCodec | Crc32cCodec:
    return ZstdCodec(level=3, checksum=True) if name == "zstd" else Crc32cCodec()


def zarr_array(path: Path, name: str, rows: int, shard_rows: int) -> zarr.Array:
    return zarr.create_array(
        path,
        shape=(rows, *SHAPE),
        chunks=(1, *SHAPE),
        shards=(shard_rows, *SHAPE),
        dtype="int8",
        compressors=compressor(name),
        fill_value=-128,
        chunk_key_encoding={"name": "default", "separator": "."},
        overwrite=True,
    )


def open_shard(path: Path, codec: ChunkCodec, num_chunks: int) -> ShardReader:
    data = path.read_bytes()
    return open_zarr(
        path,
        num_chunks=num_chunks,
        codec=codec,
        file_bytes=len(data),
        index_crc=index_crc32c(data),
    )


def test_every_codec_that_may_be_asked_for_is_there_and_is_zarr_s_own() -> None:
    assert set(CODECS) == set(get_args(CodecName))
    for name, kind in CODECS.items():
        codec = kind(level=3, chunk_bytes=24)
        assert codec.zarr_metadata == compressor(name).to_dict()
        assert set(codec.expected_share) == set(get_args(DType))


@pytest.mark.parametrize("name", ["zstd", "none"])
@settings(max_examples=25)
@given(stored=st.lists(st.booleans(), min_size=1, max_size=9), seed=st.integers(0, 2**32 - 1))
def test_zarr_reads_what_we_pack(
    tmp_path_factory: pytest.TempPathFactory, name: CodecName, stored: list[bool], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("pack")
    values = np.random.default_rng(seed).integers(-127, 128, (len(stored), *SHAPE)).astype("int8")
    codec = CODECS[name](level=3, chunk_bytes=24)
    chunks = [
        codec.encode(memoryview(row.tobytes())) if keep else None
        for row, keep in zip(values, stored, strict=True)
    ]
    array = zarr_array(folder, name, len(stored), len(stored))
    (folder / "c.0.0.0.0").write_bytes(b"".join(pack_shard(chunks)))

    read = array[:]

    expected = np.where(np.array(stored)[:, None, None, None], values, -128)
    np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize("name", ["zstd", "none"])
@settings(max_examples=25)
@given(rows=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_we_read_what_zarr_writes(
    tmp_path_factory: pytest.TempPathFactory, name: CodecName, rows: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("read")
    values = np.random.default_rng(seed).integers(-127, 128, (rows, *SHAPE)).astype("int8")
    zarr_array(folder, name, rows, 9)[:] = values
    codec = CODECS[name](level=3, chunk_bytes=24)
    shard = open_shard(folder / "c.0.0.0.0", codec, 9)

    assert shard.stored.tolist() == [True] * rows + [False] * (9 - rows)
    out = np.empty(24, np.uint8)
    for row in range(rows):
        shard.read_into(row, out)
        assert out.tobytes() == values[row].tobytes()
    with pytest.raises(ShardError, match="holds no data") if rows < 9 else nullcontext():
        shard.read_into(8, out)


@pytest.fixture(params=["zstd", "none"])
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, ChunkCodec, int]:
    codec = CODECS[request.param](level=1, chunk_bytes=600)
    rng = np.random.default_rng(0)
    chunks = [codec.encode(memoryview(rng.integers(0, 9, 600).astype("u1").tobytes()))] * 3
    path = tmp_path / "shard"
    path.write_bytes(b"".join(pack_shard([*chunks, None])))
    return path, codec, sum(map(len, chunks))


def read_all(path: Path, codec: ChunkCodec, size: int, crc: int) -> None:
    shard = open_zarr(path, num_chunks=4, codec=codec, file_bytes=size, index_crc=crc)
    out = np.empty(600, np.uint8)
    for chunk in range(3):
        shard.read_into(chunk, out)


def test_every_single_flipped_bit_is_found(packed: tuple[Path, ChunkCodec, int]) -> None:
    path, codec, _ = packed
    intact = path.read_bytes()
    crc = index_crc32c(intact)
    for position in range(0, len(intact), 7):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << (position % 8)
        path.write_bytes(damaged)
        with pytest.raises(ShardError):
            read_all(path, codec, len(intact), crc)


def test_a_truncated_shard_is_refused_when_opened(packed: tuple[Path, ChunkCodec, int]) -> None:
    path, codec, _ = packed
    intact = path.read_bytes()
    path.write_bytes(intact[:-1])
    with pytest.raises(ShardError, match=r"bytes, .* were committed"):
        read_all(path, codec, len(intact), index_crc32c(intact))


def test_an_intact_but_foreign_shard_is_refused(packed: tuple[Path, ChunkCodec, int]) -> None:
    path, codec, _ = packed
    size = path.stat().st_size
    with pytest.raises(ShardError, match="not the shard that was committed"):
        read_all(path, codec, size, 12345)


def test_an_index_that_points_outside_is_refused(packed: tuple[Path, ChunkCodec, int]) -> None:
    path, codec, data_bytes = packed
    import google_crc32c

    entries = np.frombuffer(path.read_bytes()[data_bytes:-4], "<u8").copy().reshape(4, 2)
    entries[1] = 10, 2**63
    index = entries.tobytes()
    crc = google_crc32c.value(index)
    whole = path.read_bytes()[:data_bytes] + index + crc.to_bytes(4, "little")
    path.write_bytes(whole)
    with pytest.raises(ShardError, match="points outside"):
        read_all(path, codec, len(whole), crc)


def test_a_frame_of_another_size_is_refused_before_it_is_decoded() -> None:
    small = CODECS["zstd"](level=1, chunk_bytes=600)
    large = CODECS["zstd"](level=1, chunk_bytes=6_000_000)
    out = np.full(600, 7, np.uint8)
    for frame in (large.encode(memoryview(bytes(6_000_000))), small.encode(memoryview(bytes(5)))):
        with pytest.raises(ValueError, match="wanted 600"):
            small.decode_into(frame, out)
    assert (out == 7).all()
