"""Where weights come from: downloads over a loopback server, files that fit or not."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.server
import io
import json
import os
import socket
import threading
import zipfile
from pathlib import Path
from typing import cast

import pytest
import safetensors.torch
import torch

from ci2p_cache.encoder import zoo
from ci2p_cache.encoder.load import load_encoder
from ci2p_cache.encoder.weights import fetch_weights, official_url, weights_folder
from ci2p_cache.errors import (
    DigestError,
    DiskFullError,
    ManifestError,
    UsageError,
    WeightsError,
    WeightsUnavailableError,
)
from tests.support.encoders import lively_state, needs_compressai, reference_of

BODY = bytes(range(256)) * 3000
DIGEST = hashlib.sha256(BODY).hexdigest()
NAME = f"model-5-{DIGEST[:8]}.pth.tar"


class _Server(http.server.ThreadingHTTPServer):
    """Remembers what it was asked for; `bodies` holds what is not BODY, by file name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.requests: list[str] = []
        self.bodies: dict[str, bytes] = {}
        self.released = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers by the first part of the path: what the server does to the file."""

    def do_GET(self) -> None:
        server = cast("_Server", self.server)
        server.requests.append(self.path)
        kind = self.path.split("/")[1]
        body, headers, status = server.bodies.get(self.path.rpartition("/")[2], BODY), {}, 200
        headers["Content-Length"] = str(len(body))
        if kind in ("404", "500"):
            status = int(kind)
        elif kind == "other":
            body = body[:1000] + b"!" + body[1001:]
        elif kind == "short":
            body = body[: len(body) // 2]
        elif kind == "huge":
            headers["Content-Length"] = str(2**40)
        elif kind == "unknown-length":
            del headers["Content-Length"]
        elif kind == "broken-chunks":
            del headers["Content-Length"]
            headers["Transfer-Encoding"] = "chunked"
            body = b"10000\r\n" + body[:500]
        elif kind == "moved":
            status, headers["Location"] = 302, self.path.replace("moved", "ok")
        elif kind == "to-ftp":
            status, headers["Location"] = 302, f"ftp://127.0.0.1{self.path}"
        elif kind == "to-file":
            status, headers["Location"] = 302, "file:///etc/hostname"
        elif kind == "silent":
            server.released.wait(20)
            return
        self.send_response(status)
        for header in headers.items():
            self.send_header(*header)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch):
    """A real HTTP server on the loopback interface; `.url` is its base."""
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "127.0.0.1")
    with _Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.released.set()
        running.shutdown()
        thread.join()


def contents(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []


# Downloads


def test_a_download_is_kept_with_its_digest_and_asked_for_once(server, tmp_path):
    folder, seen = tmp_path / "a" / "cache", []
    url = f"{server.url}/ok/{NAME}"
    path = fetch_weights(url, folder, lambda done, total: seen.append((done, total)))
    assert path == folder / NAME
    assert path.read_bytes() == BODY
    assert contents(folder) == [NAME, f"{NAME}.json"]
    record = json.loads((folder / f"{NAME}.json").read_text())
    assert record == {"format_version": 1, "url": url, "bytes": len(BODY), "sha256": DIGEST}
    assert seen == sorted(seen)
    assert len(seen) > 1
    assert seen[-1] == (len(BODY), len(BODY))
    assert fetch_weights(url, folder) == path
    assert len(server.requests) == 1


@pytest.mark.parametrize("kind", ["moved", "unknown-length"])
def test_redirects_and_bodies_of_unknown_length_are_fine(server, tmp_path, kind):
    seen = []
    fetch_weights(f"{server.url}/{kind}/{NAME}", tmp_path, lambda *now: seen.append(now))
    assert (tmp_path / NAME).read_bytes() == BODY
    assert seen[-1] == (len(BODY), 0 if kind == "unknown-length" else len(BODY))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("404", "the server answers 404"),
        ("500", "the server answers 500"),
        ("short", rf"ended after {len(BODY) // 2} of {len(BODY)} bytes"),
        ("broken-chunks", "IncompleteRead"),
        ("huge", "larger than"),
        ("to-ftp", "unknown url type: ftp"),
        ("to-file", "the server answers 302"),
        ("silent", "timed out"),
    ],
)
def test_a_failed_download_names_three_ways_and_leaves_nothing(server, tmp_path, kind, reason):
    with pytest.raises(WeightsUnavailableError, match=reason) as caught:
        fetch_weights(f"{server.url}/{kind}/{NAME}", tmp_path, timeout_seconds=0.5)
    message = str(caught.value)
    assert str(tmp_path / NAME) in message
    assert "--weights FILE" in message
    assert "--encoder bundled" in message
    assert caught.value.exit_code == 6
    assert contents(tmp_path) == []
    fetch_weights(f"{server.url}/ok/{NAME}", tmp_path)


def test_without_a_network_the_three_ways_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    with pytest.raises(WeightsUnavailableError, match=r"refused.*--encoder bundled"):
        fetch_weights(f"http://127.0.0.1:{port}/{NAME}", tmp_path)
    assert contents(tmp_path) == []


def test_bytes_with_another_digest_are_refused_and_removed(server, tmp_path):
    with pytest.raises(DigestError, match=f"promises {DIGEST[:8]}") as caught:
        fetch_weights(f"{server.url}/other/{NAME}", tmp_path)
    assert caught.value.exit_code == 5
    assert contents(tmp_path) == []


def test_an_interrupted_download_leaves_nothing(server, tmp_path):
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_weights(f"{server.url}/ok/{NAME}", tmp_path, interrupt)
    assert contents(tmp_path) == []


def test_a_full_disk_is_called_a_full_disk(server, tmp_path, monkeypatch):
    def no_space(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        with pytest.raises(DiskFullError, match="no space is left"):
            fetch_weights(f"{server.url}/ok/{NAME}", tmp_path)
    assert contents(tmp_path) == []


def test_a_cache_folder_that_cannot_be_made_is_named(server, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WeightsUnavailableError, match="cannot use") as caught:
        fetch_weights(f"{server.url}/ok/{NAME}", tmp_path / "file" / "cache")
    assert "XDG_CACHE_HOME" in (caught.value.hint or "")


def test_a_file_copied_into_the_cache_folder_needs_no_network(tmp_path):
    (tmp_path / NAME).write_bytes(BODY)
    url = f"http://127.0.0.1:9/{NAME}"
    assert fetch_weights(url, tmp_path) == tmp_path / NAME
    assert json.loads((tmp_path / f"{NAME}.json").read_text())["sha256"] == DIGEST


def test_a_cached_file_that_changed_is_refused_and_kept(server, tmp_path):
    url = f"{server.url}/ok/{NAME}"
    fetch_weights(url, tmp_path)
    (tmp_path / NAME).write_bytes(BODY[:-1])
    with pytest.raises(DigestError, match="promises") as caught:
        fetch_weights(url, tmp_path)
    assert caught.value.hint == f"rm {tmp_path / NAME}"
    assert (tmp_path / NAME).is_file()


@pytest.mark.parametrize("cached", [True, False])
def test_the_digest_of_the_first_use_is_held(server, tmp_path, cached):
    url = f"{server.url}/ok/{NAME}"
    fetch_weights(url, tmp_path)
    record = tmp_path / f"{NAME}.json"
    held = DIGEST[:8] + "0" * 56
    record.write_text(record.read_text().replace(DIGEST, held))
    if not cached:
        (tmp_path / NAME).unlink()
    with pytest.raises(DigestError, match=f"{held} was recorded at first use"):
        fetch_weights(url, tmp_path)
    assert contents(tmp_path) == [NAME, record.name] if cached else [record.name]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format_version": 1}', "null"])
def test_a_damaged_digest_record_is_named(tmp_path, text):
    (tmp_path / NAME).write_bytes(BODY)
    (tmp_path / f"{NAME}.json").write_text(text)
    with pytest.raises(ManifestError, match="digest record") as caught:
        fetch_weights(f"http://127.0.0.1:9/{NAME}", tmp_path)
    assert caught.value.hint == f"rm {tmp_path / NAME}.json"


def test_a_digest_record_of_a_later_version_is_refused(server, tmp_path):
    fetch_weights(f"{server.url}/ok/{NAME}", tmp_path)
    record = tmp_path / f"{NAME}.json"
    record.write_text(record.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(ManifestError, match=r"format_version wants .*got 2"):
        fetch_weights(f"{server.url}/ok/{NAME}", tmp_path)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"ftp://127.0.0.1/{NAME}", "wanted http or https"),
        (f"file:///tmp/{NAME}", "wanted http or https"),
        ("http://127.0.0.1/weights.pth.tar", "first 8 hex digits"),
        ("http://127.0.0.1/..-12345678.pth/", "first 8 hex digits"),
        (f"http://[::/{NAME}", "cannot be read"),
    ],
)
def test_urls_that_cannot_be_checked_are_refused(tmp_path, url, message):
    with pytest.raises(UsageError, match=message):
        fetch_weights(url, tmp_path)


def test_downloads_at_the_same_time_end_with_one_whole_file(server, tmp_path):
    paths = []
    threads = [
        threading.Thread(
            target=lambda: paths.append(fetch_weights(f"{server.url}/ok/{NAME}", tmp_path))
        )
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert paths == [tmp_path / NAME] * 4
    assert contents(tmp_path) == [NAME, f"{NAME}.json"]
    assert (tmp_path / NAME).read_bytes() == BODY


def test_the_cache_folder_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert weights_folder() == tmp_path / "ci2p-cache"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for ignored in ("relative/folder", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert weights_folder() == tmp_path / "home" / ".cache" / "ci2p-cache"


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    # Whether there is a home is for the system's user table to say, which a test cannot change.
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(WeightsUnavailableError, match="no home folder") as caught:
        weights_folder()
    assert "XDG_CACHE_HOME" in (caught.value.hint or "")


def test_official_urls_are_those_published_unless_a_mirror_is_named(monkeypatch):
    monkeypatch.delenv("CI2P_CACHE_WEIGHTS_URL", raising=False)
    published = official_url("bmshj2018-factorized", 5, "mse")
    assert published.startswith("https://compressai.s3.amazonaws.com/")
    assert published.endswith("/bmshj2018-factorized-prior-5-866ba797.pth.tar")
    monkeypatch.setenv("CI2P_CACHE_WEIGHTS_URL", "https://mirror.example/compressai/")
    mirrored = official_url("bmshj2018-factorized", 5, "mse")
    assert mirrored == "https://mirror.example/compressai/" + published.rpartition("/")[2]
    for arch, quality, metric in (
        ("bmshj2018-factorized", 9, "mse"),
        ("bmshj2018-factorized", 5, "lpips"),
        ("resnet50", 5, "mse"),
    ):
        with pytest.raises(UsageError, match="no official weights are published"):
            official_url(arch, quality, metric)


def test_the_official_encoder_is_fetched_once_and_then_needs_no_network(
    server, tmp_path, monkeypatch
):
    buffer = io.BytesIO()
    torch.save(small_state(), buffer)
    data = buffer.getvalue()
    name = f"factorized-1-{hashlib.sha256(data).hexdigest()[:8]}.pth.tar"
    server.bodies[name] = data
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CI2P_CACHE_WEIGHTS_URL", f"{server.url}/ok")
    # The real file cannot be had here, so the table names one that this test has made.
    monkeypatch.setitem(zoo._PUBLISHED["mse"], 1, f"https://published.example/v1/{name}")
    seen = []
    first = load_encoder(quality=1, progress=lambda *now: seen.append(now))
    assert seen[-1] == (len(data), len(data))
    monkeypatch.setenv("CI2P_CACHE_WEIGHTS_URL", "http://127.0.0.1:9")
    assert load_encoder(quality=1).spec == first.spec
    assert server.requests == [f"/ok/{name}"]
    assert contents(tmp_path / "ci2p-cache") == [name, f"{name}.json"]


def test_official_weights_that_cannot_be_had_never_fall_back(server, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CI2P_CACHE_WEIGHTS_URL", f"{server.url}/404")
    with pytest.raises(WeightsUnavailableError, match="--encoder bundled"):
        load_encoder()
    monkeypatch.setenv("CI2P_CACHE_WEIGHTS_URL", f"{server.url}/ok")
    with pytest.raises(DigestError, match="promises 866ba797"):
        load_encoder()


# Files


def small_state(seed: int = 0) -> dict[str, torch.Tensor]:
    """A state dict of quality 1 to 5."""
    return lively_state(1, seed)


def saved(state: object, path: Path, *, modern: bool = True) -> Path:
    torch.save(state, path, _use_new_zipfile_serialization=modern)
    return path


def old_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As CompressAI's published files have them."""
    for new, old in (("matrices", "_matrices"), ("biases", "_biases"), ("factors", "_factors")):
        state = {
            name.replace(f"entropy_bottleneck.{new}", f"entropy_bottleneck.{old}"): tensor
            for name, tensor in state.items()
        }
    return state


