"""R7 for tar and parquet: what a folder of awkward things gives, an archive of them gives too."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

import ci2p_cache as cc
from ci2p_cache.cache.verify import verify
from ci2p_cache.images.locate import open_source
from tests.images.test_awkward_folder import (
    OPTIONS,
    Notes,
    assert_outcomes,
    encode_apart,
    outcomes,
)
from tests.images.test_decode import AWKWARD_BAD, AWKWARD_OK
from tests.images.test_files import ODD_NAMES
from tests.support.pictures import picture
from tests.support.sources import Entry, image_table, pack, samples, tar_bytes, write_images
from tests.support.warm import WarmParent


def jpeg(seed: int = 1) -> bytes:
    sink = io.BytesIO()
    picture(seed, 70, 50).save(sink, "JPEG")
    return sink.getvalue()


def spread(images: list[Entry]) -> list[tuple[str | bytes, bytes]]:
    """Members with a README between samples: names that differ in their suffix are not one."""
    members: list[tuple[str | bytes, bytes]] = []
    for number, image in enumerate(images):
        members += [*samples([image]), (f"notes/{number}.txt", b"no image")]
    return members


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tar", "tar.gz", "parquet"])
def test_every_awkward_file_has_its_outcome(
    warm: WarmParent, shared_data: Path, tmp_path: Path, kind: str
) -> None:
    files = sorted((shared_data / "awkward").iterdir())
    images = [(f"all/{f.name}", f.read_bytes(), "all") for f in files if f.name != "README.md"]
    source = tmp_path / f"src.{kind}"
    if kind == "parquet":
        write_images(source, images, ["all"], 40)
    else:
        pack(source, tar_bytes(spread(images)))
    _, notes = encode_apart(warm, source, tmp_path / "out")
    bad = {name: reason for name, reason in AWKWARD_BAD.items() if name != "avif.avif"}
    expected = {f"all/{n}": None for n in AWKWARD_OK} | {f"all/{n}": r for n, r in bad.items()}
    if kind == "parquet":
        # Every row is an image there, whatever it is called.
        expected["all/avif.avif"] = AWKWARD_BAD["avif.avif"]
    assert_outcomes(outcomes(tmp_path / "out"), expected)
    if kind != "parquet":
        assert "1 images ignored whose format is not read (1 .avif)" in notes
        assert f"{len(images)} files ignored that are no images" in notes
    assert verify(tmp_path / "out") == []


# As LISTED and NOT_LISTED of the folder, for what a tar can hold.
LISTED: dict[str, str | None] = {
    "a/plain.jpg": None,
    "a/empty.jpg": "the file is empty",
    "a/text.jpg": "none of",
    "a/sub/deep/1.jpg": None,
    "a/same.jpg": None,
    "b/same.jpg": None,
    "a/no_suffix": None,
    "Case/1.jpg": None,
    "case/1.JPG": None,
}


def test_odd_things_in_a_tar_have_their_outcome(tmp_path: Path) -> None:
    contents = {"a/empty.jpg": b"", "a/text.jpg": b"no picture at all"}
    images = [(n, contents.get(n, jpeg(len(n))), n.split("/")[0]) for n in LISTED]
    hidden = [(".git/1.jpg", jpeg()), ("a/.hidden.jpg", jpeg()), ("__MACOSX/a/1.jpg", jpeg())]
    sink = io.BytesIO(tar_bytes([*samples(images), *hidden]))
    with tarfile.open(fileobj=sink, mode="a") as archive:
        for name, type_ in (("a/linked.jpg", tarfile.SYMTYPE), ("a/pipe.jpg", tarfile.FIFOTYPE),
                            ("a/null.jpg", tarfile.CHRTYPE), ("a", tarfile.DIRTYPE)):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = type_, "/etc/passwd"
            archive.addfile(info)
    pack(tmp_path / "src.tar", sink.getvalue())
    notes = Notes()
    cc.encode(tmp_path / "src.tar", tmp_path / "out", OPTIONS, observer=notes)
    assert_outcomes(outcomes(tmp_path / "out"), LISTED)
    assert cc.open_cache(tmp_path / "out").classes == ("Case", "a", "b", "case")
    told = "\n".join(notes.texts)
    assert "3 hidden files or folders skipped" in told
    assert "3 archive members skipped that are no files (links, pipes, devices)" in told
    assert verify(tmp_path / "out") == []


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_odd_names_in_a_tar_are_listed_and_read(tmp_path: Path, kind: int) -> None:
    folder = b"-cl\xe4ss \n\"'"
    # The standard library would let "aaa" of 251 bytes and of Case and case be two members each.
    members: list[tuple[str | bytes, bytes]] = []
    for number, name in enumerate(ODD_NAMES):
        stem = name.split(b".")[0]
        members += [(folder + b"/" + name, b"\xff\xd8\xff%d" % number),
                    (folder + b"/" + stem + b".cls", folder)]  # fmt: skip
    pack(tmp_path / "odd.tar", tar_bytes(members, kind))
    source = open_source(tmp_path / "odd.tar")
    keys = {ref.key: source.read(ref.path) for ref in source.scan()}
    assert source.classes == ("-cl\\xe4ss \n\"'",)
    wanted = {
        (folder + b"/" + name).decode("utf-8", "backslashreplace"): b"\xff\xd8\xff%d" % number
        for number, name in enumerate(ODD_NAMES)
    }
    assert keys == wanted


def test_rows_without_bytes_are_bad_images(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = image_table([(f"a/{n}.jpg", jpeg(n), "ab"[n % 2]) for n in range(4)], ["a", "b"])
    rows = table["image"].to_pylist()
    rows[1]["bytes"] = None
    rows[2] = {"bytes": b"", "path": "a/2.jpg"}
    table = table.set_column(0, table.schema.field(0), pa.array(rows, table.schema.field(0).type))
    pq.write_table(table, tmp_path / "x.parquet")
    cc.encode(tmp_path / "x.parquet", tmp_path / "out", OPTIONS)
    expected = {"a/0.jpg": None, "a/1.jpg": "holds no bytes", "a/2.jpg": "the file is empty",
                "a/3.jpg": None}  # fmt: skip
    assert_outcomes(outcomes(tmp_path / "out"), expected)
