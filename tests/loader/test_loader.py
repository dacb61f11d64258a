"""Stage two's door: every sample once, in a known order, exactly as stored, resumable anywhere."""

from __future__ import annotations

import errno
import functools
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.loader import order, resident
from ci2p_cache.machine import free_memory_bytes
from tests.support.pictures import write_image_folder
from tests.support.tiers import thinned

WAYS = ("int8", "int16", "float32", "float16 tars", "float16", "int8 none")
"""How latents are stored."""


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], cc.Cache]:
    """Returns the cache of 21 images in shards of 4, one of them bad, for a way of storing."""

    @functools.cache
    def make(way: str) -> cc.Cache:
        root = tmp_path_factory.mktemp("loader")
        source = write_image_folder(root / "src", {"ant": 9, "bee": 7, "cat": 5})
        (source / "bee" / "002.jpg").write_bytes(b"no image")
        dtype, _, kind = way.partition(" ")
        options = cc.EncodeOptions(
            encoder="bundled", size=64, shard_samples=4, val_fraction=0.0, max_errors="1",
            dtype=dtype,  # type: ignore[arg-type]  # one of WAYS
            codec="none" if kind == "none" else "zstd",
            format="webdataset" if kind == "tars" else "zarr",
        )  # fmt: skip
        cc.encode(source, root / "out", options)
        return cc.open_cache(root / "out")

    return make


@pytest.fixture(scope="module", params=thinned(WAYS, step=3))
def cache(request: pytest.FixtureRequest, stored: Callable[[str], cc.Cache]) -> cc.Cache:
    return stored(request.param)


def test_an_epoch_holds_every_good_sample_once_as_the_split_gives_it(cache: cc.Cache) -> None:
    train = cache["train"]
    with cc.LatentLoader(train, batch_size=6, seed=3) as loader:
        batches = list(loader)
    assert [len(batch.rows) for batch in batches] == [6, 6, 6, 2]
    assert len(loader) == 4
    rows = torch.cat([batch.rows for batch in batches]).tolist()
    assert sorted(rows) == train.valid_rows.tolist()
    for batch in batches:
        assert batch.latents.dtype == torch.float32
        for latents, label, row in zip(batch.latents, batch.labels, batch.rows, strict=True):
            views, wanted = train[int(row)]
            assert label == wanted
            assert any(torch.equal(latents, view) for view in views)


def test_a_loader_closed_before_its_iterator_holds_nobody_up(cache: cc.Cache) -> None:
    # Batches waited for, that the closed pool had never begun, were waited for in vain.
    ended = threading.Event()

    def leave_early() -> None:
        for _ in range(30):
            with cc.LatentLoader(cache["train"], batch_size=2, threads=1) as loader:
                iterator = iter(loader)
                next(iterator)
            del iterator
        ended.set()

    threading.Thread(target=leave_early, daemon=True).start()
    assert ended.wait(60)