@needs_compressai
def test_the_digest_is_that_of_the_weights_whatever_file_holds_them(tmp_path):
    state = small_state()
    model = reference_of(state, 1).to(memory_format=torch.contiguous_format)
    model.update()
    parameters = {name: tensor.detach() for name, tensor in model.named_parameters()}
    training = {"epoch": 3, "state_dict": state, "optimizer": {"lr": 1e-4}, "loss": 0.5}
    paths = [
        saved(state, tmp_path / "plain.pth.tar"),
        saved(state, tmp_path / "legacy.pt", modern=False),
        saved(training, tmp_path / "training.pth.tar"),
        saved(
            {f"module.{name}": value for name, value in state.items()}, tmp_path / "parallel.pth"
        ),
        saved(old_names(state), tmp_path / "old.pth"),
        saved(model.state_dict(), tmp_path / "with_tables.pth"),
        saved(model.to(memory_format=torch.channels_last).state_dict(), tmp_path / "nhwc.pth"),
    ]
    safetensors.torch.save_file(parameters, tmp_path / "parameters.safetensors")
    safetensors.torch.save_file(state, tmp_path / "state.safetensors")
    paths += [tmp_path / "parameters.safetensors", tmp_path / "state.safetensors"]
    digests = {load_encoder(weights=path, quality=2).spec.weights_sha256 for path in paths}
    assert len(digests) == 1
    changed = saved(small_state(seed=1), tmp_path / "changed.pth")
    assert load_encoder(weights=changed).spec.weights_sha256 not in digests


