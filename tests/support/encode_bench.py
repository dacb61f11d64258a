"""One small encode, disturbed and repeated: what every trial of the bars R1 and R2 does."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ci2p_cache as cc
from tests.support.pictures import picture, write_image_folder
from tests.support.warm import Ended, WarmParent

__all__ = ["KINDS", "EncodeBench", "GrowthBench", "MoreViewsBench", "spread", "tree"]

KINDS = ("EIO", "ENOSPC", "before", "after")

_TIDIED = (".staging", ".lock", ".growth")
_HIT = re.compile(r"^ci2p-fault hit (\d+) (\w+) (.*)$", re.MULTILINE)


def tree(root: Path) -> dict[str, str]:
    """Every path below a folder: the sha256 of a file, "folder" or "link" for anything else."""
    found = {}
    for path in sorted(root.rglob("*")):
        kind = "link" if path.is_symlink() else "folder"
        is_file = path.is_file() and not path.is_symlink()
        found[path.relative_to(root).as_posix()] = (
            hashlib.sha256(path.read_bytes()).hexdigest() if is_file else kind
        )
    return found


def spread(last: int, count: int | None) -> list[int]:
    """`count` numbers from 1 to `last`, both included, evenly spread; None for all of them."""
    if count is None or count >= last:
        return list(range(1, last + 1))
    steps = max(count - 1, 1)
    return sorted({1 + round(i * (last - 1) / steps) for i in range(count)})


class EncodeBench:
    """An undisturbed encode as the reference, and disturbed ones held against it.

    Args:
        folder: Empty; the source and the caches are in it.
        images: Images of each of two classes.
        shard_samples: Images per shard.
        size: Side of the encoded square in pixels.
        format: Container of the latents.
        views: Views of an image.
    """

    def __init__(
        self,
        folder: Path,
        *,
        images: int = 3,
        shard_samples: int = 3,
        size: int = 32,
        format: str = "zarr",
        views: str = "none",
    ) -> None:
        self.folder = folder
        self.out = folder / "out"
        self._source = write_image_folder(folder / "src", {"ant": images, "bee": images})
        self._options = [
            *("--encoder", "bundled", "--size", str(size), "--views", views),
            *("--shard-samples", str(shard_samples), "--val-fraction", "0"),
            *("--device", "cpu:1", "--workers", "1", "--format", format),
        ]
        self.num_images, self.shard_samples = 2 * images, shard_samples
        self.num_shards = -(-self.num_images // shard_samples)
        self.whole: dict[str, str] = {}
        self.calls = 0
        self.told = ""
        self.seconds = 0.0
        self.tidied_later = 0

    @property
    def arguments(self) -> list[str]:
        """The command, without `ci2p-cache`."""
        return ["encode", str(self._source), "--out", str(self.out), *self._options]

    def fresh(self) -> None:
        """Puts the output folder as it is before the command."""
        shutil.rmtree(self.out, ignore_errors=True)

    def broken(self) -> Iterator[str]:
        """Yields what is wrong with what a disturbed run has left."""
        yield from ()

    def undisturbed(self, warm: WarmParent) -> Ended:
        """Encodes once as the reference; counts the calls and takes the time."""
        if not warm.has_encoded:
            first = warm.run(*self.arguments)
            assert first.code == 0, first.told
            warm.has_encoded = True
        self.fresh()
        ended = warm.run(*self.arguments, root=self.out, kind="trace")
        assert ended.code == 0, ended.told
        self.whole, self.calls, self.seconds = tree(self.out), ended.calls, ended.seconds
        self.told = ended.told
        return ended

    def fault(self, warm: WarmParent, at: int, kind: str) -> Iterator[str]:
        """Lets call number `at` of a fresh encode fail, repeats the command, yields what is wrong.

        A call that fails while the finished cache is only tidied up (staging, lock) may end in
        exit 0; it is counted in `tidied_later`.
        """
        self.fresh()
        ended = warm.run(*self.arguments, root=self.out, at=at, kind=kind)
        hit = _HIT.search(ended.told)
        if hit is None:
            yield f"the fault was not hit; exit {ended.code}: {_last(ended)}"
            return
        where = f"{hit[2]} of {hit[3]}"
        found = tree(self.out)
        left = {name for name in (".staging", ".lock") if name in found}
        if kind in ("before", "after"):
            if ended.code != -9:
                yield f"{where}: exit {ended.code}, wanted SIGKILL"
        elif ended.code == 0:
            self.tidied_later += 1
            kept = {k: v for k, v in found.items() if not k.startswith(_TIDIED)}
            if kept != self.whole:
                yield f"{where}: exit 0 without a whole cache"
        elif ended.code != 6:
            yield f"{where}: exit {ended.code}, wanted 6: {_last(ended)}"
        elif left and hit[2] not in ("unlink", "rmdir"):
            yield f"{where}: exit 6 left {sorted(left)}"
        yield from (f"{where}: {text}" for text in (*self.broken(), *self.repeated(warm)))

    def repeated(self, warm: WarmParent) -> Iterator[str]:
        """Runs the command undisturbed on what is there; yields what differs from the reference."""
        ended = warm.run(*self.arguments)
        if ended.code != 0:
            yield f"the same command again: exit {ended.code}: {_last(ended)}"
            return
        found = tree(self.out)
        for name in sorted(found.keys() | self.whole.keys()):
            if found.get(name) != self.whole.get(name):
                yield f"afterwards {name} is {found.get(name)}, wanted {self.whole.get(name)}"

    def commits(self) -> set[str]:
        """Names of the commit records that are there."""
        return {path.name for path in self.folder_of_commits().glob("commits/*.json")}

    def folder_of_commits(self) -> Path:
        """The folder in which shards are committed."""
        return self.out


class GrowthBench(EncodeBench):
    """A complete cache that takes in as many images again; of two shards the second is shared.

    Args:
        folder: As for `EncodeBench`.
        warm: What encodes the cache that grows.
        options: As for `EncodeBench`.
    """

    def __init__(self, folder: Path, warm: WarmParent, **options: Any) -> None:
        super().__init__(folder, **{"images": 3, "shard_samples": 4} | options)
        self._before = folder / "before"
        ended = warm.run(*self.arguments)
        assert ended.code == 0, ended.told
        self.out.rename(self._before)
        self.grow()
        self.fresh()

    def grow(self) -> None:
        """Changes source and command, so that the cache is to grow."""
        for seed, path in enumerate(sorted((self.folder / "src").rglob("*.jpg")), start=9000):
            # The originals of what is committed are gone, and others are there.
            path.unlink()
            picture(seed).save(path.with_name(f"new-{path.name}"))
        self._options.append("--rescan")
        self.num_shards = -(-2 * self.num_images // self.shard_samples)

    def fresh(self) -> None:
        super().fresh()
        shutil.copytree(self._before, self.out)

    def undisturbed(self, warm: WarmParent) -> Ended:
        ended = super().undisturbed(warm)
        assert len(self.commits()) == self.num_shards, "it has not grown"
        return ended

    def broken(self) -> Iterator[str]:
        yield from (f"{item.path} is {item.kind}" for item in cc.verify(self.out))

    def folder_of_commits(self) -> Path:
        growth = self.out / ".growth"
        return growth if (growth / "cache.json").exists() else self.out


class MoreViewsBench(GrowthBench):
    """A complete cache of one crop an image that gets two more; arguments as for `GrowthBench`."""

    def __init__(self, folder: Path, warm: WarmParent, **options: Any) -> None:
        super().__init__(folder, warm, **options, views="crops:1")

    def grow(self) -> None:
        self._options[self._options.index("crops:1")] = "crops:3"
        self._options.append("--add-views")


def _last(ended: Ended) -> str:
    lines = [line for line in ended.told.splitlines() if line and "ci2p-fault" not in line]
    return " | ".join(lines[-4:])
