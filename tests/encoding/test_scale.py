"""Many images: what bar R12 measures at ImageNet's size, here as behaviour with 20,000 of them."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.cache import shard_reader
from ci2p_cache.cache.manifest import read_manifest
from ci2p_cache.cache.shard_reader import ShardReader
from ci2p_cache.encoding import planning, progress
from ci2p_cache.encoding.plan import Plan, read_plan
from ci2p_cache.encoding.planning import build_plan
from ci2p_cache.images.locate import open_source
from ci2p_cache.specs import LatentSpec
from tests.long.scale import OPTIONS, commit_times, copy_shards, encode_until, make_source

ROWS = 20_000
SMALL = dataclasses.replace(OPTIONS, shard_samples=128, devices="cpu:1", workers=1)
NUM_SHARDS, LEFT = -(-ROWS // 128), 3
LATENT = LatentSpec(dtype="int8", step=1.0, channels=192, height=2, width=2)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("many") / "source"
    make_source(root, ROWS)
    return root


@pytest.fixture(scope="module")
def nearly_done(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of which all shards but the last few are committed."""
    out = tmp_path_factory.mktemp("nearly") / "out"
    encode_until(source, out, 1, 1.0, SMALL)
    copy_shards(out, NUM_SHARDS - LEFT)
    assert len(commit_times(out)) == NUM_SHARDS - LEFT
    return out


