"""Images behind URLs give what the same images give from a folder here."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.images.locate import open_source
from tests.cache.test_remote_cache import settle
from tests.support.commands import Ran, needs
from tests.support.pictures import write_image_folder
from tests.support.s3_server import KEY, SECRET, FaultyDoor, put_folder, s3_server
from tests.support.sources import KINDS, entries
from tests.support.tiers import thinned

pytestmark = needs("s3fs", "moto")

OPTIONS = cc.EncodeOptions(encoder="bundled", size=32, val_fraction=0.3, shard_samples=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("away") / "src", {"ant": 5, "bee": 6})


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    with s3_server() as endpoint:
        put_folder(endpoint, folder, "images", "folder")
        yield endpoint


def rows(cache_dir: Path) -> dict[str, dict[str, tuple[object, ...]]]:
    """Per split: key -> label and checksums of the latents."""
    cache = cc.open_cache(cache_dir)
    found: dict[str, dict[str, tuple[object, ...]]] = {}
    for name in cache.splits:
        for shard in range(cache[name].record.num_shards):
            table = cache[name].read_index(shard, ["key", "class", "latent_crc32c"])
            for row in table.to_pylist():
                found.setdefault(name, {})[row["key"]] = (row["class"], *row["latent_crc32c"])
    return found


@pytest.fixture(scope="module")
def wanted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    out = tmp_path_factory.mktemp("wanted") / "out"
    cc.encode(folder, out, OPTIONS)
    return dict(rows(out))


# The list "csv" has absolute paths, which mean this machine.
@pytest.mark.parametrize("kind", thinned(sorted(KINDS.keys() - {"csv"}), step=5))
def test_the_same_images_behind_s3_give_the_same_latents(
    kind: str, folder: Path, server: str, wanted: dict[str, object], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, run: Callable[..., Ran],
) -> None:  # fmt: skip
    settle(monkeypatch, server, tmp_path)
    if kind == "folder":
        url = "s3://images/folder"
    else:
        root = tmp_path / "made"
        root.mkdir()
        location = str(KINDS[kind](root, entries(folder)))
        bucket = "k-" + "".join(c if c.isalnum() else "-" for c in kind.lower())
        put_folder(server, root, bucket, "x")
        url = f"s3://{bucket}/x" + location.removeprefix(str(root))
    ran = run(
        "encode", url, "--out", tmp_path / "out", "--encoder", "bundled", "--size", 32,
        "--val-fraction", 0.3, "--shard-samples", 4,
    )  # fmt: skip
    assert ran.code == 0, ran.err
    assert SECRET not in ran.out + ran.err
    assert KEY not in ran.out + ran.err
    assert rows(tmp_path / "out") == wanted
    cache = cc.open_cache(tmp_path / "out")
    assert cache.classes == ("ant", "bee")
    assert cache.manifest.source == url


def test_an_encode_goes_on_where_five_in_a_hundred_requests_fail(
    server: str, wanted: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyDoor(server, share=0.05, seed=3) as door:
        settle(monkeypatch, door.url, tmp_path)
        cc.encode("s3://images/folder", tmp_path / "out", OPTIONS)
        assert door.failed >= 1
    assert rows(tmp_path / "out") == wanted
    # What was fetched is read again without a server.
    settle(monkeypatch, "http://127.0.0.1:9", tmp_path)
    assert cc.reencode(tmp_path / "out", 3).findings == ()


def test_a_tar_comes_over_http(
    folder: Path, tmp_path: Path, wanted: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    root = tmp_path / "web"
    root.mkdir()
    kind = next(kind for kind in KINDS if str(KINDS[kind].__name__) == "_one_tar")
    KINDS[kind](root, entries(folder))
    monkeypatch.setenv("CI2P_CACHE_MIRRORS", str(tmp_path / "mirrors"))
    handler = functools.partial(Quiet, directory=str(root))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{web.server_port}/all.tar"
        cc.encode(url, tmp_path / "out", OPTIONS)
        web.shutdown()
    assert rows(tmp_path / "out") == wanted


def test_what_is_not_there_is_named(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch, server, tmp_path)
    for url in ("s3://images/nothing", "s3://images/nothing.tar", "s3://images/{a,b}.tar"):
        with pytest.raises(errors.SourceError, match="s3://images/"):
            list(open_source(url).scan())
    with pytest.raises(errors.UsageError, match="ftp://h/x cannot be read"):
        open_source("ftp://h/x")
