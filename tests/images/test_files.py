"""Odd files and odd names in a folder of images, and what happens when reading fails."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ci2p_cache.errors import ImageDecodeError, ResourceError, SourceError
from ci2p_cache.images.decode import decode_image
from ci2p_cache.images.locate import open_source
from ci2p_cache.specs import ImageSpec
from tests.images.test_folder import keys, notice, put, text

# --- which files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("suffix", "name"),
    [
        (".jpg", "JPEG"),
        (".JPEG", "JPEG"),
        (".jpe", "JPEG"),
        (".jfif", "JPEG"),
        (".PnG", "PNG"),
        (".webp", "WEBP"),
        (".bmp", "BMP"),
        (".gif", "GIF"),
        (".tif", "TIFF"),
        (".TIFF", "TIFF"),
        ("", "JPEG"),
        ("", "PNG"),
        ("", "BMP"),
        (".dat", "GIF"),
        (".heic", "WEBP"),
        (".txt", "TIFF"),
    ],
)
def test_images_are_found_by_suffix_or_content(tmp_path: Path, suffix: str, name: str) -> None:
    put(tmp_path / "a" / f"1{suffix}", name)
    source = open_source(tmp_path)
    (ref,) = source.scan()
    assert ref.key == f"a/1{suffix}"
    assert source.notices == ()
    spec = ImageSpec(size=32, resize_side=32, decoder="x")
    assert decode_image(source.read(ref.path), spec).format == name


def test_other_files_are_counted_with_an_example(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1.jpg")
    text(tmp_path / "a" / "README.txt")
    text(tmp_path / "a" / "b" / "x.json", "{}")
    text(tmp_path / "a" / "b" / "empty", "")
    source = open_source(tmp_path)
    assert keys(source) == ["a/1.jpg"]
    assert source.notices == ("3 files ignored that are no images, for example a/README.txt",)
    assert keys(source) == ["a/1.jpg"]
    assert len(source.notices) == 1, "a second scan counts afresh"


def test_images_of_formats_that_are_not_read_are_named(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1.jpg")
    (tmp_path / "a" / "2.avif").write_bytes(b"\0\0\0\x1cftypavif")
    (tmp_path / "a" / "3.heic").write_bytes(b"whatever")
    (tmp_path / "a" / "4").write_bytes(b"\0\0\0\x18ftypheic")
    source = open_source(tmp_path)
    assert keys(source) == ["a/1.jpg"]
    assert notice(source, "not read").startswith(
        "3 images ignored whose format is not read (1 .avif, 1 .heic, 1 HEIC), for example a/2.avif"
    )


@pytest.mark.parametrize("name", ["@eaDir", "$RECYCLE.BIN", "System Volume Information"])
def test_folders_that_systems_add_are_skipped_and_counted(tmp_path: Path, name: str) -> None:
    for folder in ("a", "b"):
        for below in (folder, f"{folder}/{name}/1.jpg", name):
            put(tmp_path / below / "1.jpg")
    source = open_source(tmp_path)
    assert source.classes == ("a", "b")
    assert [ref.key for ref in source.scan()] == ["a/1.jpg", "b/1.jpg"]
    assert any("hidden files or folders skipped" in line for line in source.notices)


def test_hidden_entries_are_skipped_and_counted(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "a/.2.jpg", ".git/1.jpg", "__MACOSX/a/1.jpg", "a/.thumbs/1.jpg"):
        put(tmp_path / name)
    source = open_source(tmp_path)
    assert source.classes == ("a",)
    assert keys(source) == ["a/1.jpg"]
    assert sum(int(line.split()[0]) for line in source.notices if "hidden" in line) == 4


def test_pipes_sockets_and_broken_links_are_skipped_and_nothing_hangs(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1.jpg")
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(tmp_path / "a")
        server.bind("socket.jpg")
        os.chdir(here)
    (tmp_path / "a" / "gone.jpg").symlink_to("nowhere.jpg")
    (tmp_path / "a" / "self.jpg").symlink_to("self.jpg")
    source = open_source(tmp_path)
    assert keys(source) == ["a/1.jpg"]
    assert notice(source, "pipes").startswith("2 entries skipped")
    assert notice(source, "nowhere").startswith("2 links skipped")


def test_links_are_followed_and_loops_are_not(tmp_path: Path) -> None:
    put(tmp_path / "src" / "a" / "1.jpg")
    put(tmp_path / "elsewhere" / "sub" / "2.jpg")
    (tmp_path / "src" / "a" / "linked.jpg").symlink_to(tmp_path / "elsewhere" / "sub" / "2.jpg")
    (tmp_path / "src" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "src" / "a" / "up").symlink_to("..")
    (tmp_path / "src" / "a" / "self").symlink_to(".")
    (tmp_path / "elsewhere" / "sub" / "back").symlink_to("..")
    source = open_source(tmp_path / "src")
    assert source.classes == ("a", "b")
    assert keys(source) == ["a/1.jpg", "a/linked.jpg", "b/sub/2.jpg"]
    assert notice(source, "back to a folder").startswith("3 links skipped")


def test_deep_folders_need_no_deep_stack(tmp_path: Path) -> None:
    deep = tmp_path / "a"
    deep.mkdir()
    for _ in range(1020):
        deep = deep / "d"
        deep.mkdir()
    image = put(tmp_path / "1.jpg").rename(deep / "1.jpg")
    put(tmp_path / "b" / "1.jpg")
    try:
        assert keys(open_source(tmp_path)) == ["a/" + "d/" * 1020 + "1.jpg", "b/1.jpg"]
    finally:
        # Python's own way to remove a tree does need a deep stack.
        image.unlink()
        while deep != tmp_path:
            deep.rmdir()
            deep = deep.parent


ODD_NAMES = [
    b"with space.jpg",
    b" leading and trailing .jpg",
    b"new\nline.jpg",
    b"tab\t.jpg",
    b"quote'\".jpg",
    b"-dash.jpg",
    b"semi;colon&$(x)`y`|.jpg",
    "\U0001f98b \u00fcn\u00efcode \u753b\u50cf.jpg".encode(),
    "e\u0301 combining.jpg".encode(),
    b"a" * 251 + b".jpg",
    b"..jpg.jpg.jpg"[2:],
    b"back\\slash.jpg",
    b"%00.jpg",
    b"latin\xe9\xff.jpg",
    b"\xed\xa0\x80 surrogate.jpg",
    b"Case.jpg",
    b"case.jpg",
]


def test_any_name_can_be_listed_and_read(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"cl\xe4ss \n")
    folder.mkdir()
    content = put(tmp_path / "ok" / "1.jpg").read_bytes()
    for number, name in enumerate(ODD_NAMES):
        (folder / os.fsdecode(name)).write_bytes(content + bytes([number]))
    source = open_source(tmp_path)
    assert source.classes == ("cl\\xe4ss \n", "ok")
    refs = [ref for ref in source.scan() if ref.label == 0]
    assert sorted(ref.path for ref in refs) == sorted(b"cl\xe4ss \n/" + name for name in ODD_NAMES)
    assert len({ref.key for ref in refs}) == len(ODD_NAMES)
    for ref in refs:
        ref.key.encode("utf-8")
        number = ODD_NAMES.index(ref.path.partition(b"/")[2])
        assert source.read(ref.path) == content + bytes([number])
    assert "cl\\xe4ss \n/latin\\xe9\\xff.jpg" in {ref.key for ref in refs}


def test_names_that_look_the_same_as_text_are_refused(tmp_path: Path) -> None:
    put(tmp_path / "a" / "x\\xff.jpg")
    (tmp_path / "a" / os.fsdecode(b"x\xff.jpg")).write_bytes(b"")
    with pytest.raises(SourceError, match="two names that are the same"):
        list(open_source(tmp_path).scan())


def test_a_root_that_is_not_utf8_opens_again_from_its_location(tmp_path: Path) -> None:
    root = tmp_path / os.fsdecode(b"r\xf6ot")
    put(root / "a" / "1.jpg")
    source = open_source(root)
    assert keys(open_source(source.location())) == ["a/1.jpg"]


def test_the_order_of_creation_does_not_matter(tmp_path: Path) -> None:
    names = [f"{c}/{i}.jpg" for c in ("b", "a", "C") for i in (10, 9, 1)]
    for root, order in (("one", names), ("two", names[::-1])):
        for name in order:
            put(tmp_path / root / name)
    assert keys(open_source(tmp_path / "one")) == keys(open_source(tmp_path / "two"))


# --- reading --------------------------------------------------------------------------------------


def test_files_that_change_after_the_scan_are_bad_images(tmp_path: Path) -> None:
    for name in ("gone", "folder", "pipe", "huge", "stays"):
        put(tmp_path / "a" / f"{name}.jpg")
    source = open_source(tmp_path)
    paths = {ref.key: ref.path for ref in source.scan()}
    for name in ("gone", "folder", "pipe"):
        (tmp_path / "a" / f"{name}.jpg").unlink()
    (tmp_path / "a" / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "a" / "pipe.jpg")
    os.truncate(tmp_path / "a" / "huge.jpg", 2**40)
    with pytest.raises(ImageDecodeError, match=r"^the file has vanished since the plan was made$"):
        source.read(paths["a/gone.jpg"])
    for name in ("folder", "pipe"):
        with pytest.raises(ImageDecodeError, match="it is no regular file any more"):
            source.read(paths[f"a/{name}.jpg"])
    with pytest.raises(ImageDecodeError, match="1099511627776 bytes; at most 536870912 are read"):
        source.read(paths["a/huge.jpg"])
    (tmp_path / "a" / "gone.jpg").symlink_to("gone.jpg")
    with pytest.raises(ImageDecodeError, match="cannot be opened: Too many levels"):
        source.read(paths["a/gone.jpg"])
    assert source.read(paths["a/stays.jpg"])


def test_a_source_that_has_gone_as_a_whole_ends_the_run(tmp_path: Path) -> None:
    put(tmp_path / "src" / "a" / "1.jpg")
    source = open_source(tmp_path / "src")
    shutil.rmtree(tmp_path / "src" / "a")
    with pytest.raises(ResourceError, match=r"src is empty or gone; .*1\.jpg was wanted") as caught:
        source.read(b"a/1.jpg")
    assert caught.value.exit_code == 6
    (tmp_path / "src").rmdir()
    with pytest.raises(ResourceError, match="empty or gone"):
        source.read(b"a/1.jpg")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs a file that gives EIO")
def test_an_input_output_error_that_stays_ends_the_run(tmp_path: Path) -> None:
    put(tmp_path / "a" / "1.jpg")
    # Address 0 is mapped nowhere: reading it is a real EIO.
    (tmp_path / "a" / "2.jpg").symlink_to("/proc/self/mem")
    source = open_source(tmp_path)
    assert keys(source) == ["a/1.jpg", "a/2.jpg"]
    with pytest.raises(ResourceError, match=r"2\.jpg cannot be read after 3 tries: Input/output"):
        source.read(b"a/2.jpg")


def test_an_error_that_passes_is_not_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = put(tmp_path / "a" / "1.jpg")
    source = open_source(tmp_path)
    real, failures = os.open, [OSError(116, "Stale file handle"), OSError(5, "Input/output error")]

    def fails_twice(name: bytes, flags: int) -> int:
        if failures:
            raise failures.pop()
        return real(name, flags)

    monkeypatch.setattr(os, "open", fails_twice)
    assert source.read(b"a/1.jpg") == path.read_bytes()
    assert not failures


@pytest.mark.parametrize("path", [b"/etc/hostname", b"../x.jpg", b"a/../../x.jpg", b"a\0.jpg"])
def test_no_path_leads_out_of_the_source(tmp_path: Path, path: bytes) -> None:
    put(tmp_path / "x.jpg")
    put(tmp_path / "src" / "a" / "1.jpg")
    with pytest.raises(SourceError, match="is no path below"):
        open_source(tmp_path / "src").read(path)


def test_a_folder_that_vanishes_while_it_is_listed_is_refused(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "b/1.jpg", "c/d/1.jpg"):
        put(tmp_path / name)
    source = open_source(tmp_path)
    refs = source.scan()
    assert next(refs).key == "a/1.jpg"
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(SourceError, match="b cannot be looked at: No such file"):
        list(refs)


def test_listing_retries_what_may_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "a" / "1.jpg")
    source = open_source(tmp_path)

    def stale(path: bytes) -> None:
        raise OSError(116, "Stale file handle")

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", stale)
        with pytest.raises(ResourceError, match="cannot be read after 3 tries: Stale"):
            list(source.scan())
    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stale)
        with pytest.raises(ResourceError, match="cannot be read after 3 tries: Stale"):
            list(source.scan())
    assert keys(source) == ["a/1.jpg"]


@contextmanager
def without_privileges() -> Iterator[None]:
    """Runs as no one where the tests run as root, whom permissions do not stop."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public_folder() -> Iterator[Path]:
    """A folder that every user can reach; pytest's own belongs to one user."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    yield root
    for path in root.rglob("*"):
        path.chmod(0o755)
    shutil.rmtree(root)


def test_an_unreadable_folder_is_refused(public_folder: Path) -> None:
    put(public_folder / "src" / "a" / "1.jpg")
    put(public_folder / "src" / "b" / "1.jpg")
    (public_folder / "src" / "b").chmod(0)
    with without_privileges():
        with pytest.raises(SourceError, match="b cannot be listed: Permission denied"):
            list(open_source(public_folder / "src").scan())
    (public_folder / "src").chmod(0)
    with without_privileges():
        with pytest.raises(SourceError, match="src cannot be listed: Permission denied"):
            open_source(public_folder / "src")
        with pytest.raises(SourceError, match="a cannot be read: Permission denied"):
            open_source(public_folder / "src" / "a")


def test_an_unreadable_file_is_a_bad_image_and_no_bad_run(public_folder: Path) -> None:
    put(public_folder / "src" / "a" / "1.jpg").chmod(0)
    put(public_folder / "src" / "a" / "mystery").chmod(0)
    with without_privileges():
        source = open_source(public_folder / "src")
        assert keys(source) == ["a/1.jpg"]
        with pytest.raises(ImageDecodeError, match=r"^permission to read the file is denied$"):
            source.read(b"a/1.jpg")
    assert "may not be read, for example a/mystery" in source.notices[0]
