"""Images in a zip: read in place, as bounded and as safe as tars."""

from __future__ import annotations

import io
import os
import stat
import struct
import tracemalloc
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

import ci2p_cache as cc
from ci2p_cache.errors import ImageDecodeError, ResourceError, SourceError
from ci2p_cache.images.locate import open_reader, open_source
from ci2p_cache.images.source import ImageSource, SourceOptions
from tests.support.caches import data_digests, with_options
from tests.support.pictures import picture

Change = Callable[[zipfile.ZipInfo], None]


def jpeg(seed: int = 1) -> bytes:
    sink = io.BytesIO()
    picture(seed, 24, 18).save(sink, "JPEG")
    return sink.getvalue()


def zip_of(
    path: Path,
    names: Iterable[str],
    *,
    content: bytes | None = None,
    change: Change | None = None,
    method: int = zipfile.ZIP_DEFLATED,
) -> Path:
    """Writes a zip of members of these names; `change` changes their records first."""
    with zipfile.ZipFile(path, "w") as archive:
        for seed, name in enumerate(names):
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            if change is not None:
                change(info)
            archive.writestr(info, jpeg(seed) if content is None else content)
    return path


def zipped(folder: Path, path: Path, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


def patched(path: Path, old: bytes, new: bytes, *, count: int = -1) -> Path:
    """Replaces bytes of the archive, headers included, with others of the same number."""
    assert len(old) == len(new)
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, count))
    return path


def labelled(source: ImageSource) -> set[tuple[str | None, str, str]]:
    return {(ref.split, ref.key, source.classes[ref.label]) for ref in source.scan()}


def refused(path: Path, match: str) -> SourceError:
    with pytest.raises(SourceError, match=match) as caught:
        list(open_source(path).scan())
    assert str(path) in str(caught.value)
    assert caught.value.hint
    return caught.value


TWO = ("a/1.jpg", "b/2.jpg")


# --- what it gives --------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "animals10/raw-img/"])
def test_a_zip_gives_what_its_folder_gives(image_folder: Path, tmp_path: Path, prefix: str) -> None:
    source = open_source(zipped(image_folder, tmp_path / "animals.zip", prefix))
    folder = open_source(image_folder)
    assert source.classes == folder.classes
    ours = [(r.key, r.split, r.label, r.order, source.read(r.path)) for r in source.scan()]
    theirs = [(r.key, r.split, r.label, r.order, folder.read(r.path)) for r in folder.scan()]
    assert ours == theirs
    assert source.location() == str(tmp_path / "animals.zip")


def test_a_cache_of_a_zip_holds_the_latents_of_the_folder(
    image_folder: Path, tmp_path: Path
) -> None:
    archive = zipped(image_folder, tmp_path / "animals.zip")
    cc.encode(archive, tmp_path / "zip", with_options())
    cc.encode(image_folder, tmp_path / "folder", with_options())
    ours, theirs = data_digests(tmp_path / "zip"), data_digests(tmp_path / "folder")
    latents = [name for name in theirs if name.startswith("latents.zarr/") and "/c" in name]
    assert latents
    assert {name: ours[name] for name in latents} == {name: theirs[name] for name in latents}
    assert cc.encode(archive, tmp_path / "zip", with_options()).encoded_now == 0


