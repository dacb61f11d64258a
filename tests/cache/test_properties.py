"""What holds for all inputs, not only for those that somebody thought of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from ci2p_cache.cache.codecs import CODECS
from ci2p_cache.cache.commit import CommitRecord, FileRecord
from ci2p_cache.cache.containers import index_crc32c, open_zarr, pack_shard
from ci2p_cache.cache.manifest import Manifest, SplitRecord, read_manifest, shard_rows
from ci2p_cache.encoder.frozen import dequantize, quantize, saturate
from ci2p_cache.encoding.plan import EarlierRows, Plan, build_plan, read_plan
from ci2p_cache.errors import ManifestError, ShardError, SourceError
from ci2p_cache.images.source import ImageRef
from ci2p_cache.loader.order import epoch_order, epoch_views
from ci2p_cache.record import Record, read_sealed, sealed_bytes
from ci2p_cache.specs import (
    EncoderSpec,
    Fingerprint,
    ImageSpec,
    LatentSpec,
    LayoutSpec,
    ViewSpec,
)
from tests.support.chunks import KINDS, chunk_codec, compressors

few = settings(max_examples=40, derandomize=True)
fewer = settings(max_examples=20, derandomize=True)

LATENT = LatentSpec(channels=3, height=2, width=2)
# Any text that a file system and parquet can hold; surrogates cannot be encoded.
names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1)
keys = st.lists(names.filter(lambda name: name not in (".", "..")), unique=True, max_size=30)
seeds = st.integers(0, 2**63 - 1)
hex_digits = st.text("0123456789abcdef", min_size=64, max_size=64)


# --- plan ---------------------------------------------------------------------------------------


class Listed:
    """A source that lists the given keys, in the given order."""

    classes = class_titles = ("a", "b", "c")
    notices = ()

    def __init__(self, found: list[str], split: str | None = None) -> None:
        self.found = found
        self.split = split

    def location(self) -> str:
        return "nowhere"

    def scan(self) -> Iterator[ImageRef]:
        for key in self.found:
            label = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 3
            yield ImageRef(key, self.split, label, key.encode())

    def file_of(self, path: bytes) -> None:
        """None has a file."""

    def read(self, path: bytes) -> bytes:
        raise NotImplementedError


layouts = st.builds(
    LayoutSpec,
    val_fraction=st.floats(0, 0.9),
    split=st.sampled_from(["stratified", "hashed"]),
    seed=seeds,
    shard_samples=st.integers(1, 7),
    limit=st.none() | st.integers(1, 40),
    codec=st.sampled_from(["zstd", "lz4"]),
    level=st.integers(1, 9),
    fold=st.booleans(),
)


def planned(plan: Plan) -> dict[str, list[tuple[str, int, bytes]]]:
    """Key, label and path of every row, by split."""
    found: dict[str, list[tuple[str, int, bytes]]] = {name: [] for name in plan.splits}
    for split, number in plan.shard_numbers():
        shard = plan.shard(split, number)
        assert [sample.row for sample in shard.samples] == list(plan.splits[split].rows_of(number))
        found[split] += [(sample.key, sample.label, sample.path) for sample in shard.samples]
    return found


@few
@given(found=keys.filter(bool), layout=layouts)
def test_every_image_lies_in_exactly_one_row(found: list[str], layout: LayoutSpec) -> None:
    plan = build_plan(Listed(found), layout, ViewSpec(), LATENT)
    rows = planned(plan)
    listed = [key for part in rows.values() for key, _, _ in part]
    wanted = len(found) if layout.limit is None else min(layout.limit, len(found))
    assert len(listed) == len(set(listed)) == plan.num_samples == wanted
    assert set(listed) <= set(found)
    for part in rows.values():
        assert all(path == key.encode() for key, _, path in part)


@few
@given(found=keys.filter(bool), layout=layouts, data=st.data())
def test_the_plan_does_not_depend_on_the_order_of_listing(
    found: list[str], layout: LayoutSpec, data: st.DataObject
) -> None:
    other = data.draw(st.permutations(found))
    plans = [build_plan(Listed(part), layout, ViewSpec(), LATENT) for part in (found, other)]
    assert plans[0].to_bytes() == plans[1].to_bytes()


@few
@given(found=keys.filter(bool), added=keys, layout=layouts)
def test_added_files_move_no_other_files_split(
    found: list[str], added: list[str], layout: LayoutSpec
) -> None:
    layout = dataclasses.replace(layout, limit=None, split="hashed")
    more = [*found, *(key for key in added if key not in found)]
    before = planned(build_plan(Listed(found), layout, ViewSpec(), LATENT))
    after = planned(build_plan(Listed(more), layout, ViewSpec(), LATENT))
    for split, part in before.items():
        kept = set(part)
        assert kept <= set(after[split])
        # Nor do they change which of the others comes first.
        assert [sample for sample in after[split] if sample in kept] == part


@few
@given(found=keys.filter(bool), added=keys, layout=layouts)
def test_rescanning_leaves_every_row_where_it_was(
    found: list[str], added: list[str], layout: LayoutSpec
) -> None:
    layout = dataclasses.replace(layout, limit=None)
    more = [*added, *(key for key in found if key not in added)]
    earlier = build_plan(Listed(found), layout, ViewSpec(), LATENT)
    known = EarlierRows(earlier, range(3))
    later = build_plan(Listed(more), layout, ViewSpec(), LATENT, earlier=known)
    before, after = planned(earlier), planned(later)
    for split, part in before.items():
        assert after[split][: len(part)] == part
    assert sorted(key for part in after.values() for key, _, _ in part) == sorted(more)
    if layout.split == "stratified":
        assert_exact_shares(before, layout.val_fraction)
        assert_exact_shares(after, layout.val_fraction)


def assert_exact_shares(rows: Mapping[str, list[tuple[str, int, bytes]]], share: float) -> None:
    counts = Counter((label, split) for split, part in rows.items() for _, label, _ in part)
    for label in range(3):
        in_all = counts[label, "train"] + counts[label, "val"]
        assert counts[label, "val"] == round(in_all * share)


@fewer
@given(found=keys.filter(bool), layout=layouts)
def test_a_plan_is_read_as_it_was_written(
    tmp_path_factory: pytest.TempPathFactory, found: list[str], layout: LayoutSpec
) -> None:
    root = tmp_path_factory.mktemp("plan")
    plan = build_plan(Listed(found), layout, ViewSpec(kind="none"), LATENT)
    content = plan.to_bytes()
    (root / "plan.parquet").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    record = FileRecord(path="plan.parquet", bytes=len(content), sha256=digest)
    manifest = any_manifest(plan.splits, layout, ViewSpec(kind="none"), record)
    again = read_plan(root, manifest)
    assert planned(again) == planned(plan)
    # A rescan that finds nothing new leaves the file as it is.
    later = build_plan(
        Listed(found), layout, ViewSpec(kind="none"), LATENT, earlier=EarlierRows(again, range(3))
    )
    assert later.to_bytes() == content


def test_a_source_without_images_has_no_plan() -> None:
    with pytest.raises(SourceError, match="holds no image"):
        build_plan(Listed([]), LayoutSpec(), ViewSpec(), LATENT)


# --- order --------------------------------------------------------------------------------------


row_sets = st.sets(st.integers(0, 2**40), max_size=200).map(lambda s: np.array(sorted(s), np.int64))


@few
@given(rows=row_sets, seed=seeds, epoch=st.integers(0, 10**6))
def test_an_epoch_is_a_permutation_and_depends_on_nothing_else(
    rows: np.ndarray, seed: int, epoch: int
) -> None:
    before = rows.copy()
    first = epoch_order(rows, seed=seed, epoch=epoch)
    epoch_order(rows, seed=seed ^ 1, epoch=epoch + 1)
    np.testing.assert_array_equal(first, epoch_order(rows, seed=seed, epoch=epoch))
    np.testing.assert_array_equal(np.sort(first), rows)
    np.testing.assert_array_equal(rows, before)
    assert first.dtype == np.int64


@few
@given(rows=row_sets, views=st.integers(1, 9), seed=seeds, epoch=st.integers(0, 10**6))
def test_the_view_of_a_row_does_not_depend_on_the_other_rows(
    rows: np.ndarray, views: int, seed: int, epoch: int
) -> None:
    whole = epoch_views(rows, views, seed=seed, epoch=epoch)
    assert ((whole >= 0) & (whole < views)).all()
    parts = [epoch_views(rows[i : i + 1], views, seed=seed, epoch=epoch) for i in range(len(rows))]
    np.testing.assert_array_equal(whole, np.concatenate([np.empty(0, np.int64), *parts]))


# --- records ------------------------------------------------------------------------------------


image_specs = st.builds(
    lambda side, more, **rest: ImageSpec(size=32 * side, resize_side=32 * side + more, **rest),
    side=st.integers(1, 8),
    more=st.integers(0, 99),
    interpolation=st.sampled_from(["bilinear", "bicubic"]),
    exif=st.sampled_from(["ignore", "apply"]),
    max_pixels=st.integers(1, 2**40),
    decoder=st.text(max_size=20),
)
view_specs = st.sampled_from([ViewSpec(kind="none"), ViewSpec()]) | st.builds(
    ViewSpec, kind=st.just("crops"), num_crops=st.integers(1, 1024), seed=seeds
)
encoder_specs = st.builds(
    EncoderSpec,
    arch=st.text(max_size=9),
    quality=st.integers(1, 8),
    metric=st.sampled_from(["mse", "ms-ssim"]),
    weights_sha256=hex_digits,
    precision=st.sampled_from(["float32", "tf32", "bf16"]),
)


@st.composite
def fingerprints(draw: st.DrawFn) -> Fingerprint:
    image = draw(image_specs)
    dtype: Any = draw(st.sampled_from(["int8", "int16", "float16", "float32"]))
    step = draw(st.floats(1e-6, 1e6)) if dtype.startswith("int") else 1.0
    side = image.size // 16
    channels = draw(st.integers(1, 320))
    latent = LatentSpec(dtype=dtype, step=step, channels=channels, height=side, width=side)
    encoder = draw(encoder_specs)
    return Fingerprint(image=image, views=draw(view_specs), encoder=encoder, latent=latent)


paths = st.lists(st.text("abc.-_0é", min_size=1, max_size=5), min_size=1, max_size=4).filter(
    lambda parts: not {".", ".."} & set(parts)
)
file_records = st.builds(
    FileRecord, path=paths.map("/".join), bytes=st.integers(0, 2**60), sha256=hex_digits
)
commit_records = st.builds(
    CommitRecord,
    split=st.sampled_from(["train", "val", "test"]),
    shard=st.integers(0, 2**20),
    first_row=st.integers(0, 2**24),
    rows=st.integers(1, 1024),
    valid_rows=st.integers(0, 1024),
    plan_sha256=hex_digits,
    fingerprint=hex_digits,
    index_crc32c=st.integers(0, 2**32 - 1),
    files=st.lists(file_records, max_size=3).map(tuple),
    numerics=st.dictionaries(st.text(max_size=9), st.text(max_size=9) | st.integers(0, 2**40)),
)


def any_manifest(
    splits: dict[str, SplitRecord], layout: LayoutSpec, views: ViewSpec, plan: FileRecord
) -> Manifest:
    latent = dataclasses.replace(LATENT)
    return Manifest(
        software="test",
        state="encoding",
        fingerprint=Fingerprint(
            image=ImageSpec(size=32, resize_side=32, decoder="test"),
            views=views,
            encoder=EncoderSpec(weights_sha256="0" * 64),
            latent=latent,
        ),
        layout=layout,
        source="nowhere",
        classes=("a", "b", "c"),
        class_titles=("a", "b", "c"),
        splits=splits,
        plan=plan,
        encoder=FileRecord(path="encoder.safetensors", bytes=1, sha256="0" * 64),
        offset=(0.0,) * latent.channels,
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    made, layout = draw(fingerprints()), draw(layouts)
    if not made.latent.is_symbols:
        layout = dataclasses.replace(layout, fold=False)
    rows = draw(st.dictionaries(st.sampled_from(["train", "val", "test"]), st.integers(0, 10**6),
                                min_size=1))  # fmt: skip
    splits = {
        name: SplitRecord(
            rows=count,
            views=made.views.num_views(name),
            shard_rows=shard_rows(layout, made.latent, made.views.num_views(name)),
            valid_rows=draw(st.none() | st.integers(0, count)),
        )
        for name, count in rows.items()
    }
    classes = tuple(draw(st.lists(st.text(max_size=9), max_size=4)))
    offset = st.floats(-99, 99, width=32)
    return Manifest(
        software=draw(st.text(max_size=9)),
        state=draw(st.sampled_from(["encoding", "complete"])),
        fingerprint=made,
        layout=layout,
        source=draw(st.text(max_size=9)),
        classes=classes,
        class_titles=classes,
        splits=splits,
        plan=draw(file_records),
        encoder=draw(file_records),
        offset=(draw(offset),) * made.latent.channels,
        files=tuple(draw(st.lists(file_records, max_size=3))),
    )


records = st.one_of(fingerprints(), layouts, commit_records, file_records, manifests())


@settings(max_examples=100, derandomize=True)
@given(record=records)
def test_a_record_is_read_as_it_was_written(record: Record) -> None:
    text = json.dumps(record.to_dict(), ensure_ascii=False)
    again = type(record).from_dict(json.loads(text))
    assert again == record
    assert again.to_dict() == record.to_dict()


@few
@given(record=records, name=st.text(max_size=9))
def test_a_field_too_many_is_refused(record: Record, name: str) -> None:
    data = record.to_dict()
    if name not in data:
        with pytest.raises(ManifestError, match="unknown fields"):
            type(record).from_dict({**data, name: 1})


@few
@given(record=records, data=st.data())
def test_a_field_too_few_or_of_another_type_is_refused(record: Record, data: st.DataObject) -> None:
    fields = record.to_dict()
    name = data.draw(st.sampled_from(sorted(fields)))
    with pytest.raises(ManifestError, match=name):
        type(record).from_dict({key: value for key, value in fields.items() if key != name})
    with pytest.raises(ManifestError):
        type(record).from_dict({**fields, name: object()})


@few
@given(fingerprint=fingerprints(), other=fingerprints())
def test_fingerprints_are_equal_where_their_digests_are(
    fingerprint: Fingerprint, other: Fingerprint
) -> None:
    again = Fingerprint.from_dict(json.loads(json.dumps(fingerprint.to_dict())))
    assert again.digest == fingerprint.digest
    assert (fingerprint == other) == (fingerprint.digest == other.digest)


@few
@given(record=commit_records, data=st.data())
def test_a_sealed_file_notices_every_changed_byte(
    tmp_path_factory: pytest.TempPathFactory, record: CommitRecord, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("seal") / "record.json"
    content = sealed_bytes(record.to_dict())
    path.write_bytes(content)
    fields, intact = read_sealed(path)
    assert intact
    assert CommitRecord.from_dict(fields) == record
    damaged = bytearray(content)
    place = data.draw(st.integers(0, len(content) - 1))
    damaged[place] ^= data.draw(st.integers(1, 255))
    path.write_bytes(damaged)
    try:
        _, intact = read_sealed(path)
    except ManifestError:
        return
    assert not intact


@few
@given(manifest=manifests())
def test_a_manifest_that_can_be_made_can_be_read(
    tmp_path_factory: pytest.TempPathFactory, manifest: Manifest
) -> None:
    root = tmp_path_factory.mktemp("manifest")
    (root / "cache.json").write_bytes(sealed_bytes(manifest.to_dict()))
    assert read_manifest(root) == manifest


# --- quantiser ----------------------------------------------------------------------------------


@st.composite
def latents(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, float]:
    """y (B, M, h, w), medians (M,) and a step."""
    shape = tuple(draw(st.integers(*bounds)) for bounds in ((0, 3), (1, 4), (1, 3), (1, 3)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scale = draw(st.sampled_from([0.1, 3.0, 400.0, 1e6]))
    y = (rng.standard_normal(shape) * scale).astype(np.float32)
    # Halves are where roundings differ.
    y = np.where(rng.random(shape) < 0.3, np.round(y * 2) / 2, y).astype(np.float32)
    medians = (rng.standard_normal(shape[1]) * draw(st.sampled_from([0.0, 1.0]))).astype(np.float32)
    return y, medians, draw(st.sampled_from([1.0, 0.5, 0.25, 0.3, 2.0, 7.0]))


@few
@given(made=latents(), limit=st.sampled_from([127, 32767, 1]))
def test_quantising_is_the_plain_formula(
    made: tuple[np.ndarray, np.ndarray, float], limit: int
) -> None:
    y, medians, step = made
    column = medians[:, None, None]
    symbols = quantize(torch.from_numpy(y.copy()), torch.from_numpy(medians), step)
    wanted = np.rint((y - column) / np.float32(step)).astype(np.int64)
    np.testing.assert_array_equal(symbols.numpy(), wanted)

    stored, clipped = saturate(symbols, limit)
    assert stored.dtype == (torch.int8 if limit <= 127 else torch.int16)
    np.testing.assert_array_equal(stored.numpy(), np.clip(wanted, -limit, limit))
    np.testing.assert_array_equal(clipped.numpy(), (np.abs(wanted) > limit).sum(axis=(2, 3)))
    assert not (stored == torch.iinfo(stored.dtype).min).any()

    y_hat = dequantize(stored, torch.from_numpy(medians), step).numpy()
    plain = np.clip(wanted, -limit, limit).astype(np.float32) * np.float32(step) + column
    np.testing.assert_array_equal(y_hat, plain)
    near = np.abs(wanted) <= min(limit, 2**20)
    bound = step / 2 + 1e-5 * (np.abs(y) + np.abs(column) + step)
    assert (np.abs(y_hat - y)[near] <= bound[near]).all()


# --- shards -------------------------------------------------------------------------------------

SHAPE = (3, 2, 4)


def shard_array(path: Path, codec: str, rows: int, size: int, dtype: str) -> zarr.Array[Any]:
    return zarr.create_array(
        path,
        shape=(rows, *SHAPE),
        chunks=(1, *SHAPE),
        shards=(size, *SHAPE),
        dtype=dtype,
        compressors=compressors(codec, SHAPE, dtype),
        fill_value=-128,
        chunk_key_encoding={"name": "default", "separator": "."},
        overwrite=True,
    )


shards = {
    "codec": st.sampled_from(KINDS),
    "size": st.integers(1, 6),
    "rows": st.integers(1, 14),
    "dtype": st.sampled_from(["int8", "int16", "float32"]),
    "seed": st.integers(0, 2**32 - 1),
}


def stored_values(rows: int, dtype: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Values, a few rows of which are holes, and which rows are stored."""
    rng = np.random.default_rng(seed)
    values = rng.integers(-127, 128, (rows, *SHAPE)).astype(dtype)
    stored = rng.random(rows) < rng.choice([0.0, 0.6, 1.0])
    values[~stored] = -128
    return values, stored


