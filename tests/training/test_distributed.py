"""Several ranks train as one: the same batches, the same numbers, one voice, one end."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import signal
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.loader.order import epoch_order, rank_slice
from ci2p_cache.training import ranks
from tests.support.caches import make_cache
from tests.support.fresh import fresh_model, statistics_of
from tests.support.pictures import write_image_folder
from tests.support.rank_jobs import (
    CLOCK,
    IMAGE_MODEL,
    do,
    job,
    launch,
    numbers,
    processes_with,
    rank_of,
    run_jobs,
)
from tests.support.tiers import thinned
from tests.support.warm import Child, WarmParent

SPEC = cc.TrainSpec(model="vitds_nano", epochs=2, batch_size=6)
EXACT = dataclasses.replace(SPEC, drop_path=0.0, eps=1e-4)
"""For comparisons between numbers of ranks. The bias of attention's keys has no gradient but
rounding, which Adam's usual eps of 1e-8 would blow up to steps of the full learning rate."""
TOOLS = dataclasses.replace(
    SPEC, mixup=0.8, cutmix=1.0, latent_flip=0.3, ema=0.9, layer_decay=0.8, accumulate=2
)
"""Everything that is off by default."""
IMAGES = dataclasses.replace(EXACT, model=IMAGE_MODEL, epochs=1)
TRAIN, VAL = 25, 9
"""Images: batches of 6 leave a last one of a single image, and 3 of validation."""


pytestmark = pytest.mark.usefixtures("one_thread", "nano")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a cache of 25 training and 9 validation latents, tars of it, and pictures."""
    root = tmp_path_factory.mktemp("distributed")
    train, val = {"ant": 9, "bee": 7, "cat": 9}, {"ant": 3, "bee": 2, "cat": 4}
    make_cache(root / "cache", {"train": train, "val": val})
    cc.convert(root / "cache", root / "tars", format="webdataset")
    write_image_folder(root / "src" / "train", train)
    write_image_folder(root / "src" / "val", val, quality=60)
    options = cc.EncodeOptions(encoder="bundled", size=64, shard_samples=8)
    cc.encode(root / "src", root / "pictures", options)
    return root


ONE_STEP = dataclasses.replace(EXACT, epochs=1, batch_size=TRAIN)


@pytest.fixture(scope="module")
def two(warm: WarmParent, folder: Path) -> dict[str, list[Any]]:
    """What two ranks did."""
    jobs = [
        job("exact-2", EXACT),
        job("tars", EXACT, cache="tars"),
        job("one-step", ONE_STEP),
        job("images-2", IMAGES, cache="pictures"),
        job("nan", SPEC, events={"epoch 0 step 2 rank 1": "poison"}),
        job("uninterrupted", SPEC),
        job("stopped", SPEC, events={"epoch 0 step 3 rank 1": "stop"}),
        job("went on", SPEC, run="stopped"),
        job("damaged", SPEC, events={"epoch 1 step 1 rank 1": "damage"}),
        job("bug", SPEC, events={"epoch 0 step 1 rank 1": "bug"}),
        job("moved", EXACT, events={"epoch 0 step 2 rank 0": "stop"}),
        job("tools", TOOLS),
        job("tools stopped", TOOLS, run="tools-2", events={"epoch 0 step 4 rank 0": "stop"}),
        job("tools went on", TOOLS, run="tools-2"),
    ]
    return run_jobs(warm, folder, 2, jobs)


@pytest.fixture(scope="module")
def four(warm: WarmParent, folder: Path, two: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """What four ranks did after the two; one of them never has an image."""
    jobs = [job("exact-4", EXACT), job("moved", EXACT, events={"epoch 1 step 1 rank 3": "stop"})]
    return run_jobs(warm, folder, 4, jobs)


def sequence(spec: cc.TrainSpec) -> list[list[int]]:
    """The global batches of a run, from the pure function."""
    found = []
    for epoch in range(spec.epochs):
        rows = epoch_order(np.arange(TRAIN), seed=spec.seed, epoch=epoch).tolist()
        found += [rows[i : i + spec.batch_size] for i in range(0, TRAIN, spec.batch_size)]
    return found


def batches(seen: list[Any]) -> list[list[int]]:
    """The global batches that the ranks took together, after checking that they agree on them."""
    found = []
    for slices in zip(*(rank["rows"] for rank in seen), strict=True):
        whole = [row for own, _ in slices for row in own]
        assert [all_rows for _, all_rows in slices] == [whole] * len(slices)
        found.append(whole)
    return found


def weights(run: Path) -> dict[str, torch.Tensor]:
    """The last weights without BatchNorm's statistics."""
    last = run / "checkpoints" / json.loads((run / "checkpoints/last.json").read_text())["last"]
    tensors = load_file(last / "model.safetensors")
    return {k: v for k, v in tensors.items() if ".running_" not in k and v.ndim}


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("batch_size", [1, 2, 5, 6, 12, 24, 64])
def test_any_number_of_ranks_and_threads_takes_the_same_sequence_each_sample_once(
    folder: Path, batch_size: int, threads: int
) -> None:
    split = cc.open_cache(folder / "cache")["train"]
    with cc.LatentLoader(split, batch_size=batch_size, seed=3) as alone:
        wanted = [(b.rows.tolist(), b.labels.tolist(), b.latents) for b in alone]
    assert sorted(row for rows, _, _ in wanted for row in rows) == list(range(TRAIN))
    for world_size in (1, 2, 3, 4):
        ranks = []
        for rank in range(world_size):
            with cc.LatentLoader(
                split,
                batch_size=batch_size,
                seed=3,
                threads=threads,
                rank=rank,
                world_size=world_size,
            ) as loader:
                assert (len(loader), loader.num_samples) == (len(wanted), TRAIN)
                ranks.append(list(loader))
        for (rows, labels, latents), slices in zip(wanted, zip(*ranks, strict=True), strict=True):
            assert [row for own in slices for row in own.rows.tolist()] == rows
            assert [label for own in slices for label in own.labels.tolist()] == labels
            assert torch.equal(torch.cat([own.latents for own in slices]), latents)
            assert all(own.global_rows.tolist() == rows for own in slices)