def test_half_precision_files_are_read_exactly(tmp_path):
    state = {name: tensor.half().float() for name, tensor in small_state().items()}
    parameters = {k: v for k, v in state.items() if not k.endswith(("pedestal", "bound"))}
    parameters = {k: v for k, v in parameters.items() if v.is_floating_point() and v.numel()}
    full = load_encoder(weights=saved(parameters, tmp_path / "full.pth"))
    halves = {name: tensor.half() for name, tensor in parameters.items()}
    half = load_encoder(weights=saved(halves, tmp_path / "half.pth"))
    assert half.spec == full.spec


def test_weights_of_another_quality_name_the_shapes_and_what_they_fit(tmp_path):
    path = saved(lively_state(8, seed=0), tmp_path / "q8.pth.tar")
    with pytest.raises(WeightsError) as caught:
        load_encoder(weights=path, quality=5)
    message = str(caught.value)
    assert f"{path} does not fit bmshj2018-factorized quality 5 (N=128, M=192)" in message
    assert "keys of another shape" in message
    assert "'g_a.0.weight' is (192, 3, 5, 5), wanted (128, 3, 5, 5)" in message
    assert "more)" in message
    assert "It fits bmshj2018-factorized qualities 6 to 8 (N=192, M=320)" in message
    assert caught.value.exit_code == 3


