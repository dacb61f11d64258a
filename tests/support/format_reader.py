"""A second reader of the cache, written from ci2p_cache/cache/README.md alone.

It shares no code with the package and imports none of it: the standard library, numpy, zstandard
for zstd frames, numcodecs for Blosc buffers and pyarrow for the index's parquet.
tests/cache/test_format.py compares it with the first reader, so that the page stays a
specification. It favours plainness over speed: a shard is read whole, every digest that the page
gives is checked, and crc32c runs a byte at a time.

    python tests/support/format_reader.py CACHE SPLIT --rows 100
"""

import argparse
import functools
import hashlib
import io
import json
import math
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numcodecs.blosc
import numpy as np
import pyarrow.parquet
import zstandard

FORMAT_VERSIONS = (1, 2)
MANIFEST_FIELDS = (
    "format_version software state fingerprint layout source classes class_titles splits plan "
    "encoder offset files sha256"
)
FINGERPRINT_FIELDS = {
    "image": "size resize_side interpolation exif max_pixels decoder",
    "views": "kind num_crops seed",
    "encoder": "arch quality metric weights_sha256 precision",
    "latent": "dtype step channels height width",
}
AUGMENT_FIELDS = "min_area rand_augment magnitude trivial_augment grey blur solarize erasing"
LAYOUT_FIELDS = {1: "val_fraction seed shard_samples limit format codec level"}
LAYOUT_FIELDS[2] = LAYOUT_FIELDS[1] + " fold split"
SPLIT_FIELDS = "rows views shard_rows valid_rows bytes source_bytes clipped exif_turned names_split"
FILE_FIELDS = "path bytes sha256"
COMMIT_FIELDS = (
    "format_version split shard first_row rows valid_rows plan_sha256 fingerprint index_crc32c "
    "files numerics sha256"
)
HOLE = 2**64 - 1


class FormatError(ValueError):
    """What is there is not a complete cache of version 1 or 2, or not what was written."""


class Row(NamedTuple):
    """One row as the cache has it; `latents` is float32 (V, M, h, w), None where there is none."""

    row: int
    key: str
    label: int
    latents: np.ndarray | None


class Shard(NamedTuple):
    """One shard in memory: its record, its columns of the index and its stored values."""

    commit: dict[str, Any]
    columns: dict[str, list[Any]]
    stored: list[np.ndarray | None]


def _crc32c_table() -> tuple[int, ...]:
    """The 256 remainders of Castagnoli's polynomial, reflected (RFC 3720, appendix B.4)."""
    table = []
    for remainder in range(256):
        for _ in range(8):
            remainder = (remainder >> 1) ^ (0x82F63B78 if remainder & 1 else 0)
        table.append(remainder)
    return tuple(table)


_TABLE = _crc32c_table()