def test_slices_are_those_of_torch_chunk() -> None:
    for count in range(1, 30):
        for parts in range(1, 9):
            cut = [rank_slice(count, rank=i, world_size=parts) for i in range(parts)]
            ours = [list(range(count))[part] for part in cut]
            wanted = [part.tolist() for part in torch.arange(count).chunk(parts)]
            assert [part for part in ours if part] == wanted


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_give_the_numbers_of_as_many_accumulated_parts(
    folder: Path, world_size: int, request: pytest.FixtureRequest
) -> None:
    seen = request.getfixturevalue({2: "two", 4: "four"}[world_size])[f"exact-{world_size}"]
    assert batches(seen) == sequence(EXACT)
    first = seen[0]["summary"]
    assert all(
        rank["summary"]["last"]["train_loss"] == first["last"]["train_loss"] for rank in seen
    )
    name = f"alone-{world_size}"
    spec = dataclasses.replace(EXACT, accumulate=world_size)
    alone = do(job(name, spec), folder)
    assert first["last"]["train_loss"] == pytest.approx(
        alone["summary"]["last"]["train_loss"], abs=1e-5
    )
    assert first["last"]["train_top1"] == alone["summary"]["last"]["train_top1"]
    assert first["last"]["images"] == TRAIN
    ours, theirs = weights(Path(first["path"])), weights(folder / "runs" / name)
    worst = max(float((ours[name] - value).abs().max()) for name, value in theirs.items())
    assert worst < 1e-5


def test_ranks_read_images_as_one(two: dict[str, list[Any]], folder: Path) -> None:
    first, second = (rank["summary"]["last"] for rank in two["images-2"])
    assert {**first, **dict.fromkeys(CLOCK)} == {**second, **dict.fromkeys(CLOCK)}
    alone = do(
        job("images-alone", dataclasses.replace(IMAGES, accumulate=2), cache="pictures"), folder
    )
    wanted = alone["summary"]["last"]
    assert first["images"] == wanted["images"] == TRAIN
    assert first["train_loss"] == pytest.approx(wanted["train_loss"], abs=1e-5)
    assert first["val_loss"] == pytest.approx(wanted["val_loss"], abs=1e-4)
    assert (first["train_top1"], first["val_top1"]) == (wanted["train_top1"], wanted["val_top1"])


def test_tars_give_ranks_the_batches_and_losses_of_zarr_shards(
    two: dict[str, list[Any]], folder: Path
) -> None:
    assert [rank["rows"] for rank in two["tars"]] == [rank["rows"] for rank in two["exact-2"]]
    runs = [Path(two[name][0]["summary"]["path"]) for name in ("tars", "exact-2")]
    assert numbers(runs[0]) == numbers(runs[1])


