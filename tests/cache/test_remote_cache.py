"""A finished cache on an object store is opened, verified and trained from as if it was here."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.remote import RemoteFolder, shown, url_of
from tests.support.commands import Ran, needs
from tests.support.pictures import write_image_folder
from tests.support.s3_server import KEY, SECRET, FaultyDoor, put_folder, s3_server
from tests.support.tiers import thinned

pytestmark = [needs("s3fs", "moto"), pytest.mark.usefixtures("nano")]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 40 images in shards of 4."""
    root = tmp_path_factory.mktemp("local")
    source = write_image_folder(root / "src", {"ant": 22, "bee": 18})
    options = cc.EncodeOptions(encoder="bundled", size=32, shard_samples=4, val_fraction=0.2)
    cc.encode(source, root / "shards", options)
    return root / "shards"


@pytest.fixture(scope="module")
def server(local: Path) -> Iterator[str]:
    with s3_server() as endpoint:
        put_folder(endpoint, local, "data", "shards")
        yield endpoint


@pytest.fixture
def away(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of the cache, with the environment that reads it."""
    settle(monkeypatch, server, tmp_path)
    return "s3://data/shards"


def settle(monkeypatch: pytest.MonkeyPatch, endpoint: str, tmp_path: Path) -> None:
    import s3fs

    for name, value in {
        "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1", "CI2P_CACHE_MIRRORS": str(tmp_path / "mirrors"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    # fsspec keeps one instance per bucket, with the endpoint that it was made for.
    s3fs.S3FileSystem.clear_instance_cache()


def mirrored(tmp_path: Path) -> set[str]:
    (mirror,) = [p for p in (tmp_path / "mirrors").iterdir() if p.name != ".staging"]
    return {p.relative_to(mirror).as_posix() for p in mirror.rglob("*") if p.is_file()}


@pytest.mark.parametrize("shuffle", thinned([True, "blocks"]))
def test_batches_from_s3_are_those_of_the_local_cache(
    local: Path, away: str, shuffle: bool, tmp_path: Path
) -> None:
    def batches(where: str | Path) -> list[tuple[torch.Tensor, ...]]:
        split = cc.open_cache(where)["train"]
        with cc.LatentLoader(split, batch_size=6, seed=2, shuffle=shuffle) as loader:
            return [(b.rows, b.labels, b.stored) for _ in range(2) for b in loader]

    for one, other in zip(batches(local), batches(away), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not [name for name in mirrored(tmp_path) if "val/latents/c." in name]


def test_a_pickled_split_of_a_remote_cache_holds_its_url(local: Path, away: str) -> None:
    data = pickle.dumps(cc.open_cache(away)["train"])
    assert len(data) < 1000
    assert str(local).encode() not in data
    pairs = zip(pickle.loads(data), cc.open_cache(local)["train"], strict=True)
    assert all(torch.equal(y, wanted) and one == other for (y, one), (wanted, other) in pairs)


@pytest.mark.slow
def test_tars_are_read_from_s3_as_well(
    local: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch, server, tmp_path)
    cc.convert(local, tmp_path / "tars", format="webdataset")
    put_folder(server, tmp_path / "tars", "tars", "shards")
    away, here = cc.open_cache("s3://tars/shards")["train"], cc.open_cache(local)["train"]
    for row in (0, 7, 9):
        assert torch.equal(away[row][0], here[row][0])
    assert len([name for name in mirrored(tmp_path) if name.endswith(".tar")]) == 3


def test_only_what_is_read_is_fetched_and_only_once(local: Path, away: str, tmp_path: Path) -> None:
    cache = cc.open_cache(away)
    y, label = cache["train"][5]
    wanted_y, wanted_label = cc.open_cache(local)["train"][5]
    assert torch.equal(y, wanted_y)
    assert label == wanted_label
    chunks = [name for name in mirrored(tmp_path) if "/latents/c." in name]
    assert chunks == ["latents.zarr/train/latents/c.1.0.0.0.0"]
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "mirrors").rglob("c.1.*")}
    assert torch.equal(cc.open_cache(away)["train"][5][0], wanted_y)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "mirrors").rglob("c.1.*")} == before


@pytest.mark.slow
def test_training_from_a_failing_s3_loses_what_training_here_loses(
    local: Path, server: str, tmp_path: Path, run: Callable[..., Ran],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    more = ("--model", "vitds_nano", "--epochs", 2, "--batch-size", 8, "--json")
    found = []
    monkeypatch.setattr("ci2p_cache.remote._READ_SECONDS", 1)
    with FaultyDoor(server, share=0.08, seed=1, hang_seconds=2.0) as door:
        settle(monkeypatch, door.url, tmp_path)
        for number, where in enumerate((local, "s3://data/shards")):
            ran = run("train", where, "--out", tmp_path / f"runs{number}", *more)
            assert ran.code == 0, ran.err
            assert SECRET not in ran.out + ran.err
            assert KEY not in ran.out + ran.err
            last = json.loads(ran.out)["last"]
            found.append((last["train_loss"], last["val_loss"], last["val_top1"]))
        assert door.failed >= 1
    assert found[0] == found[1]
    # Each run has its cache's encoder, so that the folder alone classifies pictures.
    committed = (local / "encoder.safetensors").read_bytes()
    for number in (0, 1):
        (copied,) = (tmp_path / f"runs{number}").glob("*/encoder.safetensors")
        assert copied.read_bytes() == committed


@pytest.mark.slow
def test_five_in_a_hundred_requests_fail_and_nothing_else_does(
    local: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyDoor(server, share=0.05) as door:
        settle(monkeypatch, door.url, tmp_path)
        assert cc.verify("s3://data/shards") == []
        split, here = cc.open_cache("s3://data/shards")["train"], cc.open_cache(local)["train"]
        for row in range(0, len(split), 3):
            assert torch.equal(split[row][0], here[row][0])
        assert door.failed >= 2
        assert door.requests > 60


@pytest.mark.slow
def test_a_server_that_never_answers_is_exit_6_and_tells_no_credential(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran]
) -> None:
    settle(monkeypatch, "http://127.0.0.1:9", tmp_path)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    ran = run("verify", "s3://data/shards")
    assert ran.code == 6
    assert "s3://data/shards/cache.json cannot be read after 4 tries" in ran.err
    assert SECRET not in ran.err
    assert KEY not in ran.err


def test_verify_names_what_was_damaged_there(
    local: Path, away: str, server: str, tmp_path: Path
) -> None:
    copy = tmp_path / "damaged"
    shutil.copytree(local, copy)
    shard = copy / "latents.zarr" / "train" / "latents" / "c.2.0.0.0.0"
    raw = bytearray(shard.read_bytes())
    raw[40] ^= 1
    shard.write_bytes(raw)
    put_folder(server, copy, "damaged", "shards")
    findings = cc.verify("s3://damaged/shards")
    assert {finding.path for finding in findings} == {"latents.zarr/train/latents/c.2.0.0.0.0"}
    # What was fetched by verify is damaged too: reading it raises, and so does fetching it.
    split = cc.open_cache("s3://damaged/shards")["train"]
    with pytest.raises(errors.ShardError, match="shard 2"):
        split[8]
    shutil.rmtree(tmp_path / "mirrors")
    split = cc.open_cache("s3://damaged/shards")["train"]
    with pytest.raises(errors.IntegrityError, match="were committed"):
        split[8]
    assert torch.isfinite(split[0][0]).all()


def test_another_cache_at_the_same_url_is_not_mixed_with_the_old_one(
    local: Path, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch, server, tmp_path)
    source = write_image_folder(tmp_path / "src", {"cat": 9, "dog": 8})
    options = cc.EncodeOptions(encoder="bundled", size=32, shard_samples=4, val_fraction=0.0)
    cc.encode(source, tmp_path / "other", options)
    put_folder(server, local, "moving", "x")
    assert cc.open_cache("s3://moving/x").classes == ("ant", "bee")
    put_folder(server, tmp_path / "other", "moving", "x")
    again = cc.open_cache("s3://moving/x")
    assert again.classes == ("cat", "dog")
    assert torch.equal(again["train"][0][0], cc.open_cache(tmp_path / "other")["train"][0][0])


def test_what_is_no_finished_cache_is_refused(
    away: str, server: str, local: Path, tmp_path: Path, run: Callable[..., Ran]
) -> None:
    with pytest.raises(errors.NotACacheError, match=r"s3://data/nothing is no latent cache"):
        cc.open_cache("s3://data/nothing")
    with pytest.raises(errors.UsageError, match="zarr itself opens it"):
        _ = cc.open_cache(away)["train"].latents
    with pytest.raises(errors.UsageError, match="only be verified whole"):
        cc.verify(away, quick=True)
    source = local.parent / "src"
    ran = run("encode", source, "--out", "s3://data/new", "--encoder", "bundled")
    assert ran.code == 2
    assert "the cache is written on this machine" in ran.err


def test_files_come_over_http_as_well(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import functools
    import threading
    from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(local.parent))
    monkeypatch.setenv("CI2P_CACHE_MIRRORS", str(tmp_path / "mirrors"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_port}/shards"
        assert torch.equal(cc.open_cache(url)["val"][1][0], cc.open_cache(local)["val"][1][0])
        # This server knows no ranges: what is asked for is cut out of what comes.
        whole = (local / "plan.parquet").read_bytes()
        monkeypatch.setattr("ci2p_cache.remote._PART_BYTES", 100)
        assert len(whole) > 300
        assert RemoteFolder(url).read("plan.parquet") == whole
        web.shutdown()


@pytest.mark.parametrize(
    ("location", "url"),
    [
        ("s3://b/x", "s3://b/x"), (Path("s3://b/x"), "s3://b/x"), ("S3://b/x/", "s3://b/x/"),
        ("https://h/x", "https://h/x"), ("/tmp/s3/x", None), ("shards", None), ("a:/b", None),
        (Path("dir:/x"), None),
    ],
)  # fmt: skip
def test_urls_are_told_from_paths(location: str | os.PathLike[str], url: str | None) -> None:
    assert url_of(location) == url


@pytest.mark.parametrize(
    "location",
    ["ftp://h/x", "file:///etc", "memory://x", "simplecache::s3://b/x", "s3://b/x::file:///etc",
     "s3://"],
)  # fmt: skip
def test_other_urls_are_refused(location: str) -> None:
    with pytest.raises(errors.UsageError, match="cannot be read"):
        url_of(location)


def test_what_a_url_carries_beside_its_path_is_not_shown() -> None:
    text = "https://me:pass@host/x.tar?X-Amz-Signature=abc failed for AKIAABCDEFGHIJKL, secret=q"
    told = shown(text)
    for word in ("me:", "pass", "abc", "AKIA", "=q"):
        assert word not in told
    assert "host/x.tar" in told