@pytest.fixture(scope="module")
def done(source: Path, nearly_done: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("done") / "out"
    shutil.copytree(nearly_done, out)
    cc.encode(source, out, SMALL)
    return out


def plan_of(source: Path, **changes: Any) -> Plan:
    options = dataclasses.replace(SMALL, **changes)
    return build_plan(open_source(source), options.layout_spec(), options.view_spec(), LATENT)


def num_open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def rank(key: str, split: str, seed: int) -> int:
    digest = hashlib.blake2b(
        key.encode(),
        digest_size=8,
        key=seed.to_bytes(8, "little"),
        person=f"row:{split}".encode(),
    )
    return int.from_bytes(digest.digest(), "little")


def test_the_plan_has_each_key_once_in_the_order_of_its_hash(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_BLOCK_ROWS", 999)
    plan = plan_of(source, val_fraction=0.2, seed=3)
    found = set()
    for split in ("train", "val"):
        shards = [plan.shard(name, n) for name, n in plan.shard_numbers() if name == split]
        samples = [sample for shard in shards for sample in shard.samples]
        assert [sample.row for sample in samples] == list(range(len(samples)))
        keys = [sample.key for sample in samples]
        assert keys == sorted(keys, key=lambda key: rank(key, split, 3))
        assert all((source / os.fsdecode(sample.path)).exists() for sample in samples[:100])
        found |= set(keys)
        for shard in shards[:2] + shards[-1:]:
            digest = hashlib.sha256()
            for each in shard.samples:
                digest.update(f"{each.row}\0{each.label}\0{each.key}\0".encode())
                digest.update(each.path + b"\n")
            assert digest.hexdigest() == shard.sha256
    assert len(found) == plan.num_samples == ROWS


def test_images_of_equal_rank_come_in_the_order_of_their_keys(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_hash64", lambda *_: 7)
    monkeypatch.setattr(planning, "_BLOCK_ROWS", 999)
    plan = plan_of(source)
    keys = [s.key for place in plan.shard_numbers() for s in plan.shard(*place).samples]
    assert keys == sorted(keys)


def test_listing_and_planning_keep_no_object_per_image(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "_BLOCK_ROWS", 1024)
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    try:
        plan = plan_of(source)
        digests = {plan.shard_sha256(*place) for place in plan.shard_numbers()}
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(digests) == NUM_SHARDS
    assert peak < 100 * ROWS
    assert pa.total_allocated_bytes() - before < 200 * ROWS


@pytest.mark.slow
def test_resuming_encodes_and_unfolds_only_what_is_not_committed(
    source: Path, nearly_done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(nearly_done, out)
    before = commit_times(out)
    unfolded = []
    true_shard = Plan.shard

    def shard(plan: Plan, split: str, number: int) -> Any:
        unfolded.append(number)
        return true_shard(plan, split, number)

    monkeypatch.setattr(Plan, "shard", shard)
    summary = cc.encode(source, out, SMALL)
    assert unfolded == list(range(NUM_SHARDS - LEFT, NUM_SHARDS))
    assert summary.encoded_now == ROWS - (NUM_SHARDS - LEFT) * 128
    assert summary.images == ROWS
    assert before.items() <= commit_times(out).items()
    unfolded.clear()
    assert cc.encode(source, out, SMALL).encoded_now == 0
    assert unfolded == []
    assert cc.verify(out, quick=True) == []


@pytest.mark.slow
def test_encoding_holds_no_more_files_open_from_shard_to_shard(
    source: Path, nearly_done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(nearly_done, out)
    monkeypatch.setattr(progress, "_TICK_SECONDS", 0.0)
    counts: list[int] = []

    class Watch(cc.EncodeObserver):
        def progress(self, progress: Any) -> None:
            counts.append(num_open_files())

    cc.encode(source, out, SMALL, observer=Watch())
    assert len(counts) > 2 * 128
    assert max(counts[128:]) <= max(counts[:128]) + 2


@pytest.mark.slow
def test_an_epoch_over_more_shards_than_may_be_open_reads_every_row_once(
    done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_reader, "_max_open", lambda: 8)
    split = cc.open_cache(done)["train"]
    opened = []
    true_open = split.open_shard

    def open_shard(shard: int) -> ShardReader:
        opened.append(shard)
        return true_open(shard)

    monkeypatch.setattr(split._shards, "_open_shard", open_shard)
    first = num_open_files()
    rows: list[int] = []
    most = 0
    with cc.LatentLoader(split, batch_size=512, threads=2) as loader:
        for batch in loader:
            rows += batch.rows.tolist()
            most = max(most, num_open_files())
    assert sorted(rows) == list(range(ROWS))
    assert most <= first + 8 + 4
    # Records and indexes are checked when a shard is first met, and never again.
    assert sorted(opened) == list(range(NUM_SHARDS))


def test_a_shard_replaced_while_it_was_closed_is_checked_again(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(done, out)
    monkeypatch.setattr(shard_reader, "_max_open", lambda: 1)
    split = cc.open_cache(out)["train"]
    wanted, _ = split[0]
    split[128]
    folder = out / "latents.zarr" / "train" / "latents"
    data = (folder / "c.0.0.0.0.0").read_bytes()
    (folder / "new").write_bytes(data)
    (folder / "new").replace(folder / "c.0.0.0.0.0")
    assert split[0][0].equal(wanted)
    split[128]
    damaged = bytearray(data)
    damaged[-20] ^= 1
    (folder / "new").write_bytes(damaged)
    (folder / "new").replace(folder / "c.0.0.0.0.0")
    with pytest.raises(errors.ShardError, match=r"rows 0 to 127.*checksum of its index"):
        split[0]


def test_a_limit_takes_the_images_of_smallest_hash(source: Path) -> None:
    few, more = (
        {s.key for place in plan.shard_numbers() for s in plan.shard(*place).samples}
        for plan in (plan_of(source, limit=100), plan_of(source, limit=1000))
    )
    assert (len(few), len(more)) == (100, 1000)
    assert few < more


def test_a_damaged_index_part_is_found_before_the_cache_is_called_complete(
    source: Path, nearly_done: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(nearly_done, out)
    path = out / "index" / "train-000002.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(errors.ShardError, match="train-000002"):
        cc.encode(source, out, SMALL)
    assert not read_manifest(out).is_complete
    assert read_plan(out, read_manifest(out)).num_samples == ROWS
