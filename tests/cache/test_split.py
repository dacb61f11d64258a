"""A split is a Python sequence of samples, and a cache a mapping of splits, wherever they go."""

from __future__ import annotations

import copy
import itertools
import json
import os
import pickle
import signal
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    Subset,
    SubsetRandomSampler,
)

import ci2p_cache as cc
from ci2p_cache import errors
from tests.support.caches import flip, make_cache
from tests.support.seals import write_json

COUNTS = {"train": {"ant": 12, "bee": 9}, "val": {"ant": 2, "bee": 3}}
BAD = {"train": (0, 7, 8, 20)}
"""The first row, a pair across the end of a shard, and the last row."""
WAYS: dict[str, dict[str, Any]] = {
    "zstd": {},
    "none": {"codec": "none"},
    "tars": {"format": "webdataset"},
    "float16": {"dtype": "float16"},
}
NUM_ROWS = 21


@pytest.fixture(scope="module", params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def root(way: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_cache(tmp_path_factory.mktemp("split") / way, COUNTS, bad=BAD, **WAYS[way])


@pytest.fixture
def train(root: Path) -> cc.Split:
    return cc.open_cache(root)["train"]


@pytest.fixture
def val(root: Path) -> cc.Split:
    return cc.open_cache(root)["val"]


@pytest.fixture(scope="module")
def one_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in one way only, where the way is not the point."""
    return make_cache(tmp_path_factory.mktemp("split") / "shards", COUNTS, bad=BAD)


def stacked(split: cc.Split, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows read one by one, by their plain number."""
    samples = [split[row] for row in rows]
    return torch.stack([y for y, _ in samples]), torch.tensor([label for _, label in samples])


class TestIteration:
    def test_a_loop_gives_every_valid_row_behind_those_that_hold_nothing(
        self, train: cc.Split
    ) -> None:
        found = list(train)
        wanted = [row for row in range(NUM_ROWS) if row not in BAD["train"]]
        assert train.valid_rows.tolist() == wanted
        assert len(found) == len(wanted)
        for (y, label), row in zip(found, wanted, strict=True):
            assert torch.equal(y, train[row][0])
            assert label == train.labels[row]

    def test_a_loop_backwards_gives_them_from_the_end(self, train: cc.Split) -> None:
        for one, other in zip(reversed(train), list(train)[::-1], strict=True):
            assert torch.equal(one[0], other[0])

    def test_two_loops_over_one_split_do_not_meet(self, train: cc.Split) -> None:
        pairs = list(itertools.product(itertools.islice(train, 2), itertools.islice(train, 3)))
        assert len(pairs) == 6

    def test_a_loop_over_a_subset_gives_its_rows(self, train: cc.Split) -> None:
        subset = train.subset([9, 2, -2])
        for (y, _), row in zip(subset, [2, 9, 19], strict=True):
            assert torch.equal(y, train[row][0])

    def test_a_split_of_which_nothing_could_be_decoded_gives_nothing(self, tmp_path: Path) -> None:
        root = make_cache(tmp_path / "c", {"train": {"ant": 3}}, bad={"train": (0, 1, 2)})
        split = cc.open_cache(root)["train"]
        assert (list(split), len(split)) == ([], 3)

    def test_damage_ends_a_loop_with_an_error(self, one_cache: Path, tmp_path: Path) -> None:
        root = make_cache(tmp_path / "c", COUNTS, bad=BAD)
        flip(root / "latents.zarr/train/latents/c.1.0.0.0.0", 0.3)
        with pytest.raises(errors.ShardError, match="shard 1"):
            list(cc.open_cache(root)["train"])

    def test_asking_whether_a_sample_is_in_a_split_does_not_read_all_of_it(
        self, train: cc.Split
    ) -> None:
        with pytest.raises(TypeError):
            _ = 3 in train  # type: ignore[operator]  # what it is about

    def test_a_row_that_holds_nothing_is_no_end_of_a_sequence(self, train: cc.Split) -> None:
        for rows in (0, [2, 7], slice(6, 10), torch.tensor([20]), -1):
            with pytest.raises(errors.InvalidRowError, match="holds no latent") as caught:
                _ = train[rows]
            assert isinstance(caught.value, (LookupError, errors.InputDataError))
            assert not isinstance(caught.value, IndexError)
            assert "valid_rows" in str(caught.value.hint)


INDEXES: dict[str, Any] = {
    "a slice": slice(1, 5),
    "a slice from the end": slice(-5, -1),
    "a slice backwards": slice(6, 1, -2),
    "an empty slice": slice(5, 2),
    "a slice beyond the end": slice(17, 20),
    "a list": [3, 1, 19],
    "a row twice": [3, 3],
    "negative rows": [-2, 1, -15],
    "one row in a list": [4],
    "an empty list": [],
    "a range": range(1, 7, 2),
    "an array": np.array([5, 2]),
    "bytes": np.array([5, 2], np.uint8),
    "small numbers": np.array([-2, 2], np.int8),
    "large numbers": np.array([9, 2], np.uint64),
    "an empty array": np.array([]),
    "a tensor": torch.tensor([5, -2]),
    "a tensor of int32": torch.tensor([1], dtype=torch.int32),
    "a list of numpy's numbers": [np.int64(3), np.int32(4)],
    "a mask": np.arange(NUM_ROWS) % 9 == 1,
    "a mask as tensor": torch.arange(NUM_ROWS) % 9 == 1,
    "a mask as list": [row in (2, 4) for row in range(NUM_ROWS)],
    "a mask of nothing": np.zeros(NUM_ROWS, bool),
}


class TestIndex:
    @pytest.mark.parametrize("kind", INDEXES)
    def test_many_rows_are_stacked_in_the_order_asked_for(self, train: cc.Split, kind: str) -> None:
        index = INDEXES[kind]
        y, labels = train[index]
        # numpy says which rows those are.
        numbers = np.arange(NUM_ROWS)
        if not isinstance(index, slice):
            index = np.asarray(index)
            index = index if index.size else index.astype(np.int64)
        rows = numbers[index].tolist()
        assert y.shape == (len(rows), *train.shape[1:])
        assert (y.dtype, labels.dtype, labels.shape) == (torch.float32, torch.int64, (len(rows),))
        if rows:
            wanted, wanted_labels = stacked(train, rows)
            assert torch.equal(y, wanted)
            assert torch.equal(labels, wanted_labels)

    @pytest.mark.parametrize(
        "row", [3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3), -18, torch.tensor(-18)]
    )
    def test_one_row_is_one_row_whatever_kind_of_number_names_it(
        self, train: cc.Split, row: Any
    ) -> None:
        y, label = train[row]
        assert y.shape == train.shape[1:]
        assert torch.equal(y, train[[3]][0][0])
        assert type(label) is int
        assert label == train.labels[3]

    def test_the_valid_rows_of_a_split_are_read_at_once(self, train: cc.Split) -> None:
        wanted, labels = stacked(train, train.valid_rows.tolist())
        for index in (train.valid, train.valid_rows, torch.from_numpy(train.valid)):
            y, found = train[index]
            assert torch.equal(y, wanted)
            assert torch.equal(found, labels)

    @pytest.mark.parametrize(
        "index",
        [21, -22, 2**70, -(2**70), np.int64(21), torch.tensor(21), [1, 21], [-22], range(19, 23),
         torch.tensor([-22]), np.array([300], np.uint16), np.array([2**63], np.uint64),
         np.ones(20, bool), [True, False], torch.ones(NUM_ROWS, 1, dtype=torch.bool),
         np.zeros(0, bool)],
    )  # fmt: skip
    def test_rows_that_are_not_there_are_an_index_error(self, train: cc.Split, index: Any) -> None:
        with pytest.raises(IndexError, match=r"row -?\d+ of 21 in split 'train'|a mask of shape"):
            _ = train[index]

    @pytest.mark.parametrize(
        "index",
        [1.0, "3", b"3", None, ..., (1, 2), (), [0.5], ["a"], np.zeros((2, 2), int), True,
         np.bool_(True), torch.tensor(True), torch.tensor(1.5), torch.tensor([1.0]), {1: 2}, {1},
         [[1], [2]], [None], [2**70]],
    )  # fmt: skip
    def test_what_names_no_rows_is_a_type_error(self, train: cc.Split, index: Any) -> None:
        with pytest.raises(TypeError):
            _ = train[index]

    def test_a_split_without_rows_takes_what_names_none(self, tmp_path: Path) -> None:
        root = make_cache(tmp_path / "c", {"train": {"ant": 2}}, bad={"train": (0, 1)})
        split = cc.open_cache(root)["train"]
        assert split[split.valid][0].shape == (0, *split.shape[1:])
        assert split[:0][1].tolist() == []

    def test_what_is_read_is_the_callers_own(self, train: cc.Split) -> None:
        y, labels = train[[2, 3]]
        before = y.clone()
        y += 1
        labels += 1
        assert torch.equal(train[[2, 3]][0], before)
        assert train[[2, 3]][1].tolist() == train.labels[2:4].tolist()

    def test_the_rows_that_loaders_go_by_cannot_be_shuffled_in_place(self, train: cc.Split) -> None:
        for split in (train, train.subset([2, 1, 5])):
            before = split.valid_rows.tolist()
            with pytest.raises(ValueError, match="read-only"):
                np.random.default_rng(0).shuffle(split.valid_rows)
            assert split.valid_rows.tolist() == before

    def test_a_subset_is_chosen_by_what_chooses_rows(self, train: cc.Split) -> None:
        mask = np.zeros(NUM_ROWS, bool)
        mask[[1, 2, 5]] = True
        for rows in ([5, 1, 2], mask, torch.tensor([1, 5, 2]), np.array([-20, 2, 5])):
            assert train.subset(rows).valid_rows.tolist() == [1, 2, 5]
        with pytest.raises(IndexError, match="row 21 of 21"):
            train.subset([21])
        with pytest.raises(TypeError):
            train.subset([0.5])  # type: ignore[list-item]  # what it is about

    def test_the_names_that_torchvision_has(self, train: cc.Split) -> None:
        assert train.classes == ("ant", "bee")
        assert train.targets == train.labels.tolist()
        assert isinstance(train.targets, list)
        assert len(train.targets) == len(train)


class TestMapping:
    def test_a_split_that_is_not_there_is_a_missing_key(self, one_cache: Path) -> None:
        cache = cc.open_cache(one_cache)
        assert cache.get("test") is None
        assert cache.get("test", 3) == 3
        assert cache.get("train") is cache["train"]
        assert "test" not in cache
        for kind in (KeyError, errors.UsageError, errors.UnknownSplitError, ValueError):
            with pytest.raises(kind):
                _ = cache["test"]
        with pytest.raises(errors.UnknownSplitError) as caught:
            _ = cache["test"]
        assert str(caught.value).endswith("has no split 'test'; it has ['train', 'val']")
        assert caught.value.exit_code == 2
        assert list(cache.items()) == list(zip(cache.keys(), cache.values(), strict=True))

    def test_a_cache_can_be_a_key_and_equals_what_holds_the_same_splits(
        self, one_cache: Path
    ) -> None:
        cache, other = cc.open_cache(one_cache), cc.open_cache(one_cache)
        assert {cache: 1, other: 2}[cache] == 1
        assert cache == dict(cache)
        assert cache != other
        assert {cache["train"]: 1}[cache["train"]] == 1
        assert bool(cache)

    def test_they_are_shown_in_one_short_line(self, one_cache: Path) -> None:
        cache = cc.open_cache(one_cache)
        split = cache["train"]
        told = repr(split)
        assert told == (
            f"Split('train' of {str(one_cache)!r}, rows=21, valid_rows=17, shape=(2, 4, 4, 4), "
            "dtype=int8)"
        )
        assert "valid_rows=2," in repr(split.subset([1, 2]))
        assert len(repr(cache)) < 100 + len(str(one_cache))


def same(one: cc.Split, other: cc.Split) -> bool:
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a, b) and x == y for (a, x), (b, y) in pairs)