def test_splits_and_tiny_imagenet_are_found_in_a_zip(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", ["d/train/a/1.jpg", "d/train/b/2.jpg", "d/valid/a/3.jpg"])
    assert labelled(open_source(path)) == {
        ("train", "a/1.jpg", "a"),
        ("train", "b/2.jpg", "b"),
        ("val", "a/3.jpg", "a"),
    }
    path = zip_of(
        tmp_path / "tiny-imagenet-200.zip",
        [f"t/train/n{n}/images/{n}_0.JPEG" for n in (1, 2)] + ["t/val/images/val_0.JPEG"],
    )
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("t/val/val_annotations.txt", "val_0.JPEG\tn2\t0\t0\t1\t1\n")
        archive.writestr("t/wnids.txt", "n1\nn2\n")
        archive.writestr("t/words.txt", "n1\ttench\nn2\tshark\n")
    source = open_source(path)
    assert ("val", "val_0.JPEG", "n2") in labelled(source)
    assert source.class_titles == ("tench", "shark")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_images_are_read_in_any_process_without_listing(tmp_path: Path, method: int) -> None:
    path = zip_of(tmp_path / "x.zip", TWO, method=method)
    refs = list(open_source(path).scan())
    fresh = open_reader(path)
    assert [fresh.read(ref.path) for ref in reversed(refs)] == [jpeg(1), jpeg(0)]


def test_data_descriptors_are_read(tmp_path: Path) -> None:
    class Pipe(io.RawIOBase):
        """Cannot be sought, so sizes follow the content."""

        def __init__(self) -> None:
            self.data = bytearray()

        def writable(self) -> bool:
            return True

        def write(self, data: bytes | memoryview) -> int:  # type: ignore[override]
            self.data += data
            return len(data)

    pipe = Pipe()
    with zipfile.ZipFile(pipe, "w", zipfile.ZIP_DEFLATED) as archive:
        for seed, name in enumerate(TWO):
            archive.writestr(name, jpeg(seed))
    path = tmp_path / "x.zip"
    path.write_bytes(pipe.data)
    source = open_source(path)
    assert [source.read(ref.path) for ref in source.scan()] == [jpeg(0), jpeg(1)]


def test_bytes_in_front_of_an_archive_are_skipped(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", TWO)
    path.write_bytes(b"#!/bin/sh\nexit\n" + path.read_bytes())
    source = open_source(path)
    assert [source.read(ref.path) for ref in source.scan()] == [jpeg(0), jpeg(1)]


def test_names_are_bytes_whatever_wrote_them(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", ["caf\u00e9/1.jpg", "b/2.jpg"])
    assert open_source(path).classes == ("b", "caf\u00e9")
    # macOS writes UTF-8 and does not mark it.
    flag = struct.Struct("<H")
    data = path.read_bytes().replace(flag.pack(20) + flag.pack(0x800), flag.pack(20) + flag.pack(0))
    path.write_bytes(data)
    source = open_source(path)
    assert source.classes == ("b", "caf\u00e9")
    assert all(source.read(ref.path) for ref in source.scan())


def test_backslashes_of_a_windows_archive_are_folders(tmp_path: Path) -> None:
    def on_windows(info: zipfile.ZipInfo) -> None:
        info.create_system = 0

    names = ["train\\a\\1.jpg", "train\\b\\2.jpg"]
    source = open_source(zip_of(tmp_path / "x.zip", names, change=on_windows))
    assert labelled(source) == {("train", "a/1.jpg", "a"), ("train", "b/2.jpg", "b")}
    assert all(source.read(ref.path) for ref in source.scan())


def test_what_is_no_image_is_said(tmp_path: Path) -> None:
    names = ["__MACOSX/a/._1.jpg", "a/.DS_Store", *TWO, "a/notes", "b/pixels"]
    source = open_source(zip_of(tmp_path / "x.zip", names))
    # Content decides where a name does not.
    assert {key for _, key, _ in labelled(source)} == {"a/1.jpg", "a/notes", "b/2.jpg", "b/pixels"}
    path = zip_of(tmp_path / "y.zip", TWO)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a/notes", "no image")
        archive.writestr("c/", "")
    source = open_source(path)
    assert len(list(source.scan())) == 2
    assert source.classes == ("a", "b")
    assert any("left out that hold no image, for example c" in line for line in source.notices)
    assert any("1 files ignored that are no images" in line for line in source.notices)


def test_links_are_skipped_and_counted(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", TWO)
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("a/link.jpg")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc/passwd")
    source = open_source(path)
    assert {key for _, key, _ in labelled(source)} == set(TWO)
    assert any("1 archive members skipped" in line for line in source.notices)


def test_a_zip_without_labels_gives_all_its_images(tmp_path: Path) -> None:
    source = open_source(
        zip_of(tmp_path / "x.zip", ["1.jpg", "x/2.jpg"]), SourceOptions(labels="none")
    )
    assert {(ref.key, ref.label) for ref in source.scan()} == {("1.jpg", -1), ("x/2.jpg", -1)}


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["/a/1.jpg", "../a/1.jpg", "a/../../1.jpg", "C:/a/1.jpg", "a/.."])
def test_names_that_lead_out_of_the_archive_are_refused(tmp_path: Path, name: str) -> None:
    refused(zip_of(tmp_path / "x.zip", [*TWO, name]), "which leads out of it")


def test_backslashes_that_lead_out_are_refused(tmp_path: Path) -> None:
    def on_windows(info: zipfile.ZipInfo) -> None:
        info.create_system = 0

    path = zip_of(tmp_path / "x.zip", [*TWO, "..\\..\\1.jpg"], change=on_windows)
    refused(path, "which leads out of it")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", ["a/1.jpg", "./a/1.jpg", "a//1.jpg"])
def test_a_name_twice_is_refused(tmp_path: Path, name: str) -> None:
    refused(zip_of(tmp_path / "x.zip", [*TWO, name]), r"it has a/1\.jpg twice")


def test_a_file_and_a_folder_of_one_name_are_refused(tmp_path: Path) -> None:
    refused(zip_of(tmp_path / "x.zip", ["a/x/1.jpg", "a/x", "b/1.jpg"]), "two names that are the")


def test_names_without_bounds_are_refused(tmp_path: Path) -> None:
    refused(zip_of(tmp_path / "x.zip", [*TWO, "a/" * 1000 + "1.jpg"]), "with 1001 parts")


def test_encrypted_members_are_refused(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", TWO)
    data = bytearray(path.read_bytes())
    for signature, place in ((b"PK\1\2", 8), (b"PK\3\4", 6)):
        at = data.find(signature)
        data[at + place] |= 1
    path.write_bytes(data)
    error = refused(path, r"a/1\.jpg is encrypted")
    assert "password" in (error.hint or "")


@pytest.mark.parametrize(
    ("method", "name"), [(zipfile.ZIP_LZMA, "LZMA"), (zipfile.ZIP_BZIP2, "bzip2")]
)
def test_other_methods_are_refused_by_name(tmp_path: Path, method: int, name: str) -> None:
    refused(zip_of(tmp_path / "x.zip", TWO, method=method), f"is packed by {name}")


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", TWO)
    size = struct.pack("<L", len(jpeg(0)))
    assert path.read_bytes().count(size) == 2
    patched(path, size, struct.pack("<L", 2**31))
    refused(path, "at that ratio it is taken for an attack")


def test_content_beyond_the_size_that_it_says_is_never_unpacked(tmp_path: Path) -> None:
    bomb = bytes(64 * 2**20)
    path = zip_of(tmp_path / "x.zip", TWO, content=bomb)
    patched(path, struct.pack("<L", len(bomb)), struct.pack("<L", 1000))
    source = open_source(path)
    refs = list(source.scan())
    tracemalloc.start()
    with pytest.raises(ImageDecodeError, match="damaged"):
        source.read(refs[0].path)
    assert tracemalloc.get_traced_memory()[1] < 2**20
    tracemalloc.stop()


def test_members_that_overlap_are_refused(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", [f"a/{n}.jpg" for n in range(9)], method=zipfile.ZIP_STORED)
    data = path.read_bytes()
    at, changed = data.find(b"PK\1\2"), bytearray(data)
    while at >= 0:
        changed[at + 20 : at + 24] = struct.pack("<L", len(data) // 4)
        at = data.find(b"PK\1\2", at + 4)
    path.write_bytes(changed)
    refused(path, "they overlap")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_an_archive_that_was_cut_short_is_refused(tmp_path: Path, share: float) -> None:
    path = zip_of(tmp_path / "x.zip", TWO)
    os.truncate(path, int(path.stat().st_size * share))
    refused(path, "is no zip, or is damaged or cut short")


def test_a_list_of_members_without_bounds_is_refused(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", TWO)
    end = path.stat().st_size - 22
    with path.open("r+b") as file:
        file.seek(end + 12)
        file.write(struct.pack("<L", 2**31))
    refused(path, "damaged or cut short|list of members")


@pytest.mark.parametrize("seed", range(40))
def test_flipped_bytes_are_refused_or_cost_an_image_and_never_crash(
    tmp_path: Path, seed: int
) -> None:
    path = zip_of(tmp_path / "x.zip", TWO)
    data = bytearray(path.read_bytes())
    data[(seed * 7919) % len(data)] ^= 1 << seed % 8
    path.write_bytes(data)
    wanted = {key: jpeg(number) for number, key in enumerate(TWO)}
    try:
        source = open_source(path)
        for ref in source.scan():
            try:
                content = source.read(ref.path)
            except ImageDecodeError:
                continue
            assert content == wanted.get(ref.key, content)
            assert content in wanted.values()
    except (SourceError, ResourceError):
        pass


def test_an_archive_that_was_changed_since_is_said(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", TWO)
    refs = list(open_source(path).scan())
    zip_of(path, ["0/other.jpg", *TWO])
    with pytest.raises(SourceError, match=r"has no member b/2\.jpg at byte \d+; it was changed"):
        open_reader(path).read(refs[1].path)
    source = open_reader(path)
    path.unlink()
    with pytest.raises(ResourceError, match="has gone"):
        source.read(refs[0].path)


@pytest.mark.parametrize("path", [b"a/1.jpg", b"a/1.jpg#1+2", b"../x#0+0+0+0", b"a#1+2+3+4+5x"])
def test_paths_of_no_member_are_refused(tmp_path: Path, path: bytes) -> None:
    source = open_source(zip_of(tmp_path / "x.zip", TWO))
    with pytest.raises(SourceError, match=r"is no image below|has no member"):
        source.read(path)


def test_what_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "page.zip").write_text("<html>log in first</html>")
    refused(tmp_path / "page.zip", "is no zip, or is damaged")
    os.mkfifo(tmp_path / "pipe.zip")
    with pytest.raises(SourceError, match="does not exist, or is no file"):
        open_source(tmp_path / "pipe.zip")


def test_an_archive_within_a_zip_is_named(tmp_path: Path) -> None:
    path = zip_of(tmp_path / "x.zip", ["d/train.zip", "d/read.me"], content=b"no image")
    with pytest.raises(SourceError, match="no image in it") as caught:
        open_source(path)
    assert (caught.value.hint or "").startswith("unpack the archive, and name d/train.zip as SRC")


def test_layouts_that_mean_nothing_are_refused_in_a_zip_too(tmp_path: Path) -> None:
    error = refused(
        zip_of(tmp_path / "x.zip", ["1.jpg", "2.jpg"]), "no class folders, but 2 images"
    )
    assert "--labels none" in (error.hint or "")
    refused(zip_of(tmp_path / "y.zip", ["train/1.jpg", "test1/2.jpg"]), "look like splits")
