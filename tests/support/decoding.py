"""Whatever decodes pictures beside `encode`, run in a process whose decoders a marked one kills.

Also a source of images as someone outside of the package writes it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import ci2p_cache as cc
from ci2p_cache.errors import ImageDecodeError, InputDataError
from ci2p_cache.images.source import ImageRef

__all__ = ["Shelf", "main"]


class Shelf:
    """Pictures in memory, by keys as "ant/1.jpg"."""

    notices: tuple[str, ...] = ()

    def __init__(self, pictures: dict[str, bytes]) -> None:
        self.pictures = pictures
        self.num_scans = 0

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(sorted({key.partition("/")[0] for key in self.pictures}))

    @property
    def class_titles(self) -> tuple[str, ...]:
        return tuple(name.upper() for name in self.classes)

    def location(self) -> str:
        return "shelf"

    def file_of(self, path: bytes) -> None:
        return None

    def scan(self) -> Iterator[ImageRef]:
        self.num_scans += 1
        for key in sorted(self.pictures):
            label = self.classes.index(key.partition("/")[0])
            yield ImageRef(key, None, label, key.encode())

    def read(self, path: bytes) -> bytes:
        try:
            return self.pictures[path.decode()]
        except KeyError:
            raise ImageDecodeError("it is not on the shelf any more") from None

    @classmethod
    def of(cls, folder: Path) -> Shelf:
        """Takes the pictures of a folder of class folders."""
        paths = sorted(folder.glob("*/*.jpg"))
        return cls({path.relative_to(folder).as_posix(): path.read_bytes() for path in paths})


def _loaded(loader: type[cc.PixelLoader] | type[cc.OnlineLoader], cache: str) -> str:
    try:
        with loader(cc.open_cache(cache)["train"], batch_size=4, shuffle=False) as batches:
            return f"{sum(len(batch.labels) for batch in batches)} images"
    except InputDataError as error:
        return str(error)


def _predicted(run: str, folder: str) -> dict[str, str | None]:
    from tests.support.nano import nano_models

    with nano_models():
        found = cc.load_classifier(run, device="cpu").predict([folder])
    return {Path(each.path).name: each.error for each in found}


def _previewed(cache: str, picture: str) -> dict[str, str]:
    from ci2p_cache.pictures.previews import draw_preview

    shown = draw_preview(cc.open_cache(cache), picture, split="train", count=4)
    return {sample.key: sample.source for sample in shown.samples}


def _left_out(folder: str) -> list[str]:
    from ci2p_cache.images.picture_folders import PictureFolders

    return PictureFolders([(Path(folder), 1.0)], shortest_px=16).left_out


def _encoded(folder: str, out: str) -> list[str]:
    options = cc.EncodeOptions(encoder="bundled", size=32, val_fraction=0.0, max_errors="50%")
    cc.encode(Shelf.of(Path(folder)), out, options)
    rows = pq.read_table(Path(out, "errors.parquet")).to_pylist()
    return [f"{row['key']}: {row['error']}" for row in rows]


_ACTIONS: dict[str, Callable[..., Any]] = {
    "pixels": lambda cache: _loaded(cc.PixelLoader, cache),
    "online": lambda cache: _loaded(cc.OnlineLoader, cache),
    "reencode": lambda cache: cc.reencode(cache, 99).changed,
    "predict": _predicted,
    "preview": _previewed,
    "pictures": _left_out,
    "own": _encoded,
}


def main() -> None:
    """Does what the command line names, and writes what became of it as JSON."""
    _, what, *arguments = sys.argv
    print(json.dumps(_ACTIONS[what](*arguments)))