def crc32c(data: bytes) -> int:
    """The crc32c of `data`; of b"123456789" it is 0xE3069283."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ _TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _require(holds: bool, what: str, where: Path) -> None:
    if not holds:
        raise FormatError(f"{what}: {where}")


def _require_fields(record: dict[str, Any], fields: str, where: Path, optional: str = "") -> None:
    odd = sorted((set(record) ^ set(fields.split())) - set(optional.split()))
    _require(not odd, f"unknown or missing fields {odd}", where)


def _read_sealed(path: Path, fields: str, optional: str = "") -> dict[str, Any]:
    """Reads a JSON file that vouches for itself: version first, then the seal, then the fields."""
    data = path.read_bytes()
    try:
        record = json.loads(data)
    except ValueError as error:
        raise FormatError(f"not JSON, {error}: {path}") from error
    _require(isinstance(record, dict), "not a JSON object", path)
    version = record.get("format_version")
    _require(version in FORMAT_VERSIONS, f"unknown format_version {version!r}", path)
    seal = str(record.get("sha256"))
    _require(len(seal) == 64, "it has no sha256", path)
    before, _, after = data.rpartition(seal.encode())
    blank = before + b"0" * 64 + after
    _require(hashlib.sha256(blank).hexdigest() == seal, "its sha256 does not fit", path)
    _require_fields(record, fields, path, optional)
    for entry in record["files"]:
        _require_fields(entry, FILE_FIELDS, path)
    return record


def _read_listed(folder: Path, files: list[dict[str, Any]], name: str) -> bytes:
    """Reads the file `name`, which the list `files` must have with its size and digest."""
    path = folder / name
    found = [entry for entry in files if entry["path"] == name]
    _require(len(found) == 1, "not vouched for", path)
    data = path.read_bytes()
    _require(len(data) == found[0]["bytes"], f"{len(data)} bytes, not as recorded", path)
    _require(hashlib.sha256(data).hexdigest() == found[0]["sha256"], "its sha256 differs", path)
    return data


def open_manifest(folder: Path) -> dict[str, Any]:
    """Reads cache.json, its version, digest and fields checked; its state must be complete."""
    path = folder / "cache.json"
    manifest = _read_sealed(path, MANIFEST_FIELDS, "class_order")
    fingerprint = manifest["fingerprint"]
    _require_fields(fingerprint, " ".join(["format_version", *FINGERPRINT_FIELDS]), path)
    for part, fields in FINGERPRINT_FIELDS.items():
        _require_fields(fingerprint[part], fields, path, "augment" if part == "views" else "")
    if "augment" in fingerprint["views"]:
        _require_fields(fingerprint["views"]["augment"], AUGMENT_FIELDS, path)
    _require_fields(manifest["layout"], LAYOUT_FIELDS[manifest["format_version"]], path)
    for split in manifest["splits"].values():
        _require_fields({"names_split": False, **split}, SPLIT_FIELDS, path)
    for entry in (manifest["plan"], manifest["encoder"]):
        _require_fields(entry, FILE_FIELDS, path)
    _require(manifest["state"] == "complete", f"state is {manifest['state']!r}", path)
    return manifest


def fingerprint_digest(manifest: dict[str, Any]) -> str:
    """The digest of the fingerprint that every commit record carries."""
    text = json.dumps(manifest["fingerprint"], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def read_commit(folder: Path, manifest: dict[str, Any], split: str, shard: int) -> dict[str, Any]:
    """Reads one shard's commit record and holds it against the manifest."""
    path = folder / "commits" / f"{split}-{shard:06d}.json"
    commit = _read_sealed(path, COMMIT_FIELDS)
    sizes = manifest["splits"][split]
    first_row = shard * sizes["shard_rows"]
    rows = min(sizes["shard_rows"], sizes["rows"] - first_row)
    names = ("format_version", "split", "shard", "first_row", "rows", "fingerprint")
    got = [commit[name] for name in names]
    version = manifest["format_version"]
    want = [version, split, shard, first_row, rows, fingerprint_digest(manifest)]
    _require(got == want, f"the record is of {got}, not of {want}", path)
    return commit


def _read_array(folder: Path, manifest: dict[str, Any], split: str, name: str) -> np.ndarray:
    """Reads `labels` (N,) int32 or `valid` (N,) bool of a split."""
    rows = manifest["splits"][split]["rows"]
    place = f"latents.zarr/{split}/{name}"
    description = json.loads(_read_listed(folder, manifest["files"], f"{place}/zarr.json"))
    dtype = np.dtype({"labels": "<i4", "valid": "?"}[name])
    found = (description["shape"], description["data_type"])
    _require(found == ([rows], dtype.name), f"(shape, data_type) is {found}", folder / place)
    raw = _unzstd(_read_listed(folder, manifest["files"], f"{place}/c.0"), folder / place)
    _require(len(raw) == rows * dtype.itemsize, "its chunk has another size", folder / place)
    return np.frombuffer(raw, dtype)


