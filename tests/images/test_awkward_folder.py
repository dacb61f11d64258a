"""R7 for folders: every awkward file and odd name, encoded end to end, has its expected outcome."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import time
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ci2p_cache as cc
from ci2p_cache.cache.verify import verify
from ci2p_cache.encoding.progress import EncodeObserver
from tests.images.test_decode import AWKWARD_BAD, AWKWARD_OK
from tests.images.test_files import ODD_NAMES
from tests.support.pictures import picture
from tests.support.warm import WarmParent

OPTIONS = cc.EncodeOptions(
    encoder="bundled", size=32, views="none", val_fraction=0.0, max_errors="100%", shard_samples=32
)
MAX_RSS_BYTES = 2 * 2**30


def memory_of(pids: set[int]) -> int:
    """Bytes (Pss: pages that several share count once in all) of some processes and their kin."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    while more := {pid for pid, parent in parents.items() if parent in pids} - pids:
        pids = pids | more
    found = 0
    for pid in pids:
        with suppress(OSError):
            rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
            found += sum(int(kib) * 1024 for kib in re.findall(r"^Pss: +(\d+)", rollup, re.M))
    return found


def encode_apart(warm: WarmParent, source: Path, out: Path) -> tuple[dict, str]:
    """Encodes in a process of its own that stays below the bar; returns its summary and notices."""
    child = warm.start(
        *("encode", source, "--out", out, "--encoder", "bundled", "--size", 32, "--views", "none"),
        *("--labels", "none"),
        *("--val-fraction", 0, "--max-errors", "100%", "--shard-samples", 32, "--json"),
    )
    peak = 0
    while child.poll() is None:
        peak = max(peak, memory_of({child.pid, *warm.decoders()}))
        time.sleep(0.05)
    ran = child.ended()
    assert ran.code == 0, ran.told
    assert 0 < peak < MAX_RSS_BYTES
    return json.loads(ran.out), ran.err


def outcomes(out: Path, split: str = "train") -> dict[str, str | None]:
    """Key -> None for a row that holds a latent, else the reason why not."""
    parts = sorted((out / "index").glob(f"{split}-*.parquet"))
    table = pa.concat_tables([pq.read_table(part) for part in parts])
    return dict(zip(table["key"].to_pylist(), table["error"].to_pylist(), strict=True))


def assert_outcomes(found: dict[str, str | None], expected: dict[str, str | None]) -> None:
    """`expected` gives None for a latent, else part of the reason; keys must be the same."""
    assert found.keys() == expected.keys()
    for key, reason in expected.items():
        got = found[key]
        assert (got is None) == (reason is None), (key, got, reason)
        assert reason is None or reason in str(got), (key, got, reason)


def put(path: Path, seed: int = 1, kind: str = "JPEG") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, 70, 50).save(path, kind)
    return path


@pytest.mark.slow
def test_every_awkward_file_has_its_outcome_and_the_cache_is_clean(
    warm: WarmParent, shared_data: Path, tmp_path: Path
) -> None:
    shutil.copytree(shared_data / "awkward", tmp_path / "src" / "all")
    ran, notes = encode_apart(warm, tmp_path / "src", tmp_path / "out")
    expected = {f"all/{name}": None for name in AWKWARD_OK} | {
        f"all/{name}": reason for name, reason in AWKWARD_BAD.items() if name != "avif.avif"
    }
    assert_outcomes(outcomes(tmp_path / "out"), expected)
    assert (ran["images"], ran["bad"]) == (len(AWKWARD_OK), len(AWKWARD_BAD) - 1)
    assert "1 images ignored whose format is not read (1 .avif)" in notes
    assert "1 files ignored that are no images, for example all/README.md" in notes
    assert verify(tmp_path / "out") == []
    train = cc.open_cache(tmp_path / "out")["train"]
    assert len(train.valid_rows) == len(AWKWARD_OK)
    for row in train.valid_rows.tolist():
        assert train[row][0].isfinite().all()


