"""Hints: what is to be pasted is quoted, and a damaged manifest leaves a way on."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.cache.commit import read_commit
from ci2p_cache.cache.index import read_index
from ci2p_cache.cache.summary import describe, describe_sample
from ci2p_cache.encoder.load import load_encoder
from ci2p_cache.encoder.weights import WeightsCard, tensor_digest, weights_bytes
from ci2p_cache.errors import command
from ci2p_cache.pictures.previews import draw_preview
from tests.support.caches import data_digests, flip, with_options
from tests.support.pictures import write_image_folder
from tests.support.seals import reseal
from tests.support.tiers import thinned

ODD = 'it\'s a "cache" $HOME;x'
SHARD = "latents.zarr/train/latents/c.0.0.0.0.0"
COMMIT = "commits/train-000000.json"
INDEX = "index/train-000000.parquet"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hints") / ODD
    write_image_folder(root / "src", {"ant": 5, "bee": 4})
    cc.encode(root / "src", root / "shards", with_options())
    return root / "shards"


@pytest.fixture
def cache(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / ODD / "shards")
    return tmp_path / ODD / "shards"


def wrong_label(root: Path) -> None:
    table = pq.read_table(root / INDEX)
    number = table.column_names.index("label")
    labels = pa.array([99] * table.num_rows, pa.int32())
    table = table.set_column(number, table.schema.field("label"), labels)
    pq.write_table(table, root / INDEX)
    reseal(root)


def flipped(name: str) -> Callable[[Path], None]:
    return lambda root: flip(root / name)


REPAIR: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "shard": (flipped(SHARD), lambda r: [cc.open_cache(r)["train"][i] for i in range(4)]),
    "commit": (flipped(COMMIT), lambda r: read_commit(r, "train", 0)),
    "index": (lambda r: (r / INDEX).write_bytes(b"PAR1"), lambda r: read_index(r, "train", 0)),
    "labels": (
        flipped("latents.zarr/train/labels/c.0"), lambda r: cc.open_cache(r)["train"].labels),
    "plan": (flipped("plan.parquet"), lambda r: cc.encode(r.parent, r, with_options())),
    "sample": (wrong_label, lambda r: describe_sample(cc.open_cache(r), "train", row=0)),
}  # fmt: skip


@pytest.mark.parametrize("case", REPAIR)
def test_the_command_that_repairs_can_be_pasted(cache: Path, case: str, whole: Path) -> None:
    damage, act = REPAIR[case]
    damage(cache)
    if case == "plan":
        act = lambda root: cc.encode(whole.parent / "src", root, with_options())  # noqa: E731
    with pytest.raises(errors.IntegrityError) as caught:
        act(cache)
    hint = str(caught.value.hint)
    assert shlex.split(hint) == ["ci2p-cache", "verify", str(cache), "--repair"]


def test_the_command_that_goes_on_can_be_pasted(cache: Path, whole: Path) -> None:
    import json

    from tests.support.seals import write_json

    data = json.loads((cache / "cache.json").read_text())
    write_json(cache / "cache.json", data | {"state": "encoding", "files": []})
    wanted = ["ci2p-cache", "encode", str(whole.parent / "src"), "--out", str(cache)]
    with pytest.raises(errors.IncompleteCacheError) as caught:
        cc.open_cache(cache)
    assert shlex.split(str(caught.value.hint).partition("   (")[0]) == wanted
    (cache / COMMIT).unlink()
    with pytest.raises(errors.IncompleteCacheError) as caught:
        describe_sample(cc.open_cache(cache, partial=True), "train", row=0)
    assert shlex.split(str(caught.value.hint).partition("   (")[0]) == wanted


def test_the_commands_for_no_cache_and_a_lost_source_can_be_pasted(cache: Path) -> None:
    with pytest.raises(errors.NotACacheError) as caught:
        cc.open_cache(cache / "no cache")
    assert shlex.split(str(caught.value.hint))[-1] == str(cache / "no cache")
    flip(cache / SHARD)
    with pytest.raises(errors.SourceError) as lost:
        cc.repair(cache, source=cache / "no where")
    assert shlex.split(str(lost.value.hint).partition("   (")[0])[:4] == [
        "ci2p-cache", "verify", str(cache), "--repair",
    ]  # fmt: skip


def test_labels_beyond_the_classes_name_a_command_that_can_be_pasted(cache: Path) -> None:
    import json

    from tests.support.seals import write_json

    wrong_label(cache)
    data = json.loads((cache / "cache.json").read_text())
    for split in data["splits"].values():
        split |= {"valid_rows": None}
    write_json(cache / "cache.json", data | {"state": "encoding", "files": []})
    with pytest.raises(errors.ManifestError, match="label 99") as caught:
        describe(cc.open_cache(cache, partial=True))
    assert shlex.split(str(caught.value.hint))[2] == str(cache)


def test_a_near_key_can_be_pasted(whole: Path, tmp_path: Path) -> None:
    source = write_image_folder(tmp_path / "src", {"red ant": 3, "bee": 1})
    cc.encode(source, tmp_path / "out", with_options(val_fraction=0))
    with pytest.raises(errors.UsageError) as caught:
        describe_sample(cc.open_cache(tmp_path / "out"), "train", key="001.jpg")
    assert caught.value.hint == "did you mean 'red ant/001.jpg'?"


def test_a_command_is_one_line_of_shell_words() -> None:
    words = ["verify", Path("a b"), "it's", "$x"]
    assert shlex.split(command(*words)) == ["ci2p-cache", *map(str, words)]
    assert command("verify", "x", note="why") == "ci2p-cache verify x   (why)"


class TestDamagedManifest:
    @pytest.mark.parametrize(
        "how", thinned(["flipped", "half", "empty", "a list", "edited", "link"], step=4)
    )
    @pytest.mark.parametrize("act", ["encode", "verify", "repair", "open"])
    def test_every_command_names_it_leaves_the_folder_and_says_what_gets_on(
        self, cache: Path, whole: Path, how: str, act: str
    ) -> None:
        path = cache / "cache.json"
        content = path.read_bytes()
        if how == "flipped":
            flip(path)
        elif how == "link":
            path.unlink()
            path.symlink_to(whole / "cache.json")
        else:
            changed = {
                "half": content[: len(content) // 2],
                "empty": b"",
                "a list": b"[]",
                "edited": content.replace(b'"bee"', b'"eel"'),
            }
            path.write_bytes(changed[how])
        before = data_digests(cache)
        run: dict[str, Callable[[], Any]] = {
            "encode": lambda: cc.encode(whole.parent / "src", cache, with_options()),
            "verify": lambda: cc.verify(cache),
            "repair": lambda: cc.repair(cache),
            "open": lambda: cc.open_cache(cache),
        }
        with pytest.raises(errors.ManifestError, match=r"cache\.json") as caught:
            run[act]()
        assert caught.value.exit_code == 5
        assert "put cache.json back from a backup" in str(caught.value.hint)
        assert data_digests(cache) == before
        path.unlink()
        path.write_bytes(content)
        assert cc.encode(whole.parent / "src", cache, with_options()).encoded_now == 0


class TestOtherEncoder:
    @pytest.fixture
    def swapped(self, cache: Path) -> Path:
        """An intact encoder of the same architecture and other weights, digests made to fit."""
        path = cache / "encoder.safetensors"
        tensors = load_file(path)
        name = next(name for name in sorted(tensors) if name.startswith("g_s"))
        tensors[name] = tensors[name] + 0.25
        spec = load_encoder("bundled").spec
        card = WeightsCard(
            arch=spec.arch,
            quality=spec.quality,
            metric=spec.metric,
            weights_sha256=tensor_digest(tensors),
        )
        path.write_bytes(weights_bytes(tensors, card))
        reseal(cache)
        return cache

    def test_a_picture_is_not_drawn_with_it(self, swapped: Path, tmp_path: Path) -> None:
        with pytest.raises(errors.DigestError, match="not the encoder that made") as caught:
            draw_preview(cc.open_cache(swapped), tmp_path / "look.png")
        assert caught.value.exit_code == 5
        assert shlex.split(str(caught.value.hint))[2] == str(swapped)
        assert not (tmp_path / "look.png").exists()

    def test_nor_is_anything_encoded_again_with_it(self, swapped: Path) -> None:
        with pytest.raises(errors.DigestError, match="`weights_sha256`"):
            cc.reencode(swapped, 1)
        flip(swapped / SHARD)
        with pytest.raises(errors.DigestError, match="`weights_sha256`"):
            cc.repair(swapped)