class TestPickle:
    @pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
    def test_a_split_goes_as_its_place_not_as_what_was_read(
        self, train: cc.Split, protocol: int
    ) -> None:
        list(train), train.labels, train.targets, train[1:5]
        data = pickle.dumps(train, protocol)
        assert len(data) < 1000 + len(str(train.cache.path))
        found = pickle.loads(data)
        assert same(found, train)
        assert (found.name, found.cache.path) == ("train", train.cache.path)

    def test_a_cache_and_its_splits_stay_together(self, one_cache: Path) -> None:
        cache = cc.open_cache(one_cache)
        found, split, other = pickle.loads(pickle.dumps((cache, cache["val"], cache["train"])))
        assert found["val"] is split
        assert found["train"] is other
        assert split.cache is found
        assert found.classes == cache.classes

    def test_a_subset_stays_one_in_a_bit_per_row(self, train: cc.Split) -> None:
        subset = train.subset([3, 11, 19])
        data = pickle.dumps(subset)
        assert len(data) < len(pickle.dumps(train)) + 50
        found = pickle.loads(data)
        assert found.valid_rows.tolist() == [3, 11, 19]
        assert same(found, subset)
        with pytest.raises(errors.InvalidRowError):
            _ = found[4]

    def test_copies_read_the_same(self, train: cc.Split) -> None:
        subset = train.subset([3, 11])
        for made in (copy.deepcopy, copy.copy):
            assert same(made(train), train)
            assert same(made(subset), subset)
            assert list(made(cc.open_cache(train.cache.path))) == ["train", "val"]
        assert copy.deepcopy({"train": train})["train"] is not train

    def test_a_relative_path_is_found_from_another_folder(
        self, one_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(one_cache.parent)
        split = cc.open_cache(one_cache.name)["train"]
        data = pickle.dumps(split)
        monkeypatch.chdir(tmp_path)
        assert same(pickle.loads(data), cc.open_cache(one_cache)["train"])

    def test_another_cache_in_its_place_is_refused(self, tmp_path: Path) -> None:
        root = make_cache(tmp_path / "c", COUNTS)
        data = pickle.dumps(cc.open_cache(root)["train"])
        root.rename(tmp_path / "old")
        with pytest.raises(errors.NotACacheError):
            pickle.loads(data)
        make_cache(root, {"train": {"ant": 9, "bee": 12}})
        with pytest.raises(errors.RefusedError, match="another cache than the one"):
            pickle.loads(data)

    def test_a_cache_that_is_still_encoded_goes_too_with_what_is_committed(
        self, tmp_path: Path
    ) -> None:
        root = make_cache(tmp_path / "c", COUNTS, bad={"train": (1,)})
        whole = list(cc.open_cache(root)["train"])
        data = json.loads((root / "cache.json").read_text())
        write_json(root / "cache.json", data | {"state": "encoding", "files": []})
        (root / "commits/train-000001.json").unlink()
        cache = cc.open_cache(root, partial=True)
        for split in (cache["train"], pickle.loads(pickle.dumps(cache))["train"]):
            assert split.valid_rows.tolist() == [0, *range(2, 8), *range(16, 21)]
            assert split.targets[8:16] == [-1] * 8
            found = list(split)
            for (y, label), (wanted, same_label) in zip(
                found, [*whole[:7], *whole[15:]], strict=True
            ):
                assert torch.equal(y, wanted)
                assert label == same_label
            with pytest.raises(errors.InvalidRowError, match="is not encoded yet"):
                _ = split[9]

    @pytest.mark.parametrize("kind", [errors.UsageError, errors.InvalidRowError])
    def test_errors_come_out_of_another_process_as_they_were(
        self, kind: Callable[..., Any]
    ) -> None:
        found = pickle.loads(pickle.dumps(kind("told", hint="do")))
        assert (type(found), str(found), found.hint) == (kind, "told", "do")

    def test_an_interruption_keeps_its_code(self) -> None:
        error = errors.InterruptedRunError("told", signal_number=15, hint="do")
        for found in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
            assert (str(found), found.exit_code, found.hint) == ("told", 143, "do")


def row_of(sample: tuple[torch.Tensor, int]) -> bytes:
    return sample[0].numpy().tobytes()


class TestDataLoader:
    @pytest.mark.parametrize(
        "start",
        [None, "fork", pytest.param("spawn", marks=pytest.mark.slow),
         pytest.param("forkserver", marks=pytest.mark.slow)],
    )  # fmt: skip
    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
    def test_workers_of_every_kind_give_the_same_rows(
        self, one_cache: Path, start: str | None
    ) -> None:
        split = cc.open_cache(one_cache)["train"]
        # Opened and read before: its files and locks are there when a worker is forked.
        wanted, labels = split[split.valid]
        loader = DataLoader(
            split,
            batch_size=5,
            sampler=split.valid_rows.tolist(),
            num_workers={None: 0, "fork": 2}.get(start, 1),
            multiprocessing_context=start,
        )
        batches = list(loader)
        assert torch.equal(torch.cat([y for y, _ in batches]), wanted)
        assert torch.equal(torch.cat([found for _, found in batches]), labels)

    def test_a_batch_is_fetched_in_one_call_and_holds_what_rows_hold(self, train: cc.Split) -> None:
        rows = [19, 3, 3, 12]
        for (y, label), row in zip(train.__getitems__(rows), rows, strict=True):
            assert torch.equal(y, train[row][0])
            assert (label, type(label)) == (train.labels[row], int)

    def test_torchs_own_samplers_and_subsets_work(self, val: cc.Split, train: cc.Split) -> None:
        wanted = {row_of(sample) for sample in val}
        for loader in (
            DataLoader(val, shuffle=True, batch_size=2),
            DataLoader(val, batch_size=None),
            DataLoader(
                val,
                batch_sampler=BatchSampler(range(len(val)), 2, drop_last=False),
            ),
        ):
            found = [y for y, _ in loader]
            rows = found if found[0].ndim == 4 else [y for batch in found for y in batch]
            assert {y.numpy().tobytes() for y in rows} == wanted
        sampler = SubsetRandomSampler(train.valid_rows.tolist())
        loader = DataLoader(train, sampler=sampler, batch_size=4)
        assert sum(len(y) for y, _ in loader) == 17
        subset = Subset(train, train.valid_rows.tolist())
        assert sum(len(y) for y, _ in DataLoader(subset, batch_size=4)) == 17
        assert row_of((val + train)[len(val) + 3]) == row_of(train[3])

    @pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
    def test_a_row_that_holds_nothing_is_named_by_the_worker(self, one_cache: Path) -> None:
        split = cc.open_cache(one_cache)["train"]
        loader = DataLoader(split, num_workers=1, multiprocessing_context="fork")
        with pytest.raises(errors.InvalidRowError, match="row 0 of split 'train' holds no latent"):
            list(loader)

    @pytest.mark.slow
    @pytest.mark.parametrize("codec", ["zstd", "none"])
    def test_a_fork_while_a_thread_opens_a_shard_does_not_wait_for_that_thread(
        self, tmp_path: Path, codec: Any
    ) -> None:
        split = cc.open_cache(make_cache(tmp_path / "c", COUNTS, codec=codec))["train"]
        opening, go_on = threading.Event(), threading.Event()
        main = os.getpid()
        name = "_open_zarr"
        opened = getattr(cc.Split, name)

        def slow(self: cc.Split, shard: int) -> Any:
            if os.getpid() == main:
                opening.set()
                go_on.wait(30)
            return opened(self, shard)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cc.Split, name, slow)
            reader = threading.Thread(target=lambda: split[[0, 1]])
            reader.start()
            assert opening.wait(30)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if not child:
                code = 1
                try:
                    signal.alarm(20)
                    # Another shard than the thread's, and the thread's own.
                    code = len(split[[9, 1]][0]) != 2
                finally:
                    os._exit(code)
            ended = os.waitpid(child, 0)[1]
            go_on.set()
            reader.join(30)
        assert ended == 0


