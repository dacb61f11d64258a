"""Verify, repair and encoding again: what is damaged is named, and put back to the same bytes."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.cache.codecs import CODECS, ChunkCodec
from ci2p_cache.cache.lock import locked
from ci2p_cache.cli.app import run_command
from ci2p_cache.record import sealed_bytes
from tests.long.bitflips import run as run_bitflips
from tests.support.caches import SMALL, data_digests, flip, swap, with_options
from tests.support.pictures import picture, write_image_folder
from tests.support.tiers import thinned

SHARD = "latents.zarr/train/latents/c.1.0.0.0.0"
INDEX = "index/train-000001.parquet"
COMMIT = "commits/train-000001.json"
LABELS = "latents.zarr/train/labels/c.0"
NUM_GOOD = 14
"""Images that can be decoded."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes, one of them no image at all; read only."""
    root = tmp_path_factory.mktemp("verify") / "images"
    write_image_folder(root, {"ant": 5, "bee": 5, "cat": 4})
    (root / "bee" / "bad.jpg").write_bytes(b"\xff\xd8 nothing")
    return root


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undamaged cache; read only."""
    out = tmp_path_factory.mktemp("verify") / "shards"
    cc.encode(source, out, with_options(max_errors="1", batch_size=3))
    return out


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "shards")
    return tmp_path / "shards"


def kinds(findings: list[cc.Finding] | tuple[cc.Finding, ...]) -> set[tuple[str, str]]:
    return {(finding.path, finding.kind) for finding in findings}


class Told(cc.EncodeObserver):
    def __init__(self) -> None:
        self.notices: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.mark.slow
def test_every_fault_in_every_file_is_named_and_none_is_read_silently(cache: Path) -> None:
    counts = run_bitflips(cache, trials=40, seed=7)
    assert counts.all_found, (str(counts), counts.missed)
    assert counts.faults > 150


def computed_by_compressai(cache: Path) -> None:
    """Makes the records what they were while compressai computed the paper's encoder."""
    for path in (cache / "commits").iterdir():
        data = json.loads(path.read_text())
        assert data["numerics"].pop("encoder") == "ci2p_cache"
        data["numerics"]["compressai"] = "1.2.8"
        path.write_bytes(sealed_bytes(data))
    (cache / "checksums.sha256").unlink()


class TestQuick:
    @pytest.mark.parametrize("path", [SHARD, INDEX, COMMIT, LABELS, "latents.zarr/zarr.json"])
    def test_a_missing_file_is_named(self, cache: Path, path: str) -> None:
        (cache / path).unlink()
        assert kinds(cc.verify(cache, quick=True)) == {(path, "missing")}

    def test_two_swapped_shards_are_both_named(self, cache: Path) -> None:
        other = SHARD.replace("c.1", "c.2")
        swap(cache / SHARD, cache / other)
        assert kinds(cc.verify(cache, quick=True)) == {(SHARD, "damaged"), (other, "damaged")}

    def test_files_that_no_record_lists_are_foreign_and_repair_leaves_them(
        self, cache: Path
    ) -> None:
        names = {"index/notes.txt", "latents.zarr/train/latents/c.99.0.0.0.0",
                 "commits/train-000099.json"}  # fmt: skip
        for name in names:
            (cache / name).write_text("precious")
        wanted = {(name, "foreign") for name in names}
        assert kinds(cc.verify(cache, quick=True)) == wanted
        summary = cc.repair(cache)
        assert kinds(summary.remaining) == wanted
        assert summary.repaired == ()
        assert all((cache / name).read_text() == "precious" for name in names)

    def test_a_folder_in_place_of_a_file_is_named_and_replaced(
        self, cache: Path, whole: Path
    ) -> None:
        (cache / SHARD).unlink()
        (cache / SHARD).mkdir()
        assert (SHARD, "damaged") in kinds(cc.verify(cache, quick=True))
        assert cc.repair(cache).remaining == ()
        assert data_digests(cache) == data_digests(whole)


class TestSelfDigest:
    @pytest.mark.parametrize("name", ["cache.json", COMMIT])
    def test_a_value_changed_by_hand_is_noticed(self, cache: Path, name: str) -> None:
        text = (cache / name).read_text()
        changed = text.replace('"batch_size": 3', '"batch_size": 8').replace('"bee"', '"eel"', 1)
        assert changed != text
        (cache / name).write_text(changed)
        if name == "cache.json":
            with pytest.raises(errors.ManifestError, match="its own sha256 does not fit"):
                cc.verify(cache)
        else:
            assert kinds(cc.verify(cache)) == {(COMMIT, "damaged")}

    def test_an_intact_record_of_another_time_is_not_the_listed_one(self, cache: Path) -> None:
        data = json.loads((cache / COMMIT).read_text())
        data["numerics"]["torch"] = "1.0"
        (cache / COMMIT).write_bytes(sealed_bytes(data))
        (finding,) = cc.verify(cache, quick=True)
        assert finding.path == COMMIT
        assert "checksums.sha256 lists" in finding.problem

    def test_where_the_record_is_lost_the_checksums_still_name_its_files(self, cache: Path) -> None:
        for name in (COMMIT, SHARD, INDEX):
            flip(cache / name)
        assert {finding.path for finding in cc.verify(cache)} == {COMMIT, SHARD, INDEX}


