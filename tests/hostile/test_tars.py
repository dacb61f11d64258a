"""R8 for archives: tars that lead out, lie, explode or end early are refused by name."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from ci2p_cache.errors import ImageDecodeError, ResourceError, SourceError
from ci2p_cache.images.locate import open_source
from tests.hostile.attacks import MAX_GROWTH
from tests.support.sources import entries, pack, samples, tar_bytes
from tests.support.tiers import thinned

PICTURE = b"\xff\xd8\xff\xe0 the start of a JPEG"


def member(name: str, content: bytes = PICTURE, **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def made(*members: tuple[tarfile.TarInfo, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=kind) as archive:
        for info, content in members:
            archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def patched(data: bytes, position: int, field: bytes) -> bytes:
    """Overwrites a field of the first header and sets its checksum right again."""
    header = bytearray(data[:512])
    header[position : position + len(field)] = field
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + data[512:]


LABEL = member("1.cls", b"a")
GOOD = made(member("1.jpg"), LABEL)

ATTACKS: dict[str, tuple[bytes, str]] = {
    "name leads up": (made(member("../1.jpg")), "leads out of it"),
    "name leads up inside": (made(member("a/../../1.jpg")), "leads out of it"),
    "absolute name": (made(member("/etc/1.jpg")), "leads out of it"),
    "long name leads up": (
        made(member("a/" * 80 + "../" * 90 + "1.jpg"), kind=tarfile.GNU_FORMAT), "leads out of it",
    ),
    "pax name leads up": (
        made(member("1.jpg", pax_headers={"path": "../../1.jpg"})), "leads out of it",
    ),
    "name with NUL": (made(member("1.jpg", pax_headers={"path": "a\0b.jpg"})), "leads out of it"),
    "name of 5,000 bytes": (made(member("a/" * 2500 + "1.jpg")), "a name of 5005 bytes"),
    "two sizes": (made(member("1.jpg", pax_headers={"size": "99999999999"})), "has two sizes"),
    "sparse by pax": (made(member("1.jpg", pax_headers={"GNU.sparse.major": "1"})), "sparse"),
    "sparse by kind": (patched(GOOD, 156, b"S"), "sparse"),
    "unknown kind": (patched(GOOD, 156, b"Q"), "unknown kind"),
    "size of 2**80": (patched(GOOD, 124, b"\x80" + b"\0" * 1 + b"\xff" * 10), "cut short"),
    "negative size": (patched(GOOD, 124, b"\xff" * 12), "without a size"),
    "size is no number": (patched(GOOD, 124, b"12x4567\0"), "without a size"),
    "size past the end": (patched(GOOD, 124, b"00000100000\0"), "cut short"),
    "wrong checksum": (GOOD[:10] + b"x" + GOOD[11:], "checksum is wrong"),
    "extended header of 1 GiB": (
        patched(patched(GOOD, 156, b"x"), 124, b"%011o\0" % 2**30), "extended header of 1073741824",
    ),
    "damaged extended header": (
        made(member("1.jpg", b"9999 path=x\n", type=b"x"), LABEL), "damaged extended header",
    ),
    "extended headers for ever": (
        made(*[member("x", b"", type=b"x")] * 20), "extended headers in a row",
    ),
    "one name for all": (made(member("x", b"12 path=a.b\n", type=b"g")), "to all members"),
    "empty file": (b"", "without an end marker"),
    "no tar": (b"<html>" * 1000, "checksum is wrong"),
    "two archives in one": (GOOD + GOOD, "behind its end marker"),
    "two labels": (made(member("1.jpg"), LABEL, LABEL), "two .cls"),
    "no label": (made(member("1.jpg")), "has no label"),
    "empty label": (made(member("1.jpg"), member("1.cls", b" \n")), "label of 0 characters"),
    "huge label": (made(member("1.jpg"), member("1.cls", b"a" * 5000)), "label file of 5000"),
    "label is no JSON": (made(member("1.jpg"), member("1.json", b"[" * 10**5)), "is no JSON"),
    "label is a list": (made(member("1.jpg"), member("1.json", b'{"cls": [1]}')), "has no label"),
    "label of -7": (made(member("1.jpg"), member("1.cls", b"-7")), "there is a label -7"),
    "two images": (made(member("1.jpg"), member("1.png"), LABEL), "several images"),
    "2,000 members in a sample": (made(*[member("1.x", b"")] * 2000), "more than 1024 members"),
    "only a link": (
        made(member("1.jpg", b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"), LABEL),
        "1 archive members skipped that are no files",
    ),
    "only devices": (
        made(member("1.jpg", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=5),
             member("2.jpg", b"", type=tarfile.FIFOTYPE),
             member("3.jpg", b"", type=tarfile.LNKTYPE, linkname="../x"), LABEL),
        "3 archive members skipped that are no files",
    ),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_hostile_tars_are_refused_by_name(tmp_path: Path, attack: str, suffix: str) -> None:
    data, reason = ATTACKS[attack]
    path = pack(tmp_path / "src" / f"bad{suffix}", data)
    before = sorted(tmp_path.rglob("*"))
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match="bad") as caught:
            list(open_source(path).scan())
        assert tracemalloc.get_traced_memory()[1] < MAX_GROWTH
    finally:
        tracemalloc.stop()
    assert reason in str(caught.value)
    assert len(str(caught.value)) < 2000
    assert str(caught.value).isprintable()
    assert sorted(tmp_path.rglob("*")) == before


def test_the_honest_tar_is_read(tmp_path: Path) -> None:
    path = pack(tmp_path / "good.tar", GOOD)
    source = open_source(path)
    (ref,) = source.scan()
    assert (ref.key, source.classes, source.read(ref.path)) == ("1.jpg", ("a",), PICTURE)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tar.zst"])
def test_a_tar_cut_anywhere_is_refused(image_folder: Path, tmp_path: Path, suffix: str) -> None:
    whole = pack(tmp_path / f"x{suffix}", tar_bytes(samples(entries(image_folder)))).read_bytes()
    rng = random.Random(5)
    plain = tar_bytes(samples(entries(image_folder)))
    # Behind the first block of the end marker there is nothing to lose.
    content = len(plain.rstrip(b"\0")) if suffix == ".tar" else len(whole) - 1
    for _ in range(60):
        path = tmp_path / f"cut{suffix}"
        path.write_bytes(whole[: rng.randrange(content)])
        with pytest.raises(SourceError, match="cut"):
            list(open_source(path).scan())


@pytest.mark.parametrize("suffix", [".tar.gz", ".tar.zst"])
def test_a_flipped_bit_in_a_packed_tar_never_gives_other_bytes(
    image_folder: Path, tmp_path: Path, suffix: str
) -> None:
    images = entries(image_folder)
    data = tar_bytes(samples(images))
    whole = bytearray(
        gzip.compress(data) if suffix == ".tar.gz"
        else zstandard.ZstdCompressor(write_checksum=True).compress(data)
    )  # fmt: skip
    contents = {key: (content, name) for key, content, name in images}
    rng = random.Random(6)
    for _ in range(60):
        path, place = tmp_path / f"flipped{suffix}", rng.randrange(len(whole) * 8)
        whole[place // 8] ^= 1 << place % 8
        path.write_bytes(whole)
        whole[place // 8] ^= 1 << place % 8
        try:
            source = open_source(path)
            refs = list(source.scan())
        except SourceError as error:
            assert "flipped" in str(error)  # noqa: PT017
            continue
        # A field that says nothing of the content, such as gzip's time.
        assert len(refs) == len(images)
        for ref in refs:
            assert (source.read(ref.path), source.classes[ref.label]) == contents[ref.key]


def zeros(count: int) -> bytes:
    """A member of zeros, in a tar."""
    return made(member("1.jpg", bytes(count)), LABEL)


BOMBS: dict[str, Callable[[bytes], bytes]] = {
    "tar.gz": lambda data: gzip.compress(data, 9),
    "tar.zst": lambda data: zstandard.compress(data, 3),
}


@pytest.mark.parametrize("suffix", thinned(reversed(BOMBS)))
def test_a_bomb_is_refused_before_it_takes_memory(tmp_path: Path, suffix: str) -> None:
    packed = BOMBS[suffix](zeros(2**26))
    # Many members, or frames, of one archive: 1.3 GB from 1.3 MB or less.
    body = BOMBS[suffix](zeros(2**26)[: 2**26 + 512])
    path = tmp_path / f"bomb.{suffix}"
    path.write_bytes(body * 20 + packed)
    tracemalloc.start()
    try:
        with pytest.raises(SourceError, match="taken for an attack"):
            list(open_source(path).scan())
        assert tracemalloc.get_traced_memory()[1] < MAX_GROWTH
    finally:
        tracemalloc.stop()


def test_an_image_of_a_terabyte_is_one_bad_image(tmp_path: Path) -> None:
    path = tmp_path / "big.tar"
    info = member("2.jpg", size=2**40)[0]
    with path.open("wb") as file:
        file.write(made(member("1.jpg"), LABEL)[: 4 * 512])
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(2**40, 1)
        file.write(made(member("2.cls", b"a")))
    source = open_source(path)
    first, second = source.scan()
    assert source.read(first.path) == PICTURE
    with pytest.raises(ImageDecodeError, match="at most 536870912"):
        source.read(second.path)


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_an_archive_changed_after_it_was_listed_is_refused(tmp_path: Path, suffix: str) -> None:
    images = [(f"a/{n}.jpg", PICTURE + b"x" * 700 * n, "a") for n in range(5)]
    path = pack(tmp_path / f"x{suffix}", tar_bytes(samples(images)))
    refs = list(open_source(path).scan())
    pack(path, tar_bytes(samples(images[1:])))
    source = open_source(path)
    with pytest.raises(SourceError, match="was changed since the plan was made"):
        source.read(refs[3].path)
    source = open_source(path)
    path.unlink()
    with pytest.raises(ResourceError, match="has gone"):
        source.read(refs[3].path)


def test_the_command_exits_3_and_writes_nothing_outside(run, tmp_path: Path) -> None:
    path = pack(tmp_path / "bad.tar", ATTACKS["name leads up"][0])
    ran = run("encode", path, "--out", tmp_path / "out", "--encoder", "bundled", "--size", "64")
    assert ran.code == 3
    assert "bad.tar" in ran.err
    assert [p.name for p in tmp_path.iterdir()] == ["bad.tar"]
    double = samples([("a/1.jpg", PICTURE, "a")])
    pack(tmp_path / "two.tar", tar_bytes([*double, ("b.txt", b""), *double]))
    ran = run("encode", tmp_path / "two.tar", "--out", tmp_path / "out", "--encoder", "bundled")
    assert ran.code == 3
    assert "lists 'a/1.jpg' twice; keys are unique" in ran.err