@needs_compressai
def test_weights_of_another_architecture_name_the_keys(tmp_path):
    from compressai.models import ScaleHyperprior

    path = saved(dict(ScaleHyperprior(128, 192).state_dict()), tmp_path / "hyper.pth.tar")
    with pytest.raises(WeightsError, match=r"15 keys unexpected \('gaussian_cond") as caught:
        load_encoder(weights=path)
    assert "It fits bmshj2018-hyperprior qualities 1 to 5 (N=128, M=192)" in str(caught.value)


def test_weights_that_lack_keys_name_them(tmp_path):
    state = small_state()
    del state["g_a.2.weight"], state["entropy_bottleneck.quantiles"]
    with pytest.raises(WeightsError) as caught:
        load_encoder(weights=saved(state, tmp_path / "a.pth"))
    expected = "2 keys missing ('g_a.2.weight', 'entropy_bottleneck.quantiles')"
    assert expected in str(caught.value)
    assert "Its g_a has N=128, M=192" in str(caught.value)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"conv1.weight": torch.zeros(3), "fc.bias": torch.zeros(2)}, "It holds no g_a"),
        ({"g_a.0.weight": torch.zeros(3)}, "It fits none of bmshj2018-factorized"),
        ({}, "missing"),
        ({"state_dict": {"a": 1}}, "does not fit"),
        ([torch.zeros(2)], "holds a list; wanted a state dict"),
        ({1: torch.zeros(2)}, "wanted a state dict"),
        (torch.zeros(2), "holds a Tensor; wanted a state dict"),
        ({"entropy_bottleneck": torch.zeros(2)}, "keys that no CompressAI version writes"),
        ({"module.a": torch.zeros(2), "a": torch.zeros(2)}, "same tensor under two names"),
    ],
)
def test_files_that_hold_something_else_say_so(tmp_path, state, message):
    with pytest.raises(WeightsError, match=message):
        load_encoder(weights=saved(state, tmp_path / "a.pth"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((192,), float("nan")), "not finite"),
        (torch.zeros(192, dtype=torch.float64), "'g_a.6.bias' is torch.float64"),
        (torch.zeros(192, dtype=torch.int32), "'g_a.6.bias' is torch.int32"),
        (torch.zeros(1).expand(2**40), rf"is \({2**40},\), wanted \(192,\)"),
        pytest.param(
            torch.ones(192).to_sparse(),
            "1 keys of another shape",
            marks=pytest.mark.filterwarnings("ignore::UserWarning"),
        ),
        (7, "'g_a.6.bias' is int, wanted"),
    ],
)
def test_tensors_that_no_encoder_has_are_refused(tmp_path, value, message):
    path = saved({**small_state(), "g_a.6.bias": value}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match=message):
        load_encoder(weights=path)