def test_both_views_come_up_and_a_fixed_view_is_that_view(cache: cc.Cache) -> None:
    train = cache["train"]
    seen = set()
    with cc.LatentLoader(train, batch_size=20, shuffle=False) as loader:
        for epoch in range(6):
            assert loader.epoch == epoch
            (batch,) = loader
            first = [torch.equal(b, train[int(r)][0][0])
                     for b, r in zip(batch.latents, batch.rows, strict=True)]  # fmt: skip
            seen |= set(first)
    assert seen == {True, False}
    with cc.LatentLoader(train, batch_size=20, shuffle=False, views=1) as loader:
        (batch,) = loader
    assert batch.rows.tolist() == train.valid_rows.tolist()
    for latents, row in zip(batch.latents, batch.rows, strict=True):
        assert torch.equal(latents, train[int(row)][0][1])


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("recycle", [False, True])
@pytest.mark.parametrize("kind", [cc.LatentLoader, cc.ResidentLoader])
def test_threads_recycling_and_residence_change_no_batch(
    cache: cc.Cache, kind: type[cc.LatentLoader], threads: int, recycle: bool
) -> None:
    with cc.LatentLoader(cache["train"], batch_size=6, seed=1) as plain:
        wanted = [(b.rows, b.labels, b.stored, b.latents) for _ in range(3) for b in plain]
    with kind(cache["train"], batch_size=6, seed=1, threads=threads, recycle=recycle) as loader:
        got = [
            (b.rows, b.labels, b.stored.clone(), b.latents.clone())
            for _ in range(3)
            for b in loader
        ]
    for one, other in zip(wanted, got, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("recycle", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("fast_enough", [-1.0, float("inf")])
def test_chunks_at_hand_are_read_when_asked_for_and_change_no_batch(
    cache: cc.Cache,
    recycle: bool,
    threads: int,
    fast_enough: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    readers = set()
    read = cc.Split.read_batch_into

    def watched(*arguments: Any) -> None:
        readers.add(threading.current_thread())
        read(*arguments)

    for limit in ("_AT_HAND_BYTES_PER_SECOND", "_AT_HAND_BUSY"):
        monkeypatch.setattr(f"ci2p_cache.loader.latents.{limit}", fast_enough)
    train = cache["train"]
    with cc.LatentLoader(train, batch_size=6, seed=1, threads=threads, recycle=recycle) as loader:
        first = [(b.rows, b.stored.clone()) for b in loader]
        monkeypatch.setattr(cc.Split, "read_batch_into", watched)
        loader.set_epoch(0)
        again = [(b.rows, b.stored.clone()) for b in loader]
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    at_hand = fast_enough < 0 and (train.is_mapped or threads == 1)
    assert (readers == {threading.current_thread()}) == at_hand


@pytest.mark.parametrize("kind", [cc.LatentLoader, cc.ResidentLoader])
def test_what_is_stored_is_there_as_stored(cache: cc.Cache, kind: type[cc.LatentLoader]) -> None:
    train = cache["train"]
    with kind(train, batch_size=6, views=1, recycle=True) as loader:
        for batch in loader:
            wanted = np.empty((len(batch.rows), *train.latent.shape), train.latent.dtype)
            for row, out in zip(batch.rows.tolist(), wanted, strict=True):
                if train.layout.has_zarr:
                    out[:] = train.latents[row, 1]
                else:
                    train.read_into(row, 1, out)
            np.testing.assert_array_equal(batch.stored.numpy(), wanted)
            assert batch.stored.numpy().dtype == train.latent.dtype


@pytest.mark.parametrize("kind", [cc.LatentLoader, cc.ResidentLoader])
def test_blocks_come_whole_and_hold_every_sample_once(
    cache: cc.Cache, kind: type[cc.LatentLoader], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(order, "_SHARDS_PER_BLOCK", 2)
    train = cache["train"]
    with kind(train, batch_size=1, seed=5, shuffle="blocks") as loader:
        epochs = [torch.cat([batch.rows for batch in loader]).tolist() for _ in range(2)]
    assert epochs[0] != epochs[1]
    for rows in epochs:
        assert sorted(rows) == train.valid_rows.tolist()
        shards = [row // 4 for row in rows]
        # 21 rows in shards of 4: six shards, two to a block; each is done before the next begins.
        first = [shards.index(shard) for shard in range(6)]
        last = [len(shards) - 1 - shards[::-1].index(shard) for shard in range(6)]
        by_start = sorted(range(6), key=first.__getitem__)
        for earlier, later in ((by_start[:2], by_start[2:4]), (by_start[2:4], by_start[4:])):
            assert max(last[shard] for shard in earlier) < min(first[shard] for shard in later)
        assert rows != sorted(rows)


def test_a_split_that_does_not_fit_is_read_from_disk_unless_asked_otherwise(
    cache: cc.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, cuda = cache["train"], torch.device("cuda")
    need = 20 * 2 * train.latent.num_bytes

    def choice(free: float, wanted: resident.Resident, device: torch.device) -> tuple[bool, str]:
        monkeypatch.setattr(resident, "free_memory_bytes", lambda device: int(free))
        return resident.choose_resident(train, device, wanted)

    assert choice(2 * need, "auto", cuda)[0]
    stays, reason = choice(1.5 * need, "auto", cuda)
    assert not stays
    assert "60% may be taken: they are read from disk" in reason
    assert choice(1.5 * need, "yes", cuda)[0]
    assert choice(1e12, "auto", torch.device("cpu")) == (False, "")
    assert choice(1e12, "no", cuda) == (False, "")
    with pytest.raises(errors.ResourceError, match="they do not fit"):
        choice(need - 1, "yes", torch.device("cpu"))


def test_what_is_free_on_this_machine_is_known() -> None:
    assert 0 < free_memory_bytes(torch.device("cpu")) < 2**50


def test_a_disk_that_cannot_be_read_is_a_damaged_shard(
    cache: cc.Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pread(*_: object) -> bytes:
        raise OSError(errno.EIO, "Input/output error")

    train = cc.open_cache(cache.path)["train"]
    with cc.LatentLoader(train, batch_size=4) as loader:
        monkeypatch.setattr(os, "pread", pread)
        with pytest.raises(errors.ShardError, match="Input/output error") as caught:
            list(loader)
    assert "--repair" in str(caught.value.hint)


def test_recycled_batches_use_a_few_buffers_again_and_owned_ones_do_not(cache: cc.Cache) -> None:
    def addresses(recycle: bool) -> list[int]:
        kept, found = [], []
        with cc.LatentLoader(cache["train"], batch_size=2, recycle=recycle) as loader:
            for _ in range(4):
                for batch in loader:
                    kept.append(batch)
                    found.append(batch.latents.data_ptr())
        return found

    assert len(set(addresses(recycle=True))) <= 5
    assert len(set(addresses(recycle=False))) == 40


def test_state_at_every_step_gives_the_rest_of_the_run(cache: cc.Cache) -> None:
    def rows(loader: cc.LatentLoader, epochs: int) -> list[list[int]]:
        return [b.rows.tolist() for _ in range(epochs - loader.epoch) for b in loader]

    with cc.LatentLoader(cache["train"], batch_size=6, seed=5) as loader:
        whole = rows(loader, 2)
    for stop in range(1, len(whole)):
        with cc.LatentLoader(cache["train"], batch_size=6, seed=5) as loader:
            taken = 0
            while taken < stop:
                for _ in loader:
                    taken += 1
                    if taken == stop:
                        state = loader.state_dict()
                        break
        with cc.LatentLoader(cache["train"], batch_size=6, seed=5) as resumed:
            resumed.load_state_dict(state)
            assert rows(resumed, 2) == whole[stop:], state
    with cc.LatentLoader(cache["train"], batch_size=6, seed=6) as other:
        with pytest.raises(errors.UsageError, match="seed 5"):
            other.load_state_dict(state)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("batch_size", [17, 13, 64])
def test_a_ragged_batch_that_threads_share_unevenly_is_whole(
    cache: cc.Cache, batch_size: int, threads: int
) -> None:
    with cc.LatentLoader(cache["train"], batch_size=batch_size, threads=threads) as loader:
        rows = torch.cat([batch.rows for batch in loader]).tolist()
    assert sorted(rows) == cache["train"].valid_rows.tolist()


def test_drop_last_leaves_out_the_ragged_batch(cache: cc.Cache) -> None:
    with cc.LatentLoader(cache["train"], batch_size=6, drop_last=True) as loader:
        assert [len(batch.rows) for batch in loader] == [6, 6, 6]
        assert loader.num_samples == 18


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"batch_size": 0}, "at least 1"), ({"batch_size": 2, "views": 2}, "views 0 to 1")],
)
def test_bad_arguments_are_refused(
    cache: cc.Cache, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(errors.UsageError, match=message):
        cc.LatentLoader(cache["train"], **arguments)


def test_a_damaged_shard_ends_the_iteration_and_names_the_shard(
    cache: cc.Cache, tmp_path: Path
) -> None:
    shutil.copytree(cache.path, tmp_path / "out")
    has_zarr = cache.manifest.layout.has_zarr
    name = "latents.zarr/train/latents/c.2.0.0.0.0" if has_zarr else "tar/train-000002.tar"
    path = tmp_path / "out" / name
    data = bytearray(path.read_bytes())
    # A tar's headers and labels are not read here: a byte of a latent's values.
    data[len(data) // 3 if has_zarr else 1024] ^= 16
    path.write_bytes(data)
    damaged = cc.open_cache(tmp_path / "out")["train"]
    with (
        cc.LatentLoader(damaged, batch_size=4, views=0) as one,
        cc.LatentLoader(damaged, batch_size=4, views=1) as two,
    ):
        with pytest.raises(errors.ShardError, match=r"shard 2 \(rows 8 to 11\)"):
            list(one)
            list(two)


@pytest.fixture
def one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_the_encoder_in_the_loop_gives_the_same_batches_bit_for_bit(cache: cc.Cache) -> None:
    with (
        cc.LatentLoader(cache["train"], batch_size=6, seed=9) as cached,
        cc.OnlineLoader(cache["train"], batch_size=6, seed=9) as online,
    ):
        for one, other in zip(cached, online, strict=True):
            assert torch.equal(one.rows, other.rows)
            assert torch.equal(one.labels, other.labels)
            assert torch.equal(one.latents, other.latents)


@pytest.mark.usefixtures("one_thread")
def test_images_come_in_the_order_and_views_of_the_cache(cache: cc.Cache) -> None:
    encoder = cc.load_encoder("bundled")
    with (
        cc.LatentLoader(cache["train"], batch_size=6, seed=9) as cached,
        cc.PixelLoader(cache["train"], batch_size=6, seed=9) as images,
    ):
        for one, other in zip(cached, images, strict=True):
            assert torch.equal(one.rows, other.rows)
            assert other.stored.dtype == torch.uint8
            y = encoder(other.stored.float() / 255)
            assert (y - one.latents).abs().max() <= 0.51
            assert other.latents.dtype == torch.float32
            assert torch.equal(other.latents, other.stored.float() / 255)


def test_images_are_the_same_where_their_memory_is_used_again(cache: cc.Cache) -> None:
    with (
        cc.PixelLoader(cache["train"], batch_size=6, seed=9) as fresh,
        cc.PixelLoader(cache["train"], batch_size=6, seed=9, recycle=True) as recycled,
    ):
        for one, other in zip(fresh, recycled, strict=True):
            assert torch.equal(one.latents, other.latents)
            assert 0 <= one.latents.min() < 0.2 < 0.8 < one.latents.max() <= 1


@pytest.mark.usefixtures("one_thread")
def test_ranks_cut_the_batches_of_the_encoder_in_the_loop_too(cache: cc.Cache) -> None:
    with cc.LatentLoader(cache["train"], batch_size=6, seed=9, drop_last=True) as alone:
        wanted = [batch.latents for batch in alone]
    slices = []
    for rank in range(4):
        with cc.OnlineLoader(
            cache["train"], batch_size=6, seed=9, drop_last=True, rank=rank, world_size=4
        ) as loader:
            assert loader.num_samples == 18
            slices.append([batch.latents for batch in loader])
    assert [len(latents) for latents in slices[3]] == [0, 0, 0]
    for whole, parts in zip(wanted, zip(*slices, strict=True), strict=True):
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.usefixtures("one_thread", "nano")
def test_twenty_steps_from_the_cache_and_with_the_encoder_in_the_loop_lose_the_same(
    cache: cc.Cache,
) -> None:
    def losses(loader: cc.LatentLoader | cc.OnlineLoader) -> list[float]:
        torch.manual_seed(0)
        model = cc.create_model("vitds_nano", num_classes=3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found: list[float] = []
        with loader:
            while len(found) < 20:
                for batch in loader:
                    loss = torch.nn.functional.cross_entropy(model(batch.latents), batch.labels)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    found.append(loss.item())
        return found

    train = cache["train"]
    cached = losses(cc.LatentLoader(train, batch_size=4, seed=2, recycle=True))
    online = losses(cc.OnlineLoader(train, batch_size=4, seed=2))
    assert cached == online
    assert np.mean(cached[-5:]) < np.mean(cached[:5])


def test_the_online_loader_names_an_image_that_has_changed_or_vanished(tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "src", {"ant": 3, "bee": 3})
    options = cc.EncodeOptions(encoder="bundled", size=64, val_fraction=0.0)
    cc.encode(source, tmp_path / "out", options)
    shutil.copy(source / "ant" / "001.jpg", source / "ant" / "000.jpg")
    with cc.OnlineLoader(cc.open_cache(tmp_path / "out")["train"], batch_size=2) as loader:
        with pytest.raises(errors.InputDataError, match=r"ant/000\.jpg .* has changed"):
            list(loader)
    (source / "ant" / "000.jpg").unlink()
    with cc.OnlineLoader(cc.open_cache(tmp_path / "out")["train"], batch_size=2) as loader:
        with pytest.raises(errors.ImageDecodeError, match=r"ant/000\.jpg \(row \d.* has vanished"):
            list(loader)


@pytest.mark.slow
def test_stage_two_reads_without_compressai(stored: Callable[[str], cc.Cache]) -> None:
    code = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "compressai":
            raise ImportError("compressai is not installed")
sys.meta_path.insert(0, Blocked())
import ci2p_cache as cc
for path in sys.argv[1:]:
    train = cc.open_cache(path)["train"]
    for name, kind in (("vitds_tiny", cc.LatentLoader), ("cnn_vit_tiny", cc.PixelLoader)):
        model = cc.create_model(name, num_classes=3)
        with kind(train, batch_size=4) as loader:
            for batch in loader:
                assert model(batch.latents).shape == (len(batch.rows), 3)
"""
    paths = [str(stored(way).path) for way in WAYS]
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, *paths], check=True)
