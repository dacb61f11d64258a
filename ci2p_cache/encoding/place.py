"""Where a cache may be written: in a folder of its own, and in none that holds something else."""

from __future__ import annotations

from pathlib import Path

from ci2p_cache.cache.lock import LOCK
from ci2p_cache.cache.paths import ENCODER, MANIFEST, PLAN
from ci2p_cache.errors import NotACacheError, UsageError
from ci2p_cache.remote import shown, url_of

__all__ = ["refuse_foreign_folder", "refuse_place"]

_BEFORE_MANIFEST = {LOCK, ".staging", PLAN, ENCODER}
"""What a run killed before it wrote the manifest may have left, beside the locks of ranges."""


def refuse_place(root: Path, source: Path) -> None:
    """Refuses an output inside the source, and a folder that holds something else.

    Raises:
        UsageError: `root` is a URL, or is inside `source`.
        NotACacheError: something that is no cache is there.
    """
    if url_of(root) is not None:
        raise UsageError(
            f"`out` is a URL, {shown(str(url_of(root)))}; caches are encoded into a local folder",
            hint="give a local --out folder, and copy it there when it is finished",
        )
    if root.resolve().is_relative_to(source.resolve()):
        raise UsageError(
            f"`out` {root} is inside the source {source}, where it would be listed as images",
            hint="choose an --out folder beside the source",
        )
    refuse_foreign_folder(root)


def refuse_foreign_folder(root: Path) -> None:
    """Refuses a file, and a folder that holds something else than a cache.

    Raises:
        NotACacheError: something that is no cache is there.
    """
    if root.exists() and not root.is_dir():
        raise NotACacheError(f"{root} exists and is no folder", hint="choose another --out")
    if root.is_dir() and not (root / MANIFEST).exists():
        names = {path.name for path in root.iterdir() if not path.name.startswith(f"{LOCK}.")}
        foreign = sorted(names - _BEFORE_MANIFEST)
        if foreign:
            others = f" and {len(foreign) - 1} other entries" if len(foreign) > 1 else ""
            raise NotACacheError(
                f"{root} holds {foreign[0]!r}{others} but no {MANIFEST}, so it is no cache of ours "
                "and was not touched",
                hint="choose a new or empty --out folder",
            )