class _Harmful:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.mkdir, (str(self.canary),)


@pytest.mark.parametrize("modern", [True, False])
def test_code_in_a_weights_file_is_not_run(tmp_path, modern):
    canary = tmp_path / "canary"
    state = {**small_state(), "g_a.0.weight": _Harmful(canary)}
    path = saved(state, tmp_path / "a.pth.tar", modern=modern)
    with pytest.raises(WeightsError, match=r"refers to \w+\.mkdir\); nothing in it was run"):
        load_encoder(weights=path)
    assert not canary.exists()


def test_a_file_that_unpacks_to_more_than_it_has_is_refused(tmp_path):
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(2**26))
    with pytest.raises(WeightsError, match=r"would unpack from \d+ to 67108864 bytes"):
        load_encoder(weights=path)


@pytest.mark.parametrize("name", ["a.pth.tar", "a.safetensors"])
@pytest.mark.parametrize("kind", ["missing", "folder", "empty", "text", "truncated", "huge"])
def test_files_that_are_no_weights_are_named(tmp_path, name, kind):
    path = tmp_path / name
    if kind == "folder":
        path.mkdir()
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(2**30)
    elif kind != "missing":
        good = saved(small_state(), tmp_path / "good").read_bytes()
        data = {"empty": b"", "text": b"these are no weights\n" * 9, "truncated": good[:-900]}[kind]
        path.write_bytes(data)
    with pytest.raises(WeightsError, match=f"weights file .*{name}") as caught:
        load_encoder(weights=path)
    assert caught.value.exit_code == 3
