"""Our shards are zarr's shards: what we pack zarr-python reads, what it writes we read."""

from __future__ import annotations

import struct
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import get_args

import google_crc32c
import numcodecs
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from ci2p_cache.cache.codecs import CODECS, ChunkCodec, unfolded
from ci2p_cache.cache.containers import index_crc32c, open_zarr, pack_shard
from ci2p_cache.cache.shard_reader import ShardReader
from ci2p_cache.errors import ShardError
from ci2p_cache.specs import CodecName, DType
from tests.support.chunks import KINDS, chunk_codec, compressors

SHAPE = (3, 2, 4)


def zarr_array(path: Path, kind: str, rows: int, shard_rows: int) -> zarr.Array:
    return zarr.create_array(
        path,
        shape=(rows, *SHAPE),
        chunks=(1, *SHAPE),
        shards=(shard_rows, *SHAPE),
        dtype="int8",
        compressors=compressors(kind, SHAPE),
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
    for kind in KINDS:
        for dtype in get_args(DType):
            codec = chunk_codec(kind, SHAPE, dtype)
            wanted = [each.to_dict() for each in compressors(kind, SHAPE, dtype)]
            assert codec.zarr_metadata == wanted
            assert dtype in codec.expected_share


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(stored=st.lists(st.booleans(), min_size=1, max_size=9), seed=st.integers(0, 2**32 - 1))
def test_zarr_reads_what_we_pack(
    tmp_path_factory: pytest.TempPathFactory, kind: str, stored: list[bool], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("pack")
    values = np.random.default_rng(seed).integers(-127, 128, (len(stored), *SHAPE)).astype("int8")
    codec = chunk_codec(kind, SHAPE)
    chunks = [
        codec.encode(memoryview(row.tobytes())) if keep else None
        for row, keep in zip(values, stored, strict=True)
    ]
    array = zarr_array(folder, kind, len(stored), len(stored))
    (folder / "c.0.0.0.0").write_bytes(b"".join(pack_shard(chunks)))

    read = array[:]

    expected = np.where(np.array(stored)[:, None, None, None], values, -128)
    np.testing.assert_array_equal(read, expected)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(rows=st.integers(1, 9), seed=st.integers(0, 2**32 - 1))
def test_we_read_what_zarr_writes(
    tmp_path_factory: pytest.TempPathFactory, kind: str, rows: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("read")
    values = np.random.default_rng(seed).integers(-127, 128, (rows, *SHAPE)).astype("int8")
    zarr_array(folder, kind, rows, 9)[:] = values
    codec = chunk_codec(kind, SHAPE)
    shard = open_shard(folder / "c.0.0.0.0", codec, 9)

    assert shard.stored.tolist() == [True] * rows + [False] * (9 - rows)
    out = np.empty(24, np.uint8)
    for row in range(rows):
        shard.read_into(row, out)
        assert out.tobytes() == values[row].tobytes()
    with pytest.raises(ShardError, match="holds no data") if rows < 9 else nullcontext():
        shard.read_into(8, out)


@pytest.mark.parametrize("kind", ["zstd", "lz4"])
@pytest.mark.parametrize("dtype", ["int8", "int16"])
@settings(max_examples=25)
@given(shape=st.sampled_from([SHAPE, (5, 3, 1), (4, 16, 16)]), seed=st.integers(0, 2**32 - 1))
def test_folded_symbols_come_back_from_us_and_by_the_page_s_rule_from_zarr(
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    dtype: str,
    shape: tuple[int, ...],
    seed: int,
) -> None:
    folder, limit = tmp_path_factory.mktemp("fold"), np.iinfo(dtype).max
    spread = np.random.default_rng(seed).choice([1, 9, limit])
    symbols = np.random.default_rng(seed).integers(-spread, spread + 1, shape).astype(dtype)
    codec = chunk_codec(kind, shape, dtype, fold=True)
    chunk = codec.encode(memoryview(symbols.tobytes()))
    out = np.empty(symbols.nbytes, np.uint8)
    codec.decode_into(chunk, out)
    assert out.tobytes() == symbols.tobytes()
    array = zarr.create_array(
        folder, shape=(2, *shape), chunks=(1, *shape), shards=(2, *shape), dtype=f"u{dtype}",
        compressors=compressors(kind, shape, dtype), fill_value=2 * limit + 1,
        chunk_key_encoding={"name": "default", "separator": "."},
    )  # fmt: skip
    (folder / "c.0.0.0.0").write_bytes(b"".join(pack_shard([chunk, None])))
    code = np.asarray(array[:]).astype(np.int32)
    assert code.max() == 2 * limit + 1
    np.testing.assert_array_equal(((code >> 1) ^ -(code & 1))[0], symbols)
    assert (code[1] == 2 * limit + 1).all()
    np.testing.assert_array_equal(unfolded(np.asarray(array[:]))[1], np.iinfo(dtype).min)


@pytest.fixture(params=KINDS)
def packed(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, ChunkCodec, int]:
    codec = chunk_codec(request.param, (600,))
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
    entries = np.frombuffer(path.read_bytes()[data_bytes:-4], "<u8").copy().reshape(4, 2)
    entries[1] = 10, 2**63
    index = entries.tobytes()
    crc = google_crc32c.value(index)
    whole = path.read_bytes()[:data_bytes] + index + crc.to_bytes(4, "little")
    path.write_bytes(whole)
    with pytest.raises(ShardError, match="points outside"):
        read_all(path, codec, len(whole), crc)


@pytest.mark.parametrize("kind", KINDS)
def test_a_chunk_of_another_size_is_refused_before_it_is_decoded(kind: str) -> None:
    small, large = chunk_codec(kind, (600,)), chunk_codec(kind, (6_000_000,))
    out = np.full(600, 7, np.uint8)
    for frame in (large.encode(memoryview(bytes(6_000_000))), small.encode(memoryview(bytes(5)))):
        with pytest.raises(ValueError, match="wanted 60"):
            small.decode_into(frame, out)
    assert (out == 7).all()


HEADER = struct.Struct("<BBBBIII")


def blosc_chunk(kind: str, symbols: bytes, *, fold: bool = False) -> bytearray:
    return bytearray(chunk_codec(kind, (len(symbols),), fold=fold).encode(memoryview(symbols))[:-4])


def sealed(buffer: bytes) -> bytes:
    return buffer + google_crc32c.value(buffer).to_bytes(4, "little")


@pytest.mark.parametrize("kind", ["zstd", "lz4"])
def test_a_blosc_header_that_is_not_ours_is_refused_whatever_its_checksum(kind: str) -> None:
    buffer, codec = blosc_chunk(kind, bytes(600)), chunk_codec(kind, (600,))
    out = np.empty(600, np.uint8)
    codec.decode_into(sealed(bytes(buffer)), out)
    other = blosc_chunk({"zstd": "lz4", "lz4": "zstd"}[kind], bytes(600))
    fields = HEADER.unpack_from(buffer)
    changed = [(0, 3), (3, 0), (3, 4), (4, 601), (4, 0), (4, 2**31 - 1), (6, 16), (6, 2**32 - 1)]
    hostile = [other, buffer[:15], buffer + b"x", b""]
    for place, value in changed:
        header = HEADER.pack(*fields[:place], value, *fields[place + 1 :])
        hostile.append(header + buffer[HEADER.size :])
    for data in hostile:
        with pytest.raises(ValueError, match="Blosc"):
            codec.decode_into(sealed(bytes(data)), out)
    for short in (b"", b"abc", b"abcdef"):
        with pytest.raises(ValueError, match=r"crc32c|of 0 bytes"):
            codec.decode_into(short, out)


@pytest.mark.parametrize("kind", ["zstd", "lz4"])
def test_symbols_that_were_not_shuffled_in_pairs_are_read(kind: str) -> None:
    symbols = np.random.default_rng(0).integers(-3, 4, 600).astype("int8")
    cname = {"zstd": "zstd", "lz4": "lz4hc"}[kind]
    blosc = numcodecs.Blosc(cname, clevel=1, shuffle=numcodecs.Blosc.BITSHUFFLE, blocksize=600)
    out = np.empty(600, np.uint8)
    for chunk in (bytes(blosc.encode(symbols)), bytes(blosc.encode(symbols.view("int16")))):
        chunk_codec(kind, (600,)).decode_into(sealed(chunk), out)
        assert (out.view("int8") == symbols).all()


@pytest.mark.parametrize("kind", ["zstd", "lz4"])
@settings(max_examples=150)
@given(data=st.data())
def test_no_buffer_with_a_right_checksum_ends_the_process_or_writes_outside(
    kind: str, data: st.DataObject
) -> None:
    symbols = np.random.default_rng(0).integers(-2, 3, 600).astype("int8").tobytes()
    buffer = blosc_chunk(kind, symbols)
    for _ in range(data.draw(st.integers(1, 4))):
        # Everything behind the sizes of the header, which the test above changes.
        place = data.draw(st.sampled_from([1, 2, *range(8, 12), *range(16, len(buffer))]))
        buffer[place] = data.draw(st.integers(0, 255))
    room = np.full(1800, 7, np.uint8)
    with suppress(ValueError):
        chunk_codec(kind, (600,)).decode_into(sealed(bytes(buffer)), room[600:1200])
    assert (room[:600] == 7).all()
    assert (room[1200:] == 7).all()


def test_a_buffer_that_is_too_small_or_not_contiguous_is_never_written_to() -> None:
    codec = chunk_codec("zstd", (600,))
    chunk = codec.encode(memoryview(bytes(600)))
    for out in (np.empty(599, np.uint8), np.empty(1200, np.uint8)[::2]):
        with pytest.raises((ValueError, TypeError, BufferError)):
            codec.decode_into(chunk, out)
