"""`repair`: puts back what `verify` finds damaged, to the same bytes, and touches nothing else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

from ci2p_cache.cache.commit import CommitRecord
from ci2p_cache.cache.growth import drop_growth
from ci2p_cache.cache.manifest import Manifest, read_manifest
from ci2p_cache.cache.paths import MANIFEST, PLAN, commit_path, index_path
from ci2p_cache.cache.staging import StagingArea, disk_errors
from ci2p_cache.cache.store import open_cache
from ci2p_cache.cache.verify import Finding, verify
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoder.load import load_recorded_encoder
from ci2p_cache.encoding.claims import whole_folder
from ci2p_cache.encoding.finalise import finalise
from ci2p_cache.encoding.interrupt import interruptible
from ci2p_cache.encoding.plan import Plan, read_plan
from ci2p_cache.encoding.progress import EncodeObserver
from ci2p_cache.encoding.repair.replay import (
    Replay,
    changed_sources,
)
from ci2p_cache.encoding.repair.restore import restored_encoder, restored_plan
from ci2p_cache.encoding.repair.summary import RepairSummary
from ci2p_cache.encoding.repair.witnesses import Witnesses
from ci2p_cache.encoding.same_decoder import refuse_other_decoder
from ci2p_cache.errors import SourceError, command
from ci2p_cache.images.locate import open_reader, open_source
from ci2p_cache.images.source import ImageReader

__all__ = ["repair", "restore"]

_T = TypeVar("_T")

_MAX_NAMED = 10
"""Changed source images that an error names; it counts the rest."""


def repair(
    path: str | Path,
    *,
    source: str | Path | None = None,
    weights: Path | None = None,
    observer: EncodeObserver | None = None,
    on_shard: Callable[[int, int], None] | None = None,
) -> RepairSummary:
    """Checks every byte of a cache and puts back what is damaged.

    Damaged shards are encoded again with the batch size and device that their commit records hold,
    by the cache's own encoder, so on the same software the cache has the very bytes it had. Files
    that no record lists are left alone. Run again after an interruption, it continues.

    Args:
        path: The cache folder; in one that is still being encoded only committed shards are put
            back.
        source: Where the images are now; None: where they were when the cache was made.
        weights: A weights file to restore a damaged encoder.safetensors from; None: the bundled
            or the downloaded official weights, if they are the ones.
        observer: Receives progress and notices.
        on_shard: Called with (shards checked, shards in all) while looking for damage.

    Returns:
        What was found, repaired and left.

    Raises:
        NotACacheError: the folder is missing or is no cache.
        ManifestError: `cache.json` is damaged, or the plan is and cannot be put together again.
        LockedError: another process works on the folder.
        SourceError: the source is gone, or images have changed since; the message names them, and
            their shards are left as they are.
        WeightsError: `weights` cannot be used or is another encoder.
        FingerprintMismatchError: the decoders here are not those that made the cache.
        RefusedError: a shard was encoded on a device that is not here.
        ResourceError: reading or writing failed; run it again later.
        InterruptedRunError: a signal stopped it; run it again to continue.
    """
    root = Path(path)
    read_manifest(root)
    with (
        interruptible(f"interrupted; what was repaired so far in {root} is in place"),
        disk_errors(root),
        whole_folder(root, what="repair"),
    ):
        found = verify(root, on_shard=on_shard)
        job = _Repair(root, found, source, weights, observer or EncodeObserver())
        return job.done()


def restore(
    root: Path,
    found: list[Finding],
    source: str,
    weights: Path | None,
    observer: EncodeObserver,
) -> RepairSummary:
    """Puts back what was found damaged in a cache whose lock the caller holds; as `repair`."""
    return _Repair(root, found, source, weights, observer).done()


class _Repair:
    """One repair while it runs.

    Args:
        root: The cache folder.
        found: What is wrong.
        source: Where the images are now.
        weights: A weights file.
        observer: Receives progress and notices.
    """

    def __init__(
        self,
        root: Path,
        found: list[Finding],
        source: str | Path | None,
        weights: Path | None,
        observer: EncodeObserver,
    ) -> None:
        self.root = root
        self.found = found
        self.wanted = [item for item in found if item.kind not in ("foreign", "unfinished")]
        self.manifest: Manifest = read_manifest(root)
        self._paths = {item.path for item in self.wanted}
        self._witnesses = Witnesses(open_cache(root, partial=True), self.wanted)
        self._damaged: list[tuple[str, int]] = []
        self._source = source
        self._weights = weights
        self._observer = observer
        self._images: ImageReader | None = None
        self._encoder: FrozenEncoder | None = None
        self._repaired: set[str] = set()
        self._reasons: dict[str, str] = {}
        self._encoded: list[CommitRecord] = []
        self._identical = True

    def done(self) -> RepairSummary:
        """Repairs what there is to repair, and tells."""
        if self.wanted:
            with StagingArea(self.root) as staging:
                self.run(staging)
        return self.summary()

    def run(self, staging: StagingArea) -> None:
        """Repairs encoder, plan, shards and whole-cache files, in this order."""
        self._mend_encoder(staging)
        if self._paths <= {self.manifest.encoder.path}:
            return
        # What was begun of a growth has links to the damaged files.
        drop_growth(self.root)
        plan = self._mend_plan(staging)
        self._damaged = self._witnesses.damaged_shards(plan)
        changed = self._mend_shards(plan, staging) if self._damaged else []
        alone = {PLAN, self.manifest.encoder.path}
        whole = {item.path for item in self.wanted if item.shard is None} - alone
        if self.manifest.is_complete and (whole or not self._identical):
            self._finalise(plan, whole, staging)
        if changed:
            named = "; ".join(changed[:_MAX_NAMED])
            rest = len(changed) - _MAX_NAMED
            raise SourceError(
                f"{len(changed)} source images are not what the cache was made from: {named}"
                + (f" and {rest} more" if rest > 0 else "")
                + f". Their shards were left as they are, {len(self._encoded)} others repaired",
                hint="put these images back as they were, then run the same command",
            )

    def summary(self) -> RepairSummary:
        """Looks once more, quickly, and tells."""
        left = {item.path: item for item in self.found if item.path not in self._repaired}
        if self._repaired:
            left |= {item.path: item for item in verify(self.root, quick=True)}
        remaining = [
            dataclasses.replace(item, problem=f"{item.problem}; {self._reasons[item.path]}")
            if item.path in self._reasons
            else item
            for item in left.values()
        ]
        return RepairSummary(
            path=str(self.root),
            found=tuple(self.found),
            repaired=tuple(sorted(self._repaired)),
            shards=len(self._encoded),
            images=sum(commit.rows for commit in self._encoded),
            identical=self._identical,
            remaining=tuple(remaining),
        )

    def _open_images(self) -> ImageReader:
        if self._images is None:
            self._images = self._opened(open_reader)
        return self._images

    def _opened(self, opener: Callable[[str | Path], _T]) -> _T:
        place = self.manifest.source if self._source is None else self._source
        try:
            return opener(place)
        except SourceError as error:
            raise SourceError(
                f"damaged shards are encoded again from the source, and {error}",
                hint=command(
                    "verify",
                    self.root,
                    "--repair",
                    "--source",
                    "DIR",
                    note="where the images are now",
                ),
            ) from error

    def _mend_encoder(self, staging: StagingArea) -> None:
        record, spec = self.manifest.encoder, self.manifest.fingerprint.encoder
        if record.path not in self._paths:
            return
        restored = restored_encoder(self.manifest, self._weights)
        if restored is None:
            self._reasons[record.path] = (
                f"no weights of digest {spec.weights_sha256[:12]}... ({spec.arch}, quality "
                f"{spec.quality}, {spec.metric}) are at hand: repeat with --weights FILE"
            )
            return
        self._encoder, data = restored
        staging.put(record.path, data)
        self._repaired.add(record.path)

    def _mend_plan(self, staging: StagingArea) -> Plan:
        if self.manifest.plan.path not in self._paths:
            return read_plan(self.root, self.manifest)
        plan = restored_plan(
            self.manifest, self._witnesses.intact_index, partial(self._opened, open_source)
        )
        staging.put(self.manifest.plan.path, plan.to_bytes())
        self._repaired.add(self.manifest.plan.path)
        return plan

    def _mend_shards(self, plan: Plan, staging: StagingArea) -> list[str]:
        """Encodes damaged shards again; returns the names of source images that have changed."""
        saved = self.manifest.encoder.path
        if saved not in self._paths:
            spec = self.manifest.fingerprint.encoder
            self._encoder = load_recorded_encoder(self.root / saved, spec)
        if self._encoder is None:
            for item in self.wanted:
                if item.shard is not None:
                    self._reasons[item.path] = "it cannot be encoded again without the encoder"
            return []
        refuse_other_decoder(self.manifest.fingerprint)
        images = self._open_images()
        shards, changed = [], []
        for split, number in self._damaged:
            shard = self._witnesses.describe(plan, split, number)
            names = changed_sources(images, shard)
            changed += names
            if not names:
                shards.append(shard)
        # Those first whose source is known to be as it was.
        shards.sort(key=lambda shard: not shard.sources)
        replay = Replay(self.root, self.manifest, images, self._encoder, staging, self._observer)
        allowed_bad = self._witnesses.allowed_bad(shards)
        for record, identical in replay.encode(shards, allowed_bad=allowed_bad):
            self._witnesses.commits[record.split, record.shard] = record
            self._encoded.append(record)
            self._identical &= identical
            self._repaired |= {file.path for file in record.files}
            self._repaired.add(commit_path(record.split, record.shard))
        return changed

    def _finalise(self, plan: Plan, whole: set[str], staging: StagingArea) -> None:
        """Writes the whole-cache files anew; needs every commit record and index part."""
        lost = [
            place
            for place in plan.shard_numbers()
            if place not in self._witnesses.commits or self._intact_index_path(place) is None
        ]
        if lost:
            for path in whole:
                self._reasons[path] = "it is written anew once every shard is repaired"
            return
        ordered = [self._witnesses.commits[place] for place in plan.shard_numbers()]
        complete = finalise(self.root, self.manifest, plan, ordered, staging)
        self._identical &= complete == self.manifest
        self._repaired |= whole
        if complete != self.manifest:
            self._repaired |= {MANIFEST, *(file.path for file in complete.files)}

    def _intact_index_path(self, place: tuple[str, int]) -> str | None:
        path = index_path(*place)
        return path if path in self._repaired or path not in self._paths else None
