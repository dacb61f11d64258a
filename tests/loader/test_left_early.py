"""What a loader's loop leaves behind: its place, its threads, and batches that outlive it."""

from __future__ import annotations

import copy
import gc
import itertools
import pickle
import pydoc
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.loader.batches import BatchLoader
from tests.support.caches import make_cache
from tests.support.pictures import write_image_folder


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> cc.Split:
    root = make_cache(
        tmp_path_factory.mktemp("early") / "c",
        {"train": {"ant": 12, "bee": 8}},
        bad={"train": (3,)},
    )
    return cc.open_cache(root)["train"]


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> cc.Split:
    root = make_cache(
        tmp_path_factory.mktemp("early") / "c", {"train": {"ant": 12, "bee": 8}},
        bad={"train": (3,)}, codec="none",
    )  # fmt: skip
    return cc.open_cache(root)["train"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> cc.Split:
    root = tmp_path_factory.mktemp("pictures")
    source = write_image_folder(root / "src", {"ant": 6, "bee": 4})
    options = cc.EncodeOptions(encoder="bundled", size=32, val_fraction=0.0)
    cc.encode(source, root / "out", options)
    return cc.open_cache(root / "out")["train"]


@pytest.fixture(params=[cc.LatentLoader, cc.ResidentLoader, "raw", cc.PixelLoader, cc.OnlineLoader])
def loader(request: pytest.FixtureRequest) -> Iterator[BatchLoader]:
    """A loader of each kind, of at least four batches."""
    kind = cc.LatentLoader if request.param == "raw" else request.param
    name = {"raw": "raw", cc.PixelLoader: "pictures", cc.OnlineLoader: "pictures"}
    data: cc.Split = request.getfixturevalue(name.get(request.param, "split"))
    size = 3 if "pictures" in name.get(request.param, "") else 5
    with kind(data, batch_size=size, seed=4) as made:
        yield made


def rows(loader: BatchLoader, count: int | None = None) -> list[list[int]]:
    return [batch.rows.tolist() for batch in itertools.islice(loader, count)]


def test_a_loop_that_was_left_starts_over(loader: BatchLoader) -> None:
    whole = rows(loader)
    second = rows(loader)
    assert (loader.epoch, whole != second) == (2, True)
    loader.set_epoch(0)
    for count in (1, 2, len(loader) - 1):
        assert rows(loader, count) == whole[:count]
        assert loader.state_dict() == {"seed": 4, "epoch": 0, "step": count}
    assert rows(loader) == whole
    assert rows(loader, 1) == second[:1]


def test_a_loop_that_an_error_ended_starts_over(loader: BatchLoader) -> None:
    first: list[list[int]] = []
    with pytest.raises(ZeroDivisionError):
        for batch in loader:
            first.append(batch.rows.tolist())
            if len(first) == 2:
                _ = 1 / 0
    assert rows(loader)[:2] == first


def test_a_loaded_state_goes_on_once(loader: BatchLoader) -> None:
    whole, second = rows(loader), rows(loader)
    loader.set_epoch(0)
    rows(loader, 2)
    state = loader.state_dict()
    loader.load_state_dict(state)
    assert loader.state_dict() == state
    assert rows(loader, 1) == whole[2:3]
    assert rows(loader) == whole
    loader.load_state_dict(state)
    assert rows(loader) == whole[2:]
    assert rows(loader) == second


def test_a_chosen_epoch_wins_over_an_earlier_state(loader: BatchLoader) -> None:
    whole = rows(loader)
    loader.load_state_dict({"seed": 4, "epoch": 0, "step": 2})
    loader.set_epoch(0)
    assert rows(loader) == whole


def test_a_loop_left_behind_its_last_batch_has_done_its_epoch(loader: BatchLoader) -> None:
    whole, second = rows(loader), rows(loader)
    loader.set_epoch(0)
    for _ in range(2):
        found = [batch.rows.tolist() for _, batch in zip(range(len(loader)), loader, strict=False)]
        assert found in (whole, second)
    assert found == second


def test_loops_in_one_another_do_not_disturb_each_other(loader: BatchLoader) -> None:
    whole = rows(loader)
    loader.set_epoch(0)
    outer = iter(loader)
    first = next(outer).rows.tolist()
    inner = iter(loader)
    assert next(inner).rows.tolist() == first
    # What the inner loop has in flight is cancelled; the outer one still waits for its own.
    del inner
    gc.collect()
    assert [first, *(batch.rows.tolist() for batch in outer)] == whole
    assert loader.state_dict() == {"seed": 4, "epoch": 1, "step": 0}


def test_a_closed_loader_says_so(loader: BatchLoader) -> None:
    begun = iter(loader)
    next(begun)
    loader.close()
    loader.close()
    for use in (lambda: next(begun), lambda: next(iter(loader)), loader.__enter__):
        with pytest.raises(errors.UsageError, match=r"Loader of split 'train' is closed") as caught:
            use()
        assert "make a new loader" in str(caught.value.hint)
    assert len(loader) >= 4


@pytest.mark.parametrize("recycle", [False, True])
def test_a_copy_of_a_batch_outlives_the_loader(split: cc.Split, recycle: bool) -> None:
    with cc.LatentLoader(split, batch_size=5, recycle=recycle) as loader:
        kept = [(copy.deepcopy(batch), pickle.dumps(batch)) for batch in loader]
    with cc.LatentLoader(split, batch_size=5) as loader:
        for (copied, data), batch in zip(kept, loader, strict=True):
            for found in (copied, pickle.loads(data)):
                for name in ("stored", "labels", "rows", "global_rows", "latents"):
                    assert torch.equal(getattr(found, name), getattr(batch, name)), name


def test_batches_are_told_apart_and_shown_in_one_short_line(split: cc.Split) -> None:
    with cc.LatentLoader(split, batch_size=5, shuffle=False) as loader:
        one, other = itertools.islice(loader, 2)
        assert repr(loader).startswith("LatentLoader(Split('train' of ")
        assert repr(loader).endswith("batch_size=5, seed=0, device=cpu, epoch=0, step=2 of 4)")
    assert one != other
    assert len({one, other}) == 2
    assert repr(one) == "Batch(stored=int8 (5, 4, 4, 4) on cpu, rows=[0, 1, 2, 4, ... 5])"


@pytest.mark.parametrize(
    "kind", [cc.LatentLoader, cc.ResidentLoader, cc.PixelLoader, cc.OnlineLoader]
)
def test_help_says_what_a_loader_takes(kind: type[BatchLoader]) -> None:
    told = pydoc.plain(pydoc.render_doc(kind))
    for name in ("split", "batch_size", "seed", "shuffle", "drop_last", "rank", "world_size"):
        assert re.search(rf"^ \|\s+{name}: \w", told, re.MULTILINE), name


def test_the_bench_reads_on_where_it_left(tmp_path: Path) -> None:
    from ci2p_cache.bench import _loader_rate

    root = make_cache(tmp_path / "c", {"train": {"ant": 12, "bee": 8}})
    with cc.LatentLoader(cc.open_cache(root)["train"], batch_size=5) as loader:
        for step in range(1, 5):
            _loader_rate(loader, floats=False, seconds=0)
            assert loader.state_dict()["step"] == step
