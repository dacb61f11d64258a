"""The images that both trees read: generated ones in every kind of source, odd ones, real ones."""

from __future__ import annotations

import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from tests.long.sameness.tree import REPO
from tests.support.pictures import picture, write_image_folder
from tests.support.sources import KINDS, entries, pack, samples, tar_bytes

__all__ = ["Inputs", "make_inputs"]

_DATA = Path(os.environ.get("CI2P_CACHE_TEST_DATA", REPO.parent / "shared" / "data"))
_COUNTS = {"ant": 9, "bee": 7, "cat": 5}
_WNIDS = ("n01440764", "n01443537", "n02119789")


@dataclass
class Inputs:
    """Where the images are, by name."""

    root: Path
    locations: dict[str, str] = field(default_factory=dict)
    """Name -> what `encode` takes."""
    skipped: list[str] = field(default_factory=list)
    """What is not there on this machine."""

    def __getitem__(self, name: str) -> str:
        return self.locations[name]

    def __contains__(self, name: str) -> bool:
        return name in self.locations

    def put(self, name: str, location: object) -> None:
        """Names a source."""
        self.locations[name] = str(location)


def make_inputs(root: Path) -> Inputs:
    """Writes all sources below a folder."""
    inputs = Inputs(root)
    folder = write_image_folder(root / "folder", _COUNTS)
    inputs.put("folder", folder)
    for kind, write in KINDS.items():
        made = root / "kinds" / kind.replace(" ", "-")
        made.mkdir(parents=True)
        inputs.put(kind, write(made, entries(folder)))
    parts = root / "parts"
    write_image_folder(parts / "train", {"ant": 9, "bee": 7, "cat": 8})
    write_image_folder(parts / "val", {"ant": 3, "bee": 2, "cat": 3}, quality=60)
    inputs.put("parts", parts)
    inputs.put("few", write_image_folder(root / "few", {"ant": 3, "bee": 2}))
    inputs.put("imagenet", _imagenet(root / "imagenet"))
    inputs.put("odd", _odd(root / "odd"))
    # All of them in one packed tar: damaged images there too.
    images = [each for each in entries(root / "odd") if not each[0].endswith(".txt")]
    tar = tar_bytes(samples(images))
    inputs.put("odd tar", pack(root / "odd-tar" / "odd.tar.gz", tar))
    _bad_sources(inputs, root / "bad")
    _real(inputs, root)
    return inputs