# What is in the folder of odd things -> what becomes of it: None a latent, else the reason.
LISTED: dict[str, str | None] = {
    "a/plain.jpg": None,
    "a/empty.jpg": "the file is empty",
    "a/text.jpg": "none of",
    "a/sub/deep/1.jpg": None,
    "a/same.jpg": None,
    "b/same.jpg": None,
    "a/linked.jpg": None,
    "a/no_suffix": None,
    "Case/1.jpg": None,
    "case/1.jpg": None,
    "case/1.JPG": None,
    "b/linked_folder/1.jpg": None,
    "b/sparse.jpg": "at most 536870912 are read",
}
NOT_LISTED = {
    "a/.hidden.jpg": "hidden",
    ".git/1.jpg": "hidden",
    "a/.thumbs/1.jpg": "hidden",
    "a/up": "back to a folder",
    "a/self": "back to a folder",
    "a/gone.jpg": "nowhere",
    "a/ring1.jpg": "nowhere",
    "a/pipe.jpg": "pipes",
    "a/socket.jpg": "pipes",
    "a/null.jpg": "pipes",
    "a/notes.txt": "no images",
    "stray.jpg": "beside the class folders",
}


def odd_folder(root: Path) -> Path:
    """Makes everything that LISTED and NOT_LISTED name, and an empty class."""
    for name in ("a/plain.jpg", "a/sub/deep/1.jpg", "a/same.jpg", "b/same.jpg", "a/no_suffix",
                 "Case/1.jpg", "case/1.jpg", "case/1.JPG", "a/.hidden.jpg", ".git/1.jpg",
                 "a/.thumbs/1.jpg", "stray.jpg"):  # fmt: skip
        put(root / name, seed=len(name))
    put(root.parent / "elsewhere" / "1.jpg")
    (root / "empty_class").mkdir()
    (root / "a/empty.jpg").write_bytes(b"")
    (root / "a/text.jpg").write_text("no picture at all")
    (root / "a/notes.txt").write_text("x")
    (root / "a/linked.jpg").symlink_to(root.parent / "elsewhere" / "1.jpg")
    (root / "b/linked_folder").symlink_to(root.parent / "elsewhere")
    (root / "a/up").symlink_to("..")
    (root / "a/self").symlink_to(".")
    (root / "a/gone.jpg").symlink_to("nowhere")
    (root / "a/ring1.jpg").symlink_to("ring1.jpg")
    (root / "a/null.jpg").symlink_to("/dev/null")
    os.mkfifo(root / "a/pipe.jpg")
    with (root / "b/sparse.jpg").open("wb") as file:
        file.truncate(2**40)
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(root / "a")
        server.bind("socket.jpg")
        os.chdir(here)
    return root


class Notes(EncodeObserver):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def notice(self, text: str) -> None:
        self.texts.append(text)


def test_odd_things_in_a_folder_have_their_outcome(tmp_path: Path) -> None:
    source, notes = odd_folder(tmp_path / "src"), Notes()
    cc.encode(source, tmp_path / "out", OPTIONS, observer=notes)
    assert_outcomes(outcomes(tmp_path / "out"), LISTED)
    cache = cc.open_cache(tmp_path / "out")
    assert cache.classes == ("Case", "a", "b", "case")
    told = "\n".join(notes.texts)
    for sentence in set(NOT_LISTED.values()):
        assert sentence in told, sentence
    assert "1 folders left out that hold no image, for example empty_class" in told
    assert verify(tmp_path / "out") == []


def test_odd_names_are_encoded_and_found_again(tmp_path: Path) -> None:
    content = put(tmp_path / "1.jpg").read_bytes()
    folder = tmp_path / "src" / os.fsdecode(b"-cl\xe4ss \n\"'")
    folder.mkdir(parents=True)
    for name in ODD_NAMES:
        (folder / os.fsdecode(name)).write_bytes(content)
    put(tmp_path / "src" / "b" / "1.jpg")
    summary = cc.encode(tmp_path / "src", tmp_path / "out", OPTIONS)
    assert (summary.images, summary.bad) == (len(ODD_NAMES) + 1, 0)
    table = pq.read_table(tmp_path / "out" / "index")
    paths = set(table["path_bytes"].to_pylist())
    assert paths == {b"b/1.jpg", *(b"-cl\xe4ss \n\"'/" + name for name in ODD_NAMES)}
    assert len(set(table["key"].to_pylist())) == len(ODD_NAMES) + 1
    assert verify(tmp_path / "out") == []
    again = cc.encode(tmp_path / "src", tmp_path / "out", OPTIONS)
    assert again.encoded_now == 0