class TestAsDataset:
    def test_item_i_is_one_view_of_valid_row_i(self, train: cc.Split, val: cc.Split) -> None:
        for split, view in ((train, 0), (train, 1), (val, 0)):
            dataset = split.as_dataset(view)
            assert len(dataset) == len(split.valid_rows)
            assert dataset.targets == split.labels[split.valid_rows].tolist()
            for (latent, label), row in zip(dataset, split.valid_rows, strict=True):
                assert torch.equal(latent, split[row][0][view])
                assert (label, type(label)) == (split.labels[row], int)
            assert torch.equal(dataset[-1][0], split[split.valid_rows[-1]][0][view])
            with pytest.raises(IndexError):
                dataset[len(dataset)]

    def test_random_draws_every_view_by_torchs_generator(self, train: cc.Split) -> None:
        dataset = train.as_dataset("random")

        def epoch(seed: int) -> list[torch.Tensor]:
            torch.manual_seed(seed)
            return [latent for latent, _ in DataLoader(dataset, batch_size=None)]

        first, again, other = epoch(0), epoch(0), epoch(1)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
        views = [
            [torch.equal(latent, view) for view in train[row][0]].index(True)
            for latent, row in zip(first, train.valid_rows, strict=True)
        ]
        assert set(views) == {0, 1}

    def test_transforms_see_latents_also_in_workers_and_for_subsets(self, train: cc.Split) -> None:
        rows = train.valid_rows[3:9]
        dataset = train.subset(rows).as_dataset(transform=torch.abs)
        for start in (None, "fork"):
            again = pickle.loads(pickle.dumps(dataset))
            loader = DataLoader(
                again, 4, num_workers=start is not None, multiprocessing_context=start
            )
            latents, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
            assert torch.equal(latents, train[rows][0][:, 0].abs())
            assert torch.equal(labels, train[rows][1])

    @pytest.mark.parametrize("view", [2, -1, True, "all"])
    def test_a_view_that_is_not_there_is_refused(self, train: cc.Split, view: Any) -> None:
        with pytest.raises(errors.UsageError, match="has views 0 to 1, or 'random'"):
            train.as_dataset(view)

    def test_distributed_samplers_share_the_rows_out(self, train: cc.Split) -> None:
        dataset = train.as_dataset()
        taken = []
        for rank in range(2):
            sampler: DistributedSampler[Any] = DistributedSampler(
                dataset, num_replicas=2, rank=rank, drop_last=True
            )
            latents, _ = (
                torch.cat(parts)
                for parts in zip(*DataLoader(dataset, 3, sampler=sampler), strict=True)
            )
            assert torch.equal(latents, train[train.valid_rows[list(sampler)]][0][:, 0])
            taken += list(sampler)
        assert len(set(taken)) == len(taken) == len(dataset) // 2 * 2

    @pytest.mark.parametrize("is_prefetched", [True, False])
    def test_timms_loader_for_images_is_refused(
        self, train: cc.Split, *, is_prefetched: bool
    ) -> None:
        # It would round the latents to uint8, or resize them.
        from timm.data.loader import create_loader

        dataset = train.as_dataset(transform=torch.abs)
        with pytest.raises(errors.UsageError, match="`transform` cannot be replaced"):
            create_loader(
                cast(Any, dataset), input_size=train.latent.shape, batch_size=2, num_workers=0,
                use_prefetcher=is_prefetched, device=torch.device("cpu"),
            )  # fmt: skip
        assert dataset.transform is torch.abs
