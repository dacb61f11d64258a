"""Shards of codec none, mapped into one range: the right bytes, or an error that names the rows."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ci2p_cache.cache import shard_reader
from ci2p_cache.cache.codecs import CODECS
from ci2p_cache.cache.containers import index_crc32c, open_zarr, pack_shard
from ci2p_cache.cache.shard_reader import RawShards, ShardReader
from ci2p_cache.errors import ShardError

CHUNKS, BYTES, SHARDS = 5, 3 * 700, 7
CODEC = CODECS["none"](level=1, chunk_bytes=BYTES)
VALUES = np.random.default_rng(0).integers(0, 256, (SHARDS, CHUNKS, BYTES)).astype(np.uint8)
MISSING = (2, 1)
"""Shard and chunk of the one that is not stored."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for shard, chunks in enumerate(VALUES):
        stored = [
            None if (shard, chunk) == MISSING else CODEC.encode(memoryview(raw.tobytes()))
            for chunk, raw in enumerate(chunks)
        ]
        (tmp_path / str(shard)).write_bytes(b"".join(pack_shard(stored)))
    return tmp_path


def opener(folder: Path, *, chunks: int = CHUNKS) -> Callable[[int], ShardReader]:
    def open_shard(shard: int) -> ShardReader:
        path = folder / str(shard)
        data = path.read_bytes() if path.exists() else b""
        crc = index_crc32c(data) if data else 0
        return open_zarr(path, num_chunks=chunks, codec=CODEC, file_bytes=len(data), index_crc=crc)

    return open_shard


def damage(shard: int, reason: str) -> ShardError:
    return ShardError(f"shard {shard}: {reason}")


def mapped(folder: Path) -> RawShards:
    return RawShards(
        opener(folder), damage, num_shards=SHARDS, shard_chunks=CHUNKS, chunk_bytes=BYTES
    )


def gathered(shards: RawShards, pairs: list[tuple[int, int]]) -> np.ndarray:
    out = np.zeros((len(pairs), BYTES), np.uint8)
    numbers = np.array(pairs, np.int64).reshape(-1, 2)
    shards.gather(numbers[:, 0].copy(), numbers[:, 1].copy(), out)
    return out


def test_any_chunks_come_in_any_order_from_many_threads(folder: Path) -> None:
    shards = mapped(folder)
    rng = np.random.default_rng(1)
    good = [(s, c) for s in range(SHARDS) for c in range(CHUNKS) if (s, c) != MISSING]
    failed: list[object] = []

    def read(seed: int) -> None:
        for _ in range(20):
            pairs = [good[i] for i in np.random.default_rng(seed).integers(0, len(good), 9)]
            if not np.array_equal(gathered(shards, pairs), [VALUES[pair] for pair in pairs]):
                failed.append(pairs)

    threads = [threading.Thread(target=read, args=(int(rng.integers(99)),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_a_chunk_that_is_not_stored_is_an_error(folder: Path) -> None:
    with pytest.raises(ShardError, match="shard 2: chunk 1 holds no data"):
        gathered(mapped(folder), [(0, 0), MISSING])


def test_a_damaged_chunk_is_an_error_when_it_is_first_touched(folder: Path) -> None:
    path = folder / "4"
    data = bytearray(path.read_bytes())
    data[BYTES + 20] ^= 1
    path.write_bytes(data)
    shards = mapped(folder)
    assert np.array_equal(gathered(shards, [(4, 0)])[0], VALUES[4, 0])
    for _ in range(2):
        with pytest.raises(ShardError, match="shard 4: chunk 1 is damaged: crc32c"):
            gathered(shards, [(3, 1), (4, 1)])


def test_a_missing_shard_is_an_error_and_the_others_are_read(folder: Path) -> None:
    (folder / "6").unlink()
    shards = mapped(folder)
    with pytest.raises(ShardError, match=r"shard 6: .* cannot be opened"):
        gathered(shards, [(1, 1), (6, 0)])
    assert np.array_equal(gathered(shards, [(1, 1)])[0], VALUES[1, 1])


def test_a_shard_longer_than_any_of_its_kind_is_refused(folder: Path) -> None:
    path = folder / "0"
    data = path.read_bytes()
    index = 16 * CHUNKS + 4
    path.write_bytes(data[:-index] + bytes(2**16) + data[-index:])
    with pytest.raises(ShardError, match=r"shard 0: .* has \d+ bytes, over"):
        gathered(mapped(folder), [(0, 0)])


def test_what_the_kernel_refuses_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ShardError, match="shards cannot be mapped"):
        RawShards(opener(folder), damage, num_shards=2**50, shard_chunks=CHUNKS, chunk_bytes=BYTES)
    with pytest.raises(ShardError, match="shards cannot be mapped"):
        RawShards(opener(folder), damage, num_shards=2**36, shard_chunks=CHUNKS, chunk_bytes=BYTES)
    shards = mapped(folder)

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(shard_reader, "_map", refuse)
    with pytest.raises(ShardError, match=r"shard 3: .* cannot be mapped: Cannot allocate"):
        gathered(shards, [(3, 0)])


def test_memory_and_files_are_given_back(folder: Path) -> None:
    def counts() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text().count(str(folder))
        return maps, len(list(Path("/proc/self/fd").iterdir()))

    before = counts()
    shards = mapped(folder)
    gathered(shards, [(s, 0) for s in range(SHARDS)])
    assert counts() == (SHARDS, before[1])
    del shards
    assert counts() == before