def test_validation_classes_unknown_to_train_and_equal_names_keep_their_labels(
    tmp_path: Path,
) -> None:
    for name in ("train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg", "val/only_val/1.jpg"):
        put(tmp_path / "src" / name, seed=len(name))
    notes = Notes()
    cc.encode(tmp_path / "src", tmp_path / "out", OPTIONS, observer=notes)
    assert any("only_val" in text and "unknown to train" in text for text in notes.texts)
    cache = cc.open_cache(tmp_path / "out")
    assert cache.classes == ("a", "b", "only_val")
    for split, keys in (("train", ["a/1.jpg", "b/1.jpg"]), ("val", ["a/1.jpg", "only_val/1.jpg"])):
        table = pq.read_table(sorted((tmp_path / "out/index").glob(f"{split}-*"))[0])
        assert sorted(table["key"].to_pylist()) == keys
        for row, key in zip(table["row"].to_pylist(), table["key"].to_pylist(), strict=True):
            assert cache.classes[cache[split].labels[row]] == key.split("/")[0]
    assert verify(tmp_path / "out") == []


class Changes(EncodeObserver):
    """Changes the source after the plan is made and before anything is read: notices come then."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self.done = False

    def notice(self, text: str) -> None:
        if self.done:
            return
        self.done = True
        folder = self._source / "a"
        for name in ("gone", "folder", "pipe", "ring"):
            (folder / f"{name}.jpg").unlink()
        (folder / "folder.jpg").mkdir()
        os.mkfifo(folder / "pipe.jpg")
        (folder / "ring.jpg").symlink_to("ring.jpg")
        (folder / "cut.jpg").write_bytes((folder / "cut.jpg").read_bytes()[:400])
        os.truncate(folder / "huge.jpg", 2**40)
        put(folder / "other.jpg", seed=99, kind="PNG")
        shutil.rmtree(self._source / "b")


def test_files_that_vanish_or_change_after_the_plan_have_their_outcome(tmp_path: Path) -> None:
    source = tmp_path / "src"
    for name in ("gone", "folder", "pipe", "ring", "cut", "huge", "other", "stays"):
        put(source / "a" / f"{name}.jpg", seed=len(name))
    put(source / "b" / "1.jpg")
    (source / "a" / "notes.txt").write_text("gives a notice")
    changes = Changes(source)
    cc.encode(source, tmp_path / "out", OPTIONS, observer=changes)
    assert changes.done
    expected = {
        "a/gone.jpg": "vanished",
        "a/folder.jpg": "no regular file",
        "a/pipe.jpg": "no regular file",
        "a/ring.jpg": "cannot be opened",
        "a/cut.jpg": "JPEG",
        "a/huge.jpg": "at most 536870912",
        "a/other.jpg": None,
        "a/stays.jpg": None,
        "b/1.jpg": "vanished",
    }
    assert_outcomes(outcomes(tmp_path / "out"), expected)
    assert verify(tmp_path / "out") == []


def test_unreadable_files_are_invalid_rows(warm: WarmParent, tmp_path: Path) -> None:
    source, out = tmp_path / "src", tmp_path / "out"
    put(source / "a" / "1.jpg")
    put(source / "a" / "2.jpg").chmod(0)
    put(source / "a" / "unknown").chmod(0)
    put(source / "b" / "1.jpg")
    # Root reads anything; the encoding process gives its rights up.
    ran = warm.run(
        *("encode", source, "--out", out, "--encoder", "bundled", "--size", 32),
        *("--val-fraction", 0, "--max-errors", "100%"),
        unprivileged=True,
    )
    assert ran.code == 0, ran.told
    expected = {"a/1.jpg": None, "a/2.jpg": "permission to read the file is denied",
                "b/1.jpg": None}  # fmt: skip
    assert_outcomes(outcomes(out), expected)
    assert "may not be read" in ran.err