STATISTICS = {
    # Two batches for each rank, also of averages; one rank has the only batch.
    "two": {"tools": TOOLS, "exact-2": EXACT, "one-step": ONE_STEP},
    # One batch for each rank.
    "four": {"exact-4": EXACT},
}


@pytest.mark.parametrize("ranks_run", thinned(STATISTICS))
def test_checkpoints_hold_the_statistics_of_one_process(
    folder: Path, ranks_run: str, request: pytest.FixtureRequest
) -> None:
    cache = cc.open_cache(folder / "cache")
    seen = request.getfixturevalue(ranks_run)
    for name, spec in STATISTICS[ranks_run].items():
        last = Path(seen[name][0]["summary"]["last_checkpoint"])
        for file in set(last.glob("*.safetensors")) - {last / "optimizer.safetensors"}:
            saved = load_file(file)
            model = fresh_model(cache, spec, saved)
            wanted = statistics_of(model.state_dict())
            assert len(wanted) > 4
            torch.testing.assert_close(statistics_of(saved), wanted, rtol=1e-5, atol=1e-6)


def test_evaluation_by_ranks_counts_each_image_once(
    folder: Path, two: dict[str, list[Any]]
) -> None:
    cache = cc.open_cache(folder / "cache")
    last = Path(two["one-step"][0]["summary"]["last_checkpoint"])
    model = fresh_model(cache, ONE_STEP, load_file(last / "model.safetensors"))
    val = cache["val"]
    with torch.inference_mode():
        logits = model(torch.stack([val[row][0][0] for row in range(VAL)]))
    labels = torch.from_numpy(val.labels.astype(np.int64))
    loss = torch.nn.functional.cross_entropy(logits, labels).item()
    for rank in two["one-step"]:
        assert rank["summary"]["last"]["val_loss"] == pytest.approx(loss, rel=1e-5)
        hits = rank["summary"]["last"]["val_top1"] * VAL
        assert hits == (logits.argmax(1) == labels).sum().item()