class TestRepair:
    @pytest.mark.parametrize(
        "paths",
        thinned([
            [SHARD], [INDEX], [COMMIT], [LABELS], ["plan.parquet"], ["encoder.safetensors"],
            ["README.md", "checksums.sha256", "stats/channels.parquet", "errors.parquet"],
            ["latents.zarr/zarr.json", "latents.zarr/val/valid/c.0"],
            [SHARD, "plan.parquet", "encoder.safetensors", LABELS],
            [INDEX, "plan.parquet"], [COMMIT, "checksums.sha256"],
        ]),
        ids=lambda paths: "+".join(path.rpartition("/")[2] for path in paths),
    )  # fmt: skip
    @pytest.mark.parametrize("how", thinned(["flipped", "deleted"]))
    def test_afterwards_every_byte_is_as_it_was(
        self, cache: Path, whole: Path, paths: list[str], how: str
    ) -> None:
        for path in paths:
            flip(cache / path) if how == "flipped" else (cache / path).unlink()
        summary = cc.repair(cache)
        assert {finding.path for finding in summary.found} == set(paths)
        assert set(paths) <= set(summary.repaired)
        assert summary.remaining == ()
        assert summary.shards == (1 if {SHARD, INDEX, COMMIT} & set(paths) else 0)
        assert data_digests(cache) == data_digests(whole)

    def test_an_intact_cache_is_not_touched(self, cache: Path) -> None:
        before = {path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()}
        summary = cc.repair(cache, source=cache / "nowhere")
        assert (summary.found, summary.repaired) == ((), ())
        assert before == {
            path: path.stat().st_mtime_ns for path in cache.rglob("*") if path.is_file()
        }

    def test_the_plan_of_a_rescanned_cache_is_put_together_from_the_index(
        self, tmp_path: Path
    ) -> None:
        source = write_image_folder(tmp_path / "src", {"ant": 6, "bee": 4})
        out = tmp_path / "shards"
        cc.encode(source, out, SMALL)
        for number in range(5):
            picture(700 + number).save(source / "ant" / f"new{number}.jpg")
        cc.encode(source, out, with_options(rescan=True))
        before = data_digests(out)
        flip(out / "plan.parquet")
        shutil.rmtree(source)
        cc.repair(out)
        assert data_digests(out) == before

    def test_a_plan_that_nothing_can_restore_is_an_error_and_nothing_changes(
        self, cache: Path, source: Path, tmp_path: Path
    ) -> None:
        other = tmp_path / "other"
        shutil.copytree(source, other)
        (other / "ant" / "000.jpg").unlink()
        flip(cache / "plan.parquet")
        flip(cache / INDEX)
        before = data_digests(cache)
        with pytest.raises(errors.ManifestError, match=r"train shard 1 .*lists other images"):
            cc.repair(cache, source=other)
        assert data_digests(cache) == before

    def test_changed_source_images_are_named_and_their_shard_is_left_while_others_are_repaired(
        self, cache: Path, source: Path, whole: Path, tmp_path: Path
    ) -> None:
        other = tmp_path / "other"
        shutil.copytree(source, other)
        row = cc.open_cache(cache)["train"].record.rows_of(1)[0]
        key = _keys(whole)[row]
        picture(99).save(other / key)
        flip(cache / SHARD)
        flip(cache / SHARD.replace("c.1", "c.2"))
        damaged = (cache / SHARD).read_bytes()
        with pytest.raises(errors.SourceError, match=rf"1 source images .*{key}.*1 others"):
            cc.repair(cache, source=other)
        assert (cache / SHARD).read_bytes() == damaged
        assert {finding.path for finding in cc.verify(cache)} == {SHARD}
        cc.repair(cache, source=source)
        assert data_digests(cache) == data_digests(whole)

    @pytest.mark.parametrize("change", ["other picture", "no picture", "gone"])
    def test_without_an_index_a_changed_source_is_still_not_taken(
        self, cache: Path, source: Path, whole: Path, tmp_path: Path, change: str
    ) -> None:
        other = tmp_path / "other"
        shutil.copytree(source, other)
        path = other / _keys(whole)[4]
        if change == "other picture":
            picture(99).save(path)
        elif change == "no picture":
            path.write_bytes(b"nothing")
        else:
            path.unlink()
        flip(cache / INDEX)
        before = data_digests(cache)
        with pytest.raises(errors.SourceError, match=r"have changed|no longer gives"):
            cc.repair(cache, source=other)
        assert data_digests(cache) == before

    def test_a_source_that_moved_is_named_by_an_option(
        self, cache: Path, source: Path, whole: Path, tmp_path: Path
    ) -> None:
        manifest = json.loads((cache / "cache.json").read_text())
        manifest["source"] = str(tmp_path / "gone")
        (cache / "cache.json").write_bytes(sealed_bytes(manifest))
        flip(cache / SHARD)
        with pytest.raises(errors.SourceError, match="gone") as caught:
            cc.repair(cache)
        assert "--source" in str(caught.value.hint)
        assert cc.repair(cache, source=source).remaining == ()

    def test_a_damaged_encoder_needs_weights_of_the_same_digest(
        self, cache: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
        monkeypatch.setattr("ci2p_cache.encoding.repair.BUNDLED", ("none", 1, "mse"))
        flip(cache / "encoder.safetensors", 0.9)
        flip(cache / SHARD)
        summary = cc.repair(cache)
        assert {finding.path for finding in summary.remaining} == {"encoder.safetensors", SHARD}
        assert any("--weights FILE" in finding.problem for finding in summary.remaining)
        file = tmp_path / "mine.safetensors"
        shutil.copy(whole / "encoder.safetensors", file)
        assert cc.repair(cache, weights=file).remaining == ()
        assert data_digests(cache) == data_digests(whole)

    def test_a_shard_of_a_device_that_is_not_here_is_refused(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        data = json.loads((cache / COMMIT).read_text())
        data["numerics"]["device_type"] = "cuda"
        (cache / COMMIT).write_bytes(sealed_bytes(data))
        (cache / "checksums.sha256").unlink()
        flip(cache / SHARD)
        before = data_digests(cache)
        with pytest.raises(errors.RefusedError, match="cuda"):
            cc.repair(cache)
        assert data_digests(cache) == before

    def test_a_shard_of_other_software_is_repaired_with_a_notice(self, cache: Path) -> None:
        data = json.loads((cache / COMMIT).read_text())
        data["numerics"]["torch"] = "1.0"
        (cache / COMMIT).write_bytes(sealed_bytes(data))
        (cache / "checksums.sha256").unlink()
        flip(cache / SHARD)
        told = Told()
        summary = cc.repair(cache, observer=told)
        assert any("torch 1.0 then" in text for text in told.notices)
        assert summary.remaining == ()
        assert not cc.verify(cache)

    @pytest.mark.slow
    def test_one_whose_records_name_compressai_comes_back_byte_for_byte(self, cache: Path) -> None:
        computed_by_compressai(cache)
        assert cc.repair(cache).remaining == ()
        before = {path: path.read_bytes() for path in cache.rglob("*") if path.is_file()}
        for damaged in (SHARD, COMMIT, INDEX):
            flip(cache / damaged)
            told = Told()
            assert cc.repair(cache, observer=told).remaining == ()
            assert told.notices == []
            assert {path: path.read_bytes() for path in before} == before

    def test_one_that_is_being_encoded_gets_its_committed_shards_back(
        self, cache: Path, whole: Path
    ) -> None:
        data = json.loads((cache / "cache.json").read_text())
        (cache / "cache.json").write_bytes(sealed_bytes(data | {"state": "encoding", "files": []}))
        flip(cache / SHARD)
        (cache / COMMIT.replace("1.json", "2.json")).unlink()
        summary = cc.repair(cache)
        assert kinds(summary.remaining) == {("cache.json", "unfinished")}
        assert (cache / SHARD).read_bytes() == (whole / SHARD).read_bytes()

    def test_it_waits_for_no_other_writer(self, cache: Path) -> None:
        with locked(cache / ".lock", what="encode"):
            with pytest.raises(errors.LockedError, match="this repair changed nothing"):
                cc.repair(cache)


def test_other_decoders_than_the_caches_change_and_compare_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(cache / SHARD)
    damaged = (cache / SHARD).read_bytes()
    monkeypatch.setattr("ci2p_cache.encoding.shard.decoder_name", lambda: "another 9.9")
    for call in (lambda: cc.repair(cache), lambda: cc.reencode(cache, 1)):
        with pytest.raises(errors.FingerprintMismatchError, match=r"here is another 9\.9") as told:
            call()
        assert str(told.value.hint).startswith("install ")
    assert (cache / SHARD).read_bytes() == damaged


class TestReencode:
    def test_an_intact_cache_gives_the_same_values(self, whole: Path) -> None:
        summary = cc.reencode(whole, 1000)
        assert summary.rows == summary.compared == NUM_GOOD
        assert (summary.differing_values, summary.findings, summary.changed) == (0, (), ())
        views = {name: split.num_views for name, split in cc.open_cache(whole).items()}
        rows = {name: len(split.valid_rows) for name, split in cc.open_cache(whole).items()}
        assert summary.values == sum(views[n] * rows[n] for n in rows) * 192 * 2 * 2

    def test_the_draw_depends_on_the_seed_alone(self, whole: Path) -> None:
        assert cc.reencode(whole, 3, seed=1) == cc.reencode(whole, 3, seed=1)
        assert cc.reencode(whole, 3).rows == 3

    def test_a_value_that_was_wrong_from_the_start_is_found(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Every checksum is right: only encoding again can tell.
        honest = CODECS["zstd"].encode

        def wrong(self: ChunkCodec, raw: memoryview) -> bytes:
            changed = np.frombuffer(raw, np.int8).copy()
            changed[17] ^= 1
            return honest(self, memoryview(changed.tobytes()))

        monkeypatch.setattr(CODECS["zstd"], "encode", wrong)
        cc.encode(source, tmp_path / "out", with_options(max_errors="1", views="none"))
        monkeypatch.undo()
        summary = cc.reencode(tmp_path / "out", 5)
        assert [finding.kind for finding in summary.findings] == ["differs"] * 5
        assert summary.differing_values == 5
        assert summary.largest_difference == 1
        assert "1 of 768 values" in summary.findings[0].problem

    def test_a_changed_source_is_named_and_not_compared(
        self, whole: Path, source: Path, tmp_path: Path
    ) -> None:
        other = tmp_path / "other"
        shutil.copytree(source, other)
        picture(5).save(other / "ant" / "000.jpg")
        summary = cc.reencode(whole, 1000, source=other)
        assert (summary.rows, summary.compared, summary.findings) == (NUM_GOOD, NUM_GOOD - 1, ())
        assert summary.changed[0].startswith("ant/000.jpg")

    def test_other_software_gives_counts_and_no_findings(self, cache: Path) -> None:
        for path in (cache / "commits").iterdir():
            data = json.loads(path.read_text())
            data["numerics"]["torch"] = "1.0"
            path.write_bytes(sealed_bytes(data))
        assert cc.reencode(cache, 1000).other_software == NUM_GOOD

    def test_who_computed_the_same_bits_is_no_other_software(self, cache: Path) -> None:
        computed_by_compressai(cache)
        summary = cc.reencode(cache, 1000)
        assert (summary.compared, summary.other_software, summary.findings) == (NUM_GOOD, 0, ())


class TestCommand:
    @pytest.fixture
    def run(
        self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> Callable[..., tuple[int, str, str]]:
        def run(*arguments: object) -> tuple[int, str, str]:
            monkeypatch.setattr(sys, "argv", ["ci2p-cache", "verify", *map(str, arguments)])
            capfd.readouterr()
            with pytest.raises(SystemExit) as ended:
                run_command()
                sys.exit(0)
            return (int(ended.value.code or 0), *capfd.readouterr())

        return run

    def test_the_hint_of_a_finding_pasted_repairs(
        self, run: Callable[..., tuple[int, str, str]], cache: Path, whole: Path
    ) -> None:
        flip(cache / SHARD)
        code, out, err = run(cache)
        assert code == 5
        assert SHARD in out
        assert f"ci2p-cache verify {cache} --repair" in err
        code, out, err = run(cache, "--repair")
        assert code == 0, err
        assert "1 shards" in out
        assert "every byte is as first committed" in out
        assert data_digests(cache) == data_digests(whole)
        assert run(cache)[0] == 0

    def test_json_holds_everything(
        self, run: Callable[..., tuple[int, str, str]], cache: Path
    ) -> None:
        flip(cache / LABELS)
        (cache / "index" / "odd.txt").write_text("x")
        code, out, err = run(cache, "--repair", "--reencode", "2", "--seed", "3", "--json")
        shown = json.loads(out)
        assert code == 5
        assert [finding["kind"] for finding in shown["findings"]] == ["foreign"]
        assert shown["repair"]["repaired"] == [LABELS]
        assert shown["reencode"]["differing_values"] == 0
        assert f"rm {cache}/index/odd.txt" in err

    def test_flags_that_contradict_each_other_are_refused(
        self, run: Callable[..., tuple[int, str, str]], cache: Path
    ) -> None:
        assert run(cache, "--quick", "--repair")[0] == 2
        assert run(cache, "--weights", "x.safetensors")[0] == 2
        assert run(cache, "--reencode", "0")[0] == 2
        assert run(cache, "--quick", "--reencode", "1")[0] == 0


def _keys(root: Path) -> list[str]:
    """Keys of the train split, by row."""
    return pq.read_table(sorted((root / "index").glob("train-*")))["key"].to_pylist()