def _unzstd(frame: bytes, where: Path) -> bytes:
    try:
        return zstandard.ZstdDecompressor().decompress(frame, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise FormatError(f"zstd: {error}: {where}") from error


def _unblosc(buffer: bytes, codec: str, size: int, item_bytes: int, where: Path) -> bytes:
    """Decodes a Blosc buffer, after its header was held against what it must be."""
    _require(len(buffer) >= 16, "a Blosc buffer without header", where)
    version, _, flags, type_bytes, raw, _, stored = struct.unpack("<BBBBIII", buffer[:16])
    got = (version, flags >> 5, raw, stored)
    want = (2, {"lz4": 1, "zstd": 4}[codec], size, len(buffer))
    _require(got == want, f"a Blosc header of {got}, not {want}", where)
    _require(type_bytes in (item_bytes, max(2, item_bytes)), f"typesize {type_bytes}", where)
    try:
        return bytes(numcodecs.blosc.decompress(buffer))
    except RuntimeError as error:
        raise FormatError(f"Blosc: {error}: {where}") from error


def _latent(manifest: dict[str, Any]) -> tuple[np.dtype[Any], tuple[int, int, int]]:
    """The stored dtype, and (M, h, w)."""
    latent = manifest["fingerprint"]["latent"]
    dtype = np.dtype(latent["dtype"]).newbyteorder("<")
    return dtype, (latent["channels"], latent["height"], latent["width"])


def _read_chunks(
    folder: Path, manifest: dict[str, Any], commit: dict[str, Any]
) -> list[np.ndarray | None]:
    """Reads a zarr shard: per row the stored values (V, M, h, w), or None where it has holes."""
    sizes = manifest["splits"][commit["split"]]
    place = f"latents.zarr/{commit['split']}/latents"
    dtype, shape = _latent(manifest)
    chunk_bytes = math.prod(shape) * dtype.itemsize
    name = f"{place}/c.{commit['shard']}.0.0.0.0"
    path = folder / name
    data = _read_listed(folder, commit["files"], name)
    num_chunks = sizes["shard_rows"] * sizes["views"]
    index, (crc,) = data[-16 * num_chunks - 4 : -4], struct.unpack("<I", data[-4:])
    _require(crc32c(index) == crc == commit["index_crc32c"], "the shard index's crc32c", path)
    places = np.frombuffer(index, "<u8").reshape(-1, sizes["views"], 2).tolist()

    def chunk(offset: int, size: int) -> np.ndarray | None:
        if offset == size == HOLE:
            return None
        raw, codec = data[offset : offset + size], manifest["layout"]["codec"]
        if (manifest["format_version"], codec) == (1, "zstd"):
            raw = _unzstd(raw, path)
        else:
            raw, (crc,) = raw[:-4], struct.unpack("<I", raw[-4:])
            _require(crc32c(raw) == crc, f"the crc32c of the chunk at {offset}", path)
            if codec != "none":
                raw = _unblosc(raw, codec, chunk_bytes, dtype.itemsize, path)
        _require(len(raw) == chunk_bytes, f"the size of the chunk at {offset}", path)
        if manifest["layout"].get("fold"):
            codes = np.frombuffer(raw, f"<u{dtype.itemsize}").astype("<i4")
            return ((codes >> 1) ^ -(codes & 1)).astype(dtype).reshape(shape)
        return np.frombuffer(raw, dtype).reshape(shape)

    stored: list[np.ndarray | None] = []
    for row_places in places:
        chunks = [values for place in row_places if (values := chunk(*place)) is not None]
        _require(len(chunks) in (0, len(row_places)), "a row with some of its views", path)
        stored.append(np.stack(chunks) if chunks else None)
    _require(not any(values is not None for values in stored[commit["rows"] :]), "extra row", path)
    return stored[: commit["rows"]]


def _read_tar(
    folder: Path,
    manifest: dict[str, Any],
    commit: dict[str, Any],
    tar_offset: list[list[int] | None],
) -> list[np.ndarray | None]:
    """Reads a tar at the places of the index: per row the stored values (V, M, h, w), or None."""
    name = f"tar/{commit['split']}-{commit['shard']:06d}.tar"
    data = _read_listed(folder, commit["files"], name)
    dtype, shape = _latent(manifest)
    sizes = manifest["splits"][commit["split"]]
    table = np.full((sizes["shard_rows"], sizes["views"], 2), HOLE, "<u8")
    stored: list[np.ndarray | None] = []
    for place, offsets in enumerate(tar_offset):
        if offsets is None:
            stored.append(None)
            continue
        views = [np.frombuffer(data, dtype, math.prod(shape), offset) for offset in offsets]
        stored.append(np.stack(views).reshape(-1, *shape))
        table[place] = [(offset, views[0].nbytes) for offset in offsets]
    _require(crc32c(table.tobytes()) == commit["index_crc32c"], "its places' crc32c", folder / name)
    return stored


def read_shard(folder: Path, manifest: dict[str, Any], split: str, shard: int) -> Shard:
    """Reads one shard with every digest checked, down to the crc32c of each view's raw bytes."""
    commit = read_commit(folder, manifest, split, shard)
    name = f"index/{split}-{shard:06d}.parquet"
    part = _read_listed(folder, commit["files"], name)
    wanted = ["split", "row", "key", "label", "status", "latent_crc32c", "tar_offset"]
    columns = _columns(part, wanted)
    named = set(columns.pop("split", [])) == {split}
    _require(
        named == manifest["splits"][split].get("names_split", False), "its split", folder / name
    )
    first_row, rows = commit["first_row"], commit["rows"]
    _require(columns["row"] == [*range(first_row, first_row + rows)], "its rows", folder / name)
    if manifest["layout"]["format"] == "webdataset":
        stored = _read_tar(folder, manifest, commit, columns["tar_offset"])
    else:
        stored = _read_chunks(folder, manifest, commit)
    for row, values, crcs, status in zip(
        columns["row"], stored, columns["latent_crc32c"], columns["status"], strict=True
    ):
        _require((values is None) == (status != "ok"), f"row {row} is {status}", folder / name)
        if values is not None:
            got = [crc32c(view.tobytes()) for view in values]
            _require(got == crcs, f"latent_crc32c of row {row}", folder / name)
    return Shard(commit, columns, stored)


def _columns(part: bytes, names: list[str]) -> dict[str, list[Any]]:
    # Not read_table: with pyarrow 25, processes that ended soon after it aborted now and then.
    with pyarrow.parquet.ParquetFile(io.BytesIO(part)) as file:
        return file.read(columns=names, use_threads=False).to_pydict()


def _to_y(manifest: dict[str, Any], stored: np.ndarray) -> np.ndarray:
    """Turns stored values (V, M, h, w) into y, float32: a product, then a sum, each rounded."""
    if stored.dtype.kind == "f":
        return stored.astype(np.float32)
    scale = np.float32(manifest["fingerprint"]["latent"]["step"])
    offset = np.array(manifest["offset"], np.float32)[:, np.newaxis, np.newaxis]
    return stored.astype(np.float32) * scale + offset


def read_rows(folder: str | Path, split: str, rows: Iterable[int]) -> Iterator[Row]:
    """Reads rows of a split, in the order asked for; the last shard read stays in memory.

    Args:
        folder: The cache.
        split: `train`, `val` or `test`.
        rows: Row numbers, 0 to N - 1.

    Yields:
        Each row, with its latents in float32 (V, M, h, w).

    Raises:
        FormatError: If anything is not as the page says, or not as it was written.
    """
    folder = Path(folder)
    manifest = open_manifest(folder)
    _require(split in manifest["splits"], f"no split {split!r}", folder)
    labels = _read_array(folder, manifest, split, "labels")
    valid = _read_array(folder, manifest, split, "valid")
    shard_of = functools.lru_cache(maxsize=1)(
        functools.partial(read_shard, folder, manifest, split)
    )
    for row in rows:
        _require(0 <= row < len(labels), f"no row {row}", folder)
        number, place = divmod(row, manifest["splits"][split]["shard_rows"])
        shard = shard_of(number)
        stored = shard.stored[place]
        _require(bool(valid[row]) == (stored is not None), f"`valid` of row {row}", folder)
        _require(int(labels[row]) == shard.columns["label"][place], f"label of row {row}", folder)
        latents = None if stored is None else _to_y(manifest, stored)
        yield Row(row, shard.columns["key"][place], int(labels[row]), latents)


def main() -> None:
    """Prints row, key, label and the sha256 of the latents' float32 bytes, tab-separated."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cache", type=Path)
    parser.add_argument("split")
    parser.add_argument("--rows", type=int, help="only the first that many")
    arguments = parser.parse_args()
    splits = open_manifest(arguments.cache)["splits"]
    if arguments.split not in splits:
        parser.error(f"no split {arguments.split!r}; there is {', '.join(splits)}")
    num_rows = splits[arguments.split]["rows"]
    wanted = range(num_rows if arguments.rows is None else min(arguments.rows, num_rows))
    for row, key, label, latents in read_rows(arguments.cache, arguments.split, wanted):
        digest = (
            "-" if latents is None else hashlib.sha256(latents.astype("<f4").tobytes()).hexdigest()
        )
        print(row, key, label, digest, sep="\t")


if __name__ == "__main__":
    main()
