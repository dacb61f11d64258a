"""The same images in every kind of source: what the conformance suite is run over."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

Entry = tuple[str, bytes, str]
"""Key, content, class."""


def entries(folder: Path) -> list[Entry]:
    """What is in a folder of classes, in the order of its names."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    keys = [path.relative_to(folder).as_posix() for path in files]
    return [(k, p.read_bytes(), k.split("/")[0]) for k, p in zip(keys, files, strict=True)]


def tar_bytes(
    members: Iterable[tuple[str | bytes, bytes]], kind: int = tarfile.PAX_FORMAT
) -> bytes:
    """A tar of files, as the standard library writes it."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=kind) as archive:
        for name, content in members:
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return sink.getvalue()


def samples(images: Iterable[Entry]) -> list[tuple[str, bytes]]:
    """Members of a WebDataset tar: each image and its .cls."""
    members = []
    for key, content, name in images:
        folder, slash, base = key.rpartition("/")
        members += [
            (key, content),
            (f"{folder}{slash}{base.split('.')[0]}.cls", name.encode("utf-8", "surrogateescape")),
        ]
    return members


def pack(path: Path, data: bytes) -> Path:
    """Writes a tar in the way that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in (".gz", ".tgz"):
        data = gzip.compress(data, 3)
    elif path.suffix == ".zst":
        data = zstandard.compress(data)
    path.write_bytes(data)
    return path


def image_table(images: Sequence[Entry], classes: Sequence[str]) -> pa.Table:
    """The table that `datasets` writes: an Image and a ClassLabel column."""
    rows = [{"bytes": content, "path": key} for key, content, _ in images]
    numbers = [classes.index(name) if name in classes else -1 for _, _, name in images]
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(classes), "_type": "ClassLabel"},
    }
    schema = pa.schema(
        [
            ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
            ("label", pa.int64()),
        ],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    return pa.table({"image": rows, "label": numbers}, schema=schema)


def write_images(path: Path, images: Sequence[Entry], classes: Sequence[str], group: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(image_table(images, classes), path, row_group_size=group)
    return path


def _tars(root: Path, images: list[Entry], suffix: str, parts: int) -> Path:
    size = -(-len(images) // parts)
    for number in range(parts):
        own = images[number * size : (number + 1) * size]
        pack(root / f"part-{number:06d}{suffix}", tar_bytes(samples(own)))
    return root


def _one_tar(root: Path, images: list[Entry]) -> Path:
    return pack(root / "all.tar", tar_bytes(samples(images), tarfile.GNU_FORMAT))


def _gzip(root: Path, images: list[Entry]) -> Path:
    return _tars(root, images, ".tar.gz", 2)


def _zstd(root: Path, images: list[Entry]) -> str:
    return str(_tars(root, images, ".tar.zst", 3) / "part-{000000..000002}.tar.zst")


def _glob(root: Path, images: list[Entry]) -> str:
    return str(_tars(root, images, ".tar", 3) / "part-*.tar")


def _numbered(root: Path, images: list[Entry]) -> Path:
    classes = sorted({name for _, _, name in images})
    members = []
    for key, content, name in images:
        label = json.dumps({"label": classes.index(name), "other": [1]}).encode()
        members += [(f"./{key}", content), (f"./{key.rpartition('.')[0]}.json", label)]
    (root / "classes.txt").write_text("\n".join(classes) + "\n")
    return pack(root / "all.tgz", tar_bytes(members, tarfile.USTAR_FORMAT))


def _parquet(root: Path, images: list[Entry]) -> Path:
    classes, half = sorted({name for _, _, name in images}), len(images) // 2
    for number, own in enumerate((images[:half], images[half:])):
        write_images(root / "data" / f"part-{number:05d}-of-00002.parquet", own, classes, 4)
    return root


def _csv(root: Path, images: list[Entry]) -> Path:
    _files(root, images)
    with (root / "list.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["label", "note", "path"])
        writer.writerows([name, "x, y", f"{root}/{key}"] for key, _, name in images)
    return root / "list.csv"


def _table(root: Path, images: list[Entry]) -> Path:
    _files(root, images)
    columns = {"path": [key for key, _, _ in images], "label": [name for _, _, name in images]}
    pq.write_table(pa.table(columns), root / "list.parquet")
    return root / "list.parquet"


def _files(root: Path, images: list[Entry]) -> Path:
    for key, content, _ in images:
        (root / key).parent.mkdir(parents=True, exist_ok=True)
        (root / key).write_bytes(content)
    return root


def _zip(root: Path, images: list[Entry]) -> Path:
    with zipfile.ZipFile(root / "all.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for key, content, _ in images:
            archive.writestr(key, content)
    return root / "all.zip"


KINDS: dict[str, Callable[[Path, list[Entry]], Path | str]] = {
    "folder": _files,
    "zip": _zip,
    "one tar": _one_tar,
    "tar.gz folder": _gzip,
    "tar.zst braces": _zstd,
    "tar glob": _glob,
    "tgz with json and classes.txt": _numbered,
    "parquet": _parquet,
    "csv": _csv,
    "parquet list": _table,
}
"""Kind -> a function that writes the images in that form below a folder and gives the location."""

IN_SEQUENCE = ("one tar", "tar.gz folder", "tar.zst braces", "tar glob",
               "tgz with json and classes.txt", "parquet")  # fmt: skip
