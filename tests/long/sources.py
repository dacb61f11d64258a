"""The same photographs through every kind of source, also from an S3 server on loopback.

Encodes `--count` images of a folder of classes as they are there, then as tars, packed tars,
parquet files and lists, and holds key, class and the crc32c of each latent against the folder's.

python tests/long/sources.py IMAGES [--count 200] [--size 256]
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ.setdefault("OMP_NUM_THREADS", "1")

import ci2p_cache as cc
from tests.support.s3_server import KEY, SECRET, put_folder, s3_server
from tests.support.sources import KINDS, entries


def rows(out: Path) -> dict[tuple[str, str], tuple[object, ...]]:
    """(split, key) -> class, label and crc32c of every view."""
    cache, found = cc.open_cache(out), {}
    for name in cache.splits:
        for shard in range(cache[name].record.num_shards):
            table = cache[name].read_index(shard, ["key", "class", "label", "latent_crc32c"])
            for row in table.to_pylist():
                values = (row["class"], row["label"], *row["latent_crc32c"])
                found[name, row["key"]] = values
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--size", type=int, default=256)
    given = parser.parse_args()
    options = cc.EncodeOptions(encoder="bundled", size=given.size)
    failed = 0
    with tempfile.TemporaryDirectory() as name, s3_server() as endpoint:
        root = Path(name)
        os.environ |= {
            "AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_DEFAULT_REGION": "us-east-1", "CI2P_CACHE_MIRRORS": str(root / "mirrors"),
        }  # fmt: skip
        folder = root / "folder"
        paths = sorted(path for path in given.images.rglob("*") if path.is_file())
        for number in range(given.count):
            path = paths[number * len(paths) // given.count]
            target = folder / path.relative_to(given.images)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
        cc.encode(folder, root / "out", options)
        wanted = rows(root / "out")
        print(f"folder: {len(wanted)} images, {cc.open_cache(root / 'out').classes}", flush=True)
        put_folder(endpoint, folder, "photographs", "folder")
        locations: dict[str, str] = {"S3, folder": "s3://photographs/folder"}
        for kind, write in KINDS.items():
            made = root / "made" / kind.replace(" ", "-")
            made.mkdir(parents=True)
            locations[kind] = str(write(made, entries(folder)))
        for number, (kind, location) in enumerate(locations.items()):
            cc.encode(location, root / f"out{number}", options)
            same = rows(root / f"out{number}") == wanted
            failed += not same
            print(f"{kind}: {'the same' if same else 'ANOTHER RESULT'}", flush=True)
    print("all the same" if not failed else f"{failed} differ")
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