def test_a_bad_slice_on_one_rank_is_a_step_that_no_rank_takes(two: dict[str, list[Any]]) -> None:
    for rank in two["nan"]:
        assert np.isfinite(rank["summary"]["last"]["train_loss"])
        assert np.isfinite(rank["summary"]["last"]["val_loss"])
    (notice,) = two["nan"][0]["notices"]
    assert "step 2 of epoch 1 was skipped" in notice
    assert f"rows {sequence(SPEC)[2]} of" in notice
    assert two["nan"][1]["notices"] == []
    with (Path(two["nan"][0]["summary"]["path"]) / "summary.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["skipped_steps"], row["images"]) for row in rows] == [("1", "19"), ("0", "25")]


def test_a_signal_to_one_rank_stops_all_at_one_step_and_the_run_goes_on_to_the_same_bits(
    folder: Path, two: dict[str, list[Any]]
) -> None:
    for rank in two["stopped"]:
        assert rank["error"]["type"] == "InterruptedRunError"
        assert rank["error"]["code"] == 143
        assert "0 of 2 epochs and 4 steps" in rank["error"]["text"]
    (plan,) = two["went on"][0]["plans"]
    assert (plan["epochs_done"], plan["steps_done"], plan["device"]) == (0, 4, "2 x cpu")
    assert two["went on"][1]["plans"] == []
    assert numbers(folder / "runs" / "stopped") == numbers(folder / "runs" / "uninterrupted")
    assert batches(two["stopped"])[:4] + batches(two["went on"]) == sequence(SPEC)


def test_ranks_mix_and_average_as_one_and_go_on_to_the_same_bits(
    folder: Path, two: dict[str, list[Any]]
) -> None:
    assert batches(two["tools"]) == sequence(TOOLS)
    first, second = (rank["summary"]["last"] for rank in two["tools"])
    assert {**first, **dict.fromkeys(CLOCK)} == {**second, **dict.fromkeys(CLOCK)}
    assert "0 of 2 epochs and 5 steps" in two["tools stopped"][1]["error"]["text"]
    whole, stopped = (numbers(folder / "runs" / name) for name in ("tools", "tools-2"))
    assert stopped == whole
    assert whole[1]["ema.safetensors"] != whole[1]["model.safetensors"]


def test_what_one_rank_raises_all_raise_and_the_last_checkpoint_stands(
    folder: Path, two: dict[str, list[Any]]
) -> None:
    first, second = (rank["error"] for rank in two["damaged"])
    assert first == second | {"text": "on rank 1: shard 7 is damaged"}
    assert second == {"type": "ShardError", "text": "shard 7 is damaged", "code": 5}
    last = json.loads((folder / "runs/damaged/checkpoints/last.json").read_text())["last"]
    assert last == "epoch-0001-step-000000"
    first, second = (rank["error"] for rank in two["bug"])
    assert first == {"type": "CacheError", "text": "on rank 1: ZeroDivisionError: a bug", "code": 1}
    assert second == {"type": "ZeroDivisionError", "text": "a bug", "code": None}


@pytest.mark.slow
def test_another_number_of_ranks_goes_on_in_the_same_sequence(
    folder: Path, two: dict[str, list[Any]], four: dict[str, list[Any]]
) -> None:
    assert "0 of 2 epochs and 3 steps" in two["moved"][1]["error"]["text"]
    assert "1 of 2 epochs and 2 steps" in four["moved"][0]["error"]["text"]
    assert "2 x cpu -> 4 x cpu" in four["moved"][0]["notices"][0]
    alone = do(job("moved", EXACT), folder)
    taken = [*batches(two["moved"])[:3], *batches(four["moved"])[:4], *batches([alone])]
    assert taken == sequence(EXACT)
    whole = two["exact-2"][0]["summary"]["last"]["train_loss"]
    # Near, not equal: BatchNorm normalises by the slices, of which there are 2, 4 and then 1.
    assert alone["summary"]["last"]["train_loss"] == pytest.approx(whole, abs=0.15)


def train_command(folder: Path, name: str, **options: object) -> list[object]:
    fields: dict[str, object] = {
        "model": SPEC.model, "epochs": SPEC.epochs, "batch-size": SPEC.batch_size,
        "runs": folder / "runs", "name": name, "device": "cpu", "save-every": 1,
    }  # fmt: skip
    flags = [text for key, value in (fields | options).items() for text in (f"--{key}", value)]
    return ["train", folder / "cache", *flags]


def until_epoch_1(rank: Child) -> None:
    """Waits until a rank has validated its first epoch."""
    while not re.search(r"epoch +1/", rank.told()):
        assert rank.poll() is None, rank.told()
        time.sleep(0.002)


def test_a_killed_rank_ends_all_and_the_same_command_goes_on_to_the_same_bits(
    warm: WarmParent, folder: Path, two: dict[str, list[Any]]
) -> None:
    command = train_command(folder, "killed")
    first, second = warm.ranks(2, *command)
    until_epoch_1(first)
    second.send_signal(signal.SIGKILL)
    told = first.wait()
    assert first.returncode == errors.ResourceError.exit_code
    assert told.count("error: another rank of this run was killed") == 1

    again = warm.ranks(2, *command)
    told, silent = (rank.wait() for rank in again)
    assert [rank.returncode for rank in again] == [0, 0], told
    assert told.count("continuing after") == 1
    assert told.count("epoch 2/2") == 1
    assert "damaged" not in told
    assert silent == ""
    assert numbers(folder / "runs" / "killed") == numbers(folder / "runs" / "uninterrupted")
    assert not (folder / "runs" / "killed" / ".staging").exists()
    encoder = (folder / "cache" / "encoder.safetensors").read_bytes()
    assert (folder / "runs" / "killed" / "encoder.safetensors").read_bytes() == encoder


def test_ctrl_c_ends_all_ranks_with_one_checkpoint_and_one_word(
    warm: WarmParent, folder: Path
) -> None:
    ranks = warm.ranks(2, *train_command(folder, "ctrl-c", epochs=99))
    until_epoch_1(ranks[0])
    for rank in ranks:
        rank.send_signal(signal.SIGINT)
    told = "".join(rank.wait() for rank in ranks)
    assert [rank.returncode for rank in ranks] == [130, 130], told
    assert_stopped_once(told, folder / "runs" / "ctrl-c")


def assert_stopped_once(told: str, run: Path) -> None:
    """One error among all ranks, and the checkpoint that it speaks of is the last."""
    assert told.count("error:") == told.count("all of it is saved in") == 1
    assert "try:   run the same command again" in told
    found = re.findall(r"after (\d+) of \d+ epochs and (\d+) steps", told)
    epochs, steps = (int(text) for text in found[0])
    last = json.loads((run / "checkpoints/last.json").read_text())["last"]
    assert last == f"epoch-{epochs:04d}-step-{steps:06d}"


def test_a_refusal_ends_all_ranks_and_is_told_once(
    warm: WarmParent, folder: Path, two: dict[str, list[Any]]
) -> None:
    ranks = warm.ranks(2, *train_command(folder, "uninterrupted"))
    told = "".join(rank.wait() for rank in ranks)
    assert [rank.returncode for rank in ranks] == [4, 4]
    assert told.count("error:") == told.count("holds a run with other settings") == 1


@pytest.mark.slow
def test_torchrun_ends_all_ranks_when_one_is_killed_or_at_ctrl_c_and_they_go_on(
    folder: Path,
) -> None:
    options: dict[str, object] = {"model": "vitds_tiny", "epochs": 3}
    whole = launch(2, "ci2p_cache", *train_command(folder, "torchrun-whole", **options))
    assert whole.communicate(timeout=300)[0].count("\nepoch 3/3") == 1
    command = ["ci2p_cache", *train_command(folder, "torchrun", **options)]
    for number, code in ((signal.SIGKILL, 1), (signal.SIGINT, None)):
        ranks = launch(2, *command)
        try:
            assert ranks.stdout is not None
            while not re.match(r"epoch +[12]/3", told := ranks.stdout.readline()):
                assert told, "it ended before an epoch"
            victims = [pid for pid in processes_with(folder / "runs") if rank_of(pid) == "1"]
            assert len(victims) == 1
            os.kill(victims[0] if number == signal.SIGKILL else ranks.pid, number)
            sent = time.monotonic()
            told, _ = ranks.communicate(timeout=60)
            assert time.monotonic() - sent < 60
        finally:
            ranks.kill()
        if code is not None:
            assert ranks.returncode == code
            assert told.count("error: another rank of this run was killed") == 1
            assert "(SIGKILL)" in told
        else:
            assert_stopped_once(told, folder / "runs" / "torchrun")
        assert processes_with(folder / "runs") == []
    again = launch(2, *command)
    told, _ = again.communicate(timeout=120)
    assert again.returncode == 0, told
    assert told.count("continuing after") == 1
    assert numbers(folder / "runs" / "torchrun") == numbers(folder / "runs" / "torchrun-whole")

    refused = launch(2, "ci2p_cache", *train_command(folder, "torchrun", **options | {"seed": 4}))
    told, _ = refused.communicate(timeout=60)
    assert refused.returncode == 1
    assert told.count("error:") == told.count("holds a run with other settings") == 1
    assert told.count("exitcode  : 4 ") == 2
    assert processes_with(folder / "runs") == []


@pytest.mark.slow
def test_a_rank_whose_torchrun_was_killed_before_they_met_ends_soon(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # It was looked for for half an hour.
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        for name, value in {
            "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(unused.getsockname()[1]),
            "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0",
        }.items():  # fmt: skip
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(ranks, "_CONNECT_TIMEOUT", timedelta(seconds=1))
        with pytest.raises(errors.ResourceError, match="torchrun or another rank cannot be"):
            with ranks.Ranks.from_environment().joined("cpu"):
                pass


def test_a_rank_that_waits_in_vain_for_another_ends_on_sigterm(
    warm: WarmParent, folder: Path
) -> None:
    # torchrun sends it to those that are left, and kills them half a minute later.
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    alone = warm.start(
        *train_command(folder, "in-vain"),
        environment={
            "RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        },
    )  # fmt: skip
    for _ in range(6000):
        with socket.socket() as caller:
            # It keeps the store that the others would come to.
            if caller.connect_ex(("127.0.0.1", port)) == 0:
                break
        assert alone.poll() is None, alone.told()
        time.sleep(0.01)
    else:
        raise AssertionError(f"it never waited: {alone.told()}")
    alone.send_signal(signal.SIGTERM)
    alone.wait(10)
    assert alone.returncode == -signal.SIGTERM
    assert not (folder / "runs" / "in-vain").exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK not"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "whole numbers"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "fit no rank"),
    ],
)
def test_half_an_environment_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(errors.UsageError, match=message):
        cc.train(folder / "cache", spec=SPEC, runs_dir=folder / "runs", device="cpu")


def test_a_loader_of_another_rank_is_refused(folder: Path) -> None:
    split = cc.open_cache(folder / "cache")["train"]
    with cc.LatentLoader(split, batch_size=6, rank=1, world_size=2) as loader:
        with pytest.raises(errors.UsageError, match="rank 1 of 2; this is rank 0 of 1"):
            cc.train(folder / "cache", spec=SPEC, runs_dir=folder / "runs", loader=loader)
    with pytest.raises(errors.UsageError, match="`rank` is 2 of `world_size` 2"):
        cc.LatentLoader(split, batch_size=6, rank=2, world_size=2)