@few
@given(**shards)
def test_zarr_reads_what_we_pack(
    tmp_path_factory: pytest.TempPathFactory,
    codec: Any,
    size: int,
    rows: int,
    dtype: str,
    seed: int,
) -> None:
    root = tmp_path_factory.mktemp("pack")
    values, stored = stored_values(rows, dtype, seed)
    chunks = chunk_codec(codec, SHAPE, dtype)
    array = shard_array(root, codec, rows, size, dtype)
    for number in range(-(-rows // size)):
        part = [
            chunks.encode(memoryview(values[row].tobytes())) if row < rows and stored[row] else None
            for row in range(number * size, (number + 1) * size)
        ]
        (root / f"c.{number}.0.0.0").write_bytes(b"".join(pack_shard(part)))
    np.testing.assert_array_equal(array[:], values)


@few
@given(**shards)
def test_we_read_what_zarr_writes(
    tmp_path_factory: pytest.TempPathFactory,
    codec: Any,
    size: int,
    rows: int,
    dtype: str,
    seed: int,
) -> None:
    root = tmp_path_factory.mktemp("read")
    values, stored = stored_values(rows, dtype, seed)
    array = shard_array(root, codec, rows, size, dtype)
    array[:] = values
    chunks = chunk_codec(codec, SHAPE, dtype)
    out = np.empty(values[0].nbytes, np.uint8)
    for number in range(-(-rows // size)):
        path = root / f"c.{number}.0.0.0"
        part = range(number * size, min((number + 1) * size, rows))
        if not path.exists():
            assert not stored[part.start : part.stop].any()
            continue
        data = path.read_bytes()
        file = open_zarr(path, num_chunks=size, codec=chunks, file_bytes=len(data),
                         index_crc=index_crc32c(data))  # fmt: skip
        np.testing.assert_array_equal(file.stored[: len(part)], stored[part.start : part.stop])
        assert not file.stored[len(part) :].any()
        for offset, row in enumerate(part):
            if stored[row]:
                assert 0 < file.stored_bytes(offset) <= chunks.max_stored_bytes
                file.read_into(offset, out)
                np.testing.assert_array_equal(out.view(dtype).reshape(SHAPE), values[row])
            else:
                with pytest.raises(ShardError, match="holds no data"):
                    file.read_into(offset, out)


@few
@given(entries=st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)),
                        min_size=1, max_size=6))  # fmt: skip
def test_an_index_of_any_numbers_leads_nowhere_outside_its_file(
    tmp_path_factory: pytest.TempPathFactory, entries: list[tuple[int, int]]
) -> None:
    import google_crc32c

    path = tmp_path_factory.mktemp("index") / "c"
    index = np.array(entries, "<u8").tobytes()
    data = bytes(200) + index + google_crc32c.value(index).to_bytes(4, "little")
    path.write_bytes(data)
    codec = CODECS["none"](level=1, chunk_bytes=24)
    try:
        file = open_zarr(path, num_chunks=len(entries), codec=codec, file_bytes=len(data),
                         index_crc=index_crc32c(data))  # fmt: skip
    except ShardError:
        return
    for (offset, size), stored in zip(entries, file.stored.tolist(), strict=True):
        assert not stored or offset + size <= 200


def test_no_chunk_at_all_is_a_shard_too(tmp_path: Path) -> None:
    data = b"".join(pack_shard([]))
    (tmp_path / "c").write_bytes(data)
    codec = CODECS["zstd"](level=1, chunk_bytes=24)
    file = open_zarr(tmp_path / "c", num_chunks=0, codec=codec, file_bytes=len(data),
                     index_crc=index_crc32c(data))  # fmt: skip
    assert file.stored.shape == (0,)