def _imagenet(root: Path) -> Path:
    data = root / "ILSVRC" / "Data" / "CLS-LOC"
    for number, wnid in enumerate(_WNIDS):
        for i in range(3):
            path = data / "train" / wnid / f"{wnid}_{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(10 * number + i, 80, 70).save(path)
    lines = ["ImageId,PredictionString"]
    for number in (3, 1, 2):
        path = data / "val" / f"ILSVRC2012_val_{number:08d}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(100 + number, 90, 66).save(path)
        lines.append(f"{path.stem},{_WNIDS[number - 1]} 1 2 30 40 ")
    (root / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")
    (root / "LOC_synset_mapping.txt").write_text(
        "n01440764 tench, Tinca tinca\nn01443537 goldfish\nn02119789 kit fox, Vulpes macrotis\n"
    )
    return root


def _odd(root: Path) -> Path:
    """Images of every kind, turned, transparent, damaged, and files that are no images."""
    one, two = root / "one", root / "two of them"
    one.mkdir(parents=True)
    two.mkdir()
    base = picture(1, 90, 70)
    base.save(one / "rgb.png")
    base.convert("L").save(one / "gray.jpg")
    base.convert("CMYK").save(one / "cmyk.jpg")
    base.convert("P").save(one / "palette.png")
    base.convert("1").save(one / "bits.png")
    base.convert("LA").save(one / "gray-alpha.png")
    rgba = base.convert("RGBA")
    rgba.putalpha(picture(2, 90, 70).convert("L"))
    rgba.save(one / "alpha.png")
    rgba.save(one / "alpha-too.webp", lossless=True)
    Image.fromarray(np.arange(90 * 70, dtype=np.uint16).reshape(70, 90) * 9).save(one / "16.png")
    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        picture(turn, 96, 64).save(two / f"turned-{turn}.jpg", exif=exif)
    base.save(two / "bmp.bmp")
    base.save(two / "tiff.tif")
    base.save(two / "progressive.jpg", progressive=True, quality=70)
    base.save(two / "webp.webp", quality=80)
    base.save(two / "moving.gif", save_all=True, append_images=[picture(3, 90, 70)])
    picture(4, 400, 9).save(two / "wide.png")
    picture(5, 8, 300).save(two / "high.png")
    picture(6, 1, 1).save(two / "dot.png")
    base.save(two / "ünï côdé 画像.JPG", format="JPEG")
    base.save(two / "really-a-png.jpg", format="PNG")
    whole = _jpeg(7)
    (one / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (one / "empty.jpg").write_bytes(b"")
    (one / "text.jpg").write_text("no image at all\n")
    (two / "flipped.jpg").write_bytes(whole[:300] + bytes(64) + whole[364:])
    (two / "notes.txt").write_text("this is not an image, and says so\n")
    return root


def _jpeg(seed: int) -> bytes:
    sink = io.BytesIO()
    picture(seed, 90, 70).save(sink, "JPEG", quality=92)
    return sink.getvalue()


def _bad_sources(inputs: Inputs, root: Path) -> None:
    """Sources that are refused, as "bad NAME"."""
    for name, make in _BAD.items():
        path = root / name.replace(" ", "-")
        path.mkdir(parents=True)
        inputs.put(f"bad {name}", make(path))


def _some(root: Path) -> list[tuple[str, bytes, str]]:
    folder = write_image_folder(root / "images", {"ant": 3, "bee": 2})
    return entries(folder)


def _cut_tar(root: Path) -> Path:
    data = tar_bytes(samples(_some(root)))
    return pack(root / "cut.tar", data[: len(data) // 2])


def _cut_gzip(root: Path) -> Path:
    path = pack(root / "cut.tar.gz", tar_bytes(samples(_some(root))))
    path.write_bytes(path.read_bytes()[:-300])
    return path


def _flipped_tar(root: Path) -> Path:
    data = bytearray(tar_bytes(samples(_some(root))))
    data[100] ^= 8
    return pack(root / "flipped.tar", bytes(data))


def _unlabelled_tar(root: Path) -> Path:
    return pack(root / "x.tar", tar_bytes([(key, data) for key, data, _ in _some(root)]))


def _twice(root: Path) -> Path:
    members = samples(_some(root))
    return pack(root / "twice.tar", tar_bytes([*members, members[0]]))


def _other_columns(root: Path) -> Path:
    pq.write_table(pa.table({"picture": [b"x"], "number": [1]}), root / "other.parquet")
    return root / "other.parquet"


def _no_table(root: Path) -> Path:
    (root / "no.parquet").write_bytes(b"PAR1 and then nothing of the kind PAR1")
    return root / "no.parquet"


def _list(root: Path, text: str, name: str = "list.csv") -> Path:
    (root / name).write_text(text)
    return root / name


def _flat(root: Path) -> Path:
    picture(1).save(root / "a.jpg")
    return root


def _texts(root: Path) -> Path:
    (root / "ant").mkdir()
    (root / "ant" / "a.txt").write_text("nothing")
    return root


def _all_cut(root: Path) -> Path:
    for name in ("ant", "bee"):
        (root / name).mkdir()
        (root / name / "a.jpg").write_bytes(_jpeg(1)[:200])
    return root


def _only_val(root: Path) -> Path:
    return write_image_folder(root / "val", {"ant": 2}).parent


def _one_picture(root: Path) -> Path:
    picture(1).save(root / "a.jpg")
    return root / "a.jpg"


_BAD = {
    "empty": lambda root: root,
    "gone": lambda root: root / "nowhere",
    "flat": _flat,
    "texts": _texts,
    "all cut": _all_cut,
    "only val": _only_val,
    "one picture": _one_picture,
    "cut tar": _cut_tar,
    "cut gzip": _cut_gzip,
    "flipped tar": _flipped_tar,
    "unlabelled tar": _unlabelled_tar,
    "key twice": _twice,
    "no tars": lambda root: f"{root}/part-*.tar",
    "missing tar": lambda root: f"{root}/part-{{000000..000002}}.tar",
    "other columns": _other_columns,
    "no parquet": _no_table,
    "list without path": lambda root: _list(root, "file,label\na.jpg,ant\n"),
    "list of nothing": lambda root: _list(root, "path,label\n"),
    "list of missing": lambda root: _list(root, "path,label\nnowhere/a.jpg,ant\n"),
    "list with odd split": lambda root: _list(root, "path,label,split\na.jpg,ant,other\n"),
}


def _real(inputs: Inputs, root: Path) -> None:
    """A few photographs, and the folder of awkward files, where they are."""
    flowers, awkward = _DATA / "flowers", _DATA / "awkward"
    if flowers.is_dir():
        for path in _every(flowers, 3):
            target = root / "flowers" / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        inputs.put("flowers", root / "flowers")
    else:
        inputs.skipped.append("real photographs (flowers)")
    if awkward.is_dir():
        shutil.copytree(awkward, root / "awkward" / "all")
        # A second class: images of one are no data set to train from.
        (root / "awkward" / "one").mkdir()
        shutil.copy(awkward / "cmyk_adobe_noicc.jpg", root / "awkward" / "one")
        inputs.put("awkward", root / "awkward")
    else:
        inputs.skipped.append("the folder of awkward files")


def _every(folder: Path, count: int) -> Iterator[Path]:
    """The first files of each folder, by name."""
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        yield from sorted(inner.iterdir())[:count]
