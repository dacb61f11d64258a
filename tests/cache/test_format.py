"""The format is what its page says: a reader written from the page alone reads what ours reads."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ci2p_cache as cc
from tests.support import format_reader
from tests.support.commands import REPO
from tests.support.pictures import write_image_folder
from tests.support.seals import write_json

PAGE = REPO / "ci2p_cache" / "cache" / "README.md"
READER = Path(format_reader.__file__)

OPTIONS = cc.EncodeOptions(
    encoder="bundled", size=32, shard_samples=5, val_fraction=0.25, max_errors="1", workers=1
)
ENCODED: dict[str, dict[str, Any]] = {
    "int8": {},
    # Of one row each, so that a shard holds nothing but a hole; a step that float32 has to round.
    "int16": {
        "dtype": "int16", "step": 0.3, "views": "none", "codec": "none", "shard_samples": 1,
        "split": "hashed",
    },
    "float16": {"dtype": "float16", "views": "crops:2", "format": "both", "val_fraction": 0.0},
    "int16 folded": {"dtype": "int16", "step": 0.05, "fold": True, "codec": "lz4"},
    "augmented": {"views": "crops:2", "augment": "authors"},
}  # fmt: skip
CONVERTED: dict[str, tuple[str, dict[str, Any]]] = {
    "int8 raw": ("int8", {"format": "zarr", "codec": "none"}),
    "int8 tars": ("int8", {"format": "webdataset"}),
    "int8 folded": ("int8", {"format": "both", "fold": True}),
    "float16 tars": ("float16", {"format": "webdataset"}),
}
FORMAT_1 = {
    f"first {kind}": ENCODED[kind] | {"split": "hashed"} for kind in ("int8", "int16", "float16")
}
KINDS = (*ENCODED, *CONVERTED, *FORMAT_1)


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same 12 images, one of which is none, as each kind of cache; read only."""
    root = tmp_path_factory.mktemp("format")
    source = write_image_folder(root / "src", {"ant": 5, "b\u00e4r": 4, "cat": 3})
    (source / "ant" / "002.jpg").write_bytes(b"no image")
    for kind, options in ENCODED.items():
        cc.encode(source, root / kind, dataclasses.replace(OPTIONS, **options))
    for kind, (made_from, options) in CONVERTED.items():
        cc.convert(root / made_from, root / kind, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ci2p_cache.encoding.intent.FORMAT_VERSION", 1)
        for kind, options in FORMAT_1.items():
            cc.encode(source, root / kind, dataclasses.replace(OPTIONS, **options))
    return {kind: root / kind for kind in KINDS}


def flipped(path: Path, place: int) -> bytes:
    data = bytearray(path.read_bytes())
    data[place] ^= 0x10
    return bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_the_pages_reader_reads_every_row_bitwise_as_open_cache_does(
    caches: dict[str, Path], kind: str
) -> None:
    cache = cc.open_cache(caches[kind])
    num_holes = 0
    for name, split in cache.items():
        parts = [split.read_index(shard) for shard in range(split.record.num_shards)]
        keys = [key for part in parts for key in part["key"].to_pylist()]
        found = list(format_reader.read_rows(caches[kind], name, range(split.num_rows)))
        assert [row.row for row in found] == list(range(split.num_rows))
        assert [row.key for row in found] == keys
        assert [row.label for row in found] == split.labels.tolist()
        assert [row.latents is not None for row in found] == split.valid.tolist()
        for row in found:
            if row.latents is None:
                num_holes += 1
                continue
            wanted = split[row.row][0].numpy()
            assert row.latents.dtype == wanted.dtype == np.float32
            assert row.latents.shape == wanted.shape
            assert row.latents.tobytes() == wanted.tobytes()
    assert num_holes == 1


def test_rows_come_in_the_order_asked_for_and_others_are_refused(caches: dict[str, Path]) -> None:
    found = format_reader.read_rows(caches["int8"], "train", [7, 0, 7])
    assert [row.row for row in found] == [7, 0, 7]
    for split, row, told in (("train", -1, "no row -1"), ("train", 99, "no row"), ("x", 0, "no s")):
        with pytest.raises(format_reader.FormatError, match=told):
            list(format_reader.read_rows(caches["int8"], split, [row]))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("int8", "latents.zarr/train/latents/c.0.0.0.0.0"),
        ("int8", "latents.zarr/train/labels/c.0"),
        ("int8", "latents.zarr/train/valid/c.0"),
        ("int8", "index/train-000000.parquet"),
        ("int16", "latents.zarr/train/latents/c.0.0.0.0.0"),
        ("int8 tars", "tar/train-000000.tar"),
    ],
)
def test_a_flipped_byte_in_a_file_is_refused(
    caches: dict[str, Path], kind: str, name: str, tmp_path: Path
) -> None:
    shutil.copytree(caches[kind], tmp_path / "shards")
    path = tmp_path / "shards" / name
    whole = path.read_bytes()
    for place in (0, len(whole) // 2, len(whole) - 1):
        path.write_bytes(flipped(caches[kind] / name, place))
        with pytest.raises(format_reader.FormatError, match=re.escape(f"sha256 differs: {path}")):
            list(format_reader.read_rows(tmp_path / "shards", "train", [0]))
    path.write_bytes(whole)
    assert len(list(format_reader.read_rows(tmp_path / "shards", "train", [0]))) == 1


@pytest.mark.parametrize("name", ["cache.json", "commits/train-000000.json"])
def test_a_flipped_byte_anywhere_in_a_record_is_refused(
    caches: dict[str, Path], name: str, tmp_path: Path
) -> None:
    shutil.copytree(caches["int8"], tmp_path / "shards")
    path = tmp_path / "shards" / name
    for place in range(0, path.stat().st_size, 37):
        path.write_bytes(flipped(caches["int8"] / name, place))
        with pytest.raises(format_reader.FormatError, match=re.escape(str(path))):
            list(format_reader.read_rows(tmp_path / "shards", "train", [0]))


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("cache.json", {"format_version": 3}, "unknown format_version 3"),
        ("cache.json", {"state": "encoding"}, "state is 'encoding'"),
        ("cache.json", {"colour": "blue"}, "unknown or missing fields .'colour'"),
        ("commits/train-000000.json", {"format_version": 0}, "unknown format_version 0"),
        ("commits/train-000000.json", {"shard": 1}, "the record is of"),
        ("commits/train-000000.json", {"fingerprint": "0" * 64}, "the record is of"),
        ("commits/train-000000.json", {"index_crc32c": 1}, "crc32c"),
    ],
)
@pytest.mark.parametrize("kind", ["int8", "int8 tars"])
def test_a_record_that_says_something_else_is_refused_although_its_digest_fits(
    caches: dict[str, Path], kind: str, name: str, change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    shutil.copytree(caches[kind], tmp_path / "shards")
    path = tmp_path / "shards" / name
    write_json(path, json.loads(path.read_text()) | change)
    with pytest.raises(format_reader.FormatError, match=told):
        list(format_reader.read_rows(tmp_path / "shards", "train", [0]))


def test_the_reader_knows_the_check_value_of_crc32c() -> None:
    assert format_reader.crc32c(b"123456789") == 0xE3069283


def test_the_reader_imports_nothing_of_ours() -> None:
    imported = set()
    for node in ast.walk(ast.parse(READER.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(str(node.module).partition(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy", "numcodecs", "pyarrow", "zstandard"}


def test_the_reader_prints_rows_where_nothing_of_ours_can_be_imported(
    caches: dict[str, Path], tmp_path: Path
) -> None:
    script = shutil.copy(READER, tmp_path)
    told = subprocess.run(
        [sys.executable, "-I", script, caches["int8"], "train", "--rows", "3"],
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    train = cc.open_cache(caches["int8"])["train"]
    lines = [line.split("\t") for line in told.stdout.splitlines()]
    assert [line[0] for line in lines] == ["0", "1", "2"]
    for row, _, label, digest in lines:
        if train.valid[int(row)]:
            wanted, wanted_label = train[int(row)]
            assert int(label) == wanted_label
            assert digest == hashlib.sha256(wanted.numpy().tobytes()).hexdigest()
        else:
            assert digest == "-"


def digest_of_what_is_not_computed(cache: Path) -> str:
    """Over the plan, labels, marks of validity and zarr's metadata, which no arithmetic enters."""
    digest = hashlib.sha256()
    for pattern in ("plan.parquet", "latents.zarr/**/zarr.json", "latents.zarr/*/*/c.0"):
        for path in sorted(cache.glob(pattern)):
            digest.update(path.relative_to(cache).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def test_every_allowed_python_and_library_writes_these_bytes(caches: dict[str, Path]) -> None:
    """Who changes them: a cache is no longer finished and repaired to one sequence of bytes."""
    wanted = ("int8", "int16", "float16", *FORMAT_1)
    assert {kind: digest_of_what_is_not_computed(caches[kind]) for kind in wanted} == {
        "int8": "4b314aa050171843c746d6556a0fe1f03b509629ac6b46eae99de70384e954ea",
        "int16": "5830fb26c232806818c2178857dd45fa83b0d7f72ed779efac485d469db8d238",
        "float16": "cf51e697462cc9555d51af0c3810b1c6a04de91d024c18b3dcd0009069cff3cf",
        "first int8": "d1f2a7f0acbf62b8acf1c531933f6c1b6ca1cdb573191c96e9a61c95d070f7b8",
        "first int16": "d37c00e4458408af4959a916c0a31bf2b3cdec9ff1edff5f0cf40c1566f62973",
        "first float16": "d9f7795953c0cc906350bd96e14c86d7edbe8960176e8a27424f17bf541b7901",
    }


@pytest.mark.parametrize("version", ["9.0.1", "126.10.0-SNAPSHOT"])
def test_which_pyarrow_wrote_a_cache_enters_no_file(
    caches: dict[str, Path], version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table = pq.write_table

    def by_another(table: pa.Table, sink: io.BytesIO, **options: Any) -> None:
        own = io.BytesIO()
        write_table(table, own, **options)
        start, tail, end = own.getvalue().rpartition(b"parquet-cpp-arrow version ")
        told = tail + version.encode()
        rest = end[start[-1] - len(tail) : -8]
        length = int.from_bytes(end[-8:-4], "little") + len(told) - start[-1]
        sink.write(start[:-1] + bytes([len(told)]) + told + rest)
        sink.write(length.to_bytes(4, "little") + b"PAR1")
        sink.seek(0)
        assert pq.read_metadata(sink).created_by == told.decode()
        sink.seek(0, io.SEEK_END)

    monkeypatch.setattr(pq, "write_table", by_another)
    cc.encode(caches["int8"].parent / "src", tmp_path / "shards", OPTIONS)
    names = [p.relative_to(tmp_path / "shards") for p in (tmp_path / "shards").rglob("*.parquet")]
    assert len(names) >= 5
    for name in names:
        assert (tmp_path / "shards" / name).read_bytes() == (caches["int8"] / name).read_bytes()
    assert cc.verify(tmp_path / "shards") == []


def filled(value: Any, words: dict[str, Any]) -> Any:
    """Puts a cache's own values in the place of the page's words."""
    if isinstance(value, dict):
        return {name: filled(each, words) for name, each in value.items()}
    if isinstance(value, list):
        return [filled(each, words) for each in value]
    return words.get(value, value) if isinstance(value, str) else value


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "tars" not in kind])
def test_the_arrays_metadata_are_the_pages(caches: dict[str, Path], kind: str) -> None:
    (block,) = re.findall(r"```json\n(.*?)```", PAGE.read_text(), re.DOTALL)
    manifest = json.loads((caches[kind] / "cache.json").read_text())
    latent, layout = manifest["fingerprint"]["latent"], manifest["layout"]
    item = np.dtype(latent["dtype"]).itemsize
    raw = item * latent["channels"] * latent["height"] * latent["width"]
    blosc = {
        "typesize": item if layout.get("fold") else max(2, item),
        "cname": {"zstd": "zstd", "lz4": "lz4hc"}.get(layout["codec"]),
        "clevel": layout["level"], "shuffle": "bitshuffle", "blocksize": raw,
    }  # fmt: skip
    codecs: list[Any] = [{"name": "blosc", "configuration": blosc}, {"name": "crc32c"}]
    if layout["codec"] == "none":
        del codecs[0]
    elif manifest["format_version"] == 1:
        codecs = [{"name": "zstd", "configuration": {"level": 1, "checksum": True}}]
    dtype, fold = latent["dtype"], layout.get("fold", False)
    for name, sizes in manifest["splits"].items():
        words = {
            "N": sizes["rows"],
            "V": sizes["views"],
            "S": sizes["shard_rows"],
            "M": latent["channels"],
            "h": latent["height"],
            "w": latent["width"],
            "DTYPE": f"u{dtype}" if fold else dtype,
            "FILL": {"int8": -128, "int16": -32768, "float16": "NaN"}[dtype]
            if not fold
            else {"int8": 255, "int16": 65535}[dtype],
            "SCALE": latent["step"],
            "OFFSET": manifest["offset"],
        }
        text = (caches[kind] / f"latents.zarr/{name}/latents/zarr.json").read_text()
        wanted = filled(json.loads(block), words)
        found = json.loads(text)
        inner = found["codecs"][0]["configuration"]["codecs"]
        if latent["dtype"] != "int8":
            assert inner[0].pop("configuration") == {"endian": "little"}
        assert inner[1:] == codecs
        wanted["codecs"][0]["configuration"]["codecs"] = inner
        if fold:
            attributes = found["attributes"]
            symbols = eval(attributes.pop("unfold").partition(" = ")[2], {"code": np.arange(6)})
            assert symbols.tolist() == [0, -1, 1, -2, 2, -3]
            if dtype == "int8":
                assert sorted(attributes["values"]) == [*range(-128, 128)]
                assert attributes.pop("values")[:6] == symbols.tolist()
        assert found == wanted
