"""`repair`: puts back what `verify` finds damaged, to the same bytes, and leaves all else alone.

::

    plan, source held to the index's digests --> ShardEncoder --> scratch folder
        --> same bytes as its commit record or checksums.sha256 say? --> renamed into the cache

Intact commit records, intact index parts and `checksums.sha256` are the witnesses: they say what
the damaged files held.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import pyarrow as pa
import torch

from ci2p_cache.cache.commit import CommitRecord, read_commit, sha256_file
from ci2p_cache.cache.folder import listed_digests
from ci2p_cache.cache.growth import drop_growth
from ci2p_cache.cache.index import read_index
from ci2p_cache.cache.manifest import read_manifest
from ci2p_cache.cache.paths import (
    MANIFEST,
    PLAN,
    array_path,
    commit_path,
    data_paths,
    index_path,
    shard_files,
)
from ci2p_cache.cache.staging import StagingArea, disk_errors, remove_path
from ci2p_cache.cache.store import open_cache
from ci2p_cache.cache.verify import Finding, verify
from ci2p_cache.encoder.frozen import FrozenEncoder
from ci2p_cache.encoder.load import load_encoder, load_recorded_encoder
from ci2p_cache.encoder.weights import BUNDLED, official_url, weights_folder
from ci2p_cache.encoding.finalise import finalise
from ci2p_cache.encoding.locks import held, interruptible
from ci2p_cache.encoding.options import EncodeOptions
from ci2p_cache.encoding.plan import Plan, Sample, ShardPlan, build_plan, plan_of_rows, read_plan
from ci2p_cache.encoding.progress import EncodeObserver, ProgressMeter
from ci2p_cache.encoding.shard import (
    EncodeSettings,
    ErrorBudget,
    ShardEncoder,
    changed_numerics,
    make_replicas,
    refuse_other_decoder,
    replica_numerics,
)
from ci2p_cache.errors import (
    CacheError,
    ImageDecodeError,
    IntegrityError,
    ManifestError,
    RefusedError,
    SourceError,
    TooManyBadImagesError,
    WeightsError,
    command,
)
from ci2p_cache.images.locate import open_reader, open_source
from ci2p_cache.images.source import ImageReader, ImageSource
from ci2p_cache.record import Record
from ci2p_cache.specs import EncoderSpec

__all__ = ["RepairSummary", "repair", "restore"]

_T = TypeVar("_T")

_MAX_NAMED = 10
"""Changed source images that an error names; it counts the rest."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairSummary(Record):
    """What a repair found, did and left."""

    path: str
    """The cache folder."""
    found: tuple[Finding, ...]
    """What was wrong."""
    repaired: tuple[str, ...]
    """Files written again, relative to the cache folder, sorted."""
    shards: int
    """Shards encoded again."""
    images: int
    """Images encoded again, bad ones included."""
    identical: bool
    """Whether every repaired byte is known to be as first committed."""
    remaining: tuple[Finding, ...]
    """What is still wrong: foreign files, and what cannot be restored, with the reason."""


def repair(
    path: str | Path,
    *,
    source: str | Path | ImageSource | None = None,
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
        source: Where the images are now, or an object that reads them, as `encode` takes it; None:
            where they were when the cache was made.
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
        held(root, what="repair"),
    ):
        found = verify(root, on_shard=on_shard)
        return restore(root, found, source, weights, observer or EncodeObserver())


def restore(
    root: Path,
    found: list[Finding],
    source: str | Path | ImageSource | None,
    weights: Path | None,
    observer: EncodeObserver,
) -> RepairSummary:
    """Puts back what was found damaged in a cache whose lock the caller holds; as `repair`."""
    job = _Repair(root, found, source, weights, observer, StagingArea(root))
    if job.wanted:
        with job.staging:
            job.run()
    return job.summary()


@dataclass(frozen=True, kw_only=True, slots=True)
class _DamagedShard:
    """A shard to be encoded again, with what is still known of it."""

    plan: ShardPlan
    """Its samples."""
    numerics: Mapping[str, str | int]
    """How it was encoded, from its own commit record or a neighbour's; empty: not known."""
    digests: Mapping[str, str]
    """Path -> sha256 of its files as committed, as far as a witness is left."""
    sources: Mapping[bytes, str | None]
    """Path -> sha256 of the source files, None for one that could not be read; empty where its
    index part is damaged."""

    @property
    def shard_id(self) -> tuple[str, int]:
        return self.plan.split, self.plan.shard

    @property
    def setting(self) -> tuple[str, int]:
        """(device type, batch size) to encode it with; 0: the usual one."""
        device = str(self.numerics.get("device_type", "cpu"))
        return device, int(self.numerics.get("batch_size", 0))

    def __str__(self) -> str:
        return f"{self.plan.split} shard {self.plan.shard}"


@dataclass
class _Repair:
    """One repair while it runs; the arguments are those of `restore`."""

    root: Path
    found: list[Finding]
    source: str | Path | ImageSource | None
    weights: Path | None
    observer: EncodeObserver
    staging: StagingArea
    encoder: FrozenEncoder | None = None
    encoded: list[CommitRecord] = field(default_factory=list)
    """The new records of shards that were encoded again."""
    repaired: set[str] = field(default_factory=set)
    """Files written again."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Path -> why it cannot be restored."""
    identical: bool = True

    def __post_init__(self) -> None:
        self.wanted = [item for item in self.found if item.kind not in ("foreign", "unfinished")]
        self.paths = {item.path for item in self.wanted}
        self.cache = open_cache(self.root, partial=True)
        self.manifest = self.cache.manifest
        self.digests = listed_digests(self.cache)

    def run(self) -> None:
        """Repairs encoder, plan, shards and whole-cache files, in this order."""
        saved = self.manifest.encoder.path
        if saved in self.paths:
            self._mend_encoder()
        if self.paths <= {saved}:
            return
        # What was begun of a growth has links to the damaged files.
        drop_growth(self.root)
        plan = self._mended_plan()
        damaged = self._damaged_shards(plan)
        changed = self._mend_shards(damaged) if damaged else []
        whole = {item.path for item in self.wanted if item.shard is None} - {PLAN, saved}
        if self.manifest.is_complete and (whole or not self.identical):
            self._finalise(plan, whole)
        if changed:
            named = "; ".join(changed[:_MAX_NAMED])
            rest = len(changed) - _MAX_NAMED
            raise SourceError(
                f"{len(changed)} source images are not what the cache was made from: {named}"
                + (f" and {rest} more" if rest > 0 else "")
                + f". Their shards were left as they are, {len(self.encoded)} others repaired",
                hint="put these images back as they were, then run the same command",
            )

    def summary(self) -> RepairSummary:
        """Looks once more, quickly, and sums up."""
        left = {item.path: item for item in self.found if item.path not in self.repaired}
        if self.repaired:
            left |= {item.path: item for item in verify(self.root, quick=True)}
        for path in self.reasons.keys() & left.keys():
            problem = f"{left[path].problem}; {self.reasons[path]}"
            left[path] = dataclasses.replace(left[path], problem=problem)
        return RepairSummary(
            path=str(self.root),
            found=tuple(self.found),
            repaired=tuple(sorted(self.repaired)),
            shards=len(self.encoded),
            images=sum(commit.rows for commit in self.encoded),
            identical=self.identical,
            remaining=tuple(left.values()),
        )

    def _opened(self, opener: Callable[[str | Path | ImageSource], _T]) -> _T:
        try:
            return opener(self.manifest.source if self.source is None else self.source)
        except SourceError as error:
            words = ("verify", self.root, "--repair", "--source", "DIR")
            raise SourceError(
                f"damaged shards are encoded again from the source, and {error}",
                hint=command(*words, note="where the images are now"),
            ) from error

    def _mend_encoder(self) -> None:
        record, spec = self.manifest.encoder, self.manifest.fingerprint.encoder
        for encoder in _encoders_at_hand(spec, self.weights):
            data = encoder.to_bytes()
            if hashlib.sha256(data).hexdigest() == record.sha256:
                self.encoder = encoder
                self.staging.put(record.path, data)
                self.repaired.add(record.path)
                return
            if self.weights is not None:
                raise WeightsError(
                    f"weights file {self.weights} holds an encoder of digest "
                    f"{encoder.spec.weights_sha256}; the cache was made with {spec.weights_sha256}"
                )
        self.reasons[record.path] = (
            f"no weights of digest {spec.weights_sha256[:12]}... ({spec.arch}, quality "
            f"{spec.quality}, {spec.metric}) are at hand: repeat with --weights FILE"
        )

    def _mended_plan(self) -> Plan:
        """Puts a lost plan together from the index parts, or by listing the source once more."""
        manifest, splits = self.manifest, self.manifest.splits
        if manifest.plan.path not in self.paths:
            return read_plan(self.root, manifest)
        rows: dict[str, list[Sample]] = {name: [] for name in splits}
        lost: list[str] = []
        for name, shard in Plan({}, splits).shard_numbers():
            table = self._intact_index(name, shard)
            if table is None:
                lost.append(f"{name} shard {shard}")
            else:
                rows[name] += _samples_of(table)
        reason = "the index parts together give another plan"
        if lost:
            reason = f"the index of {lost[0]} and {len(lost) - 1} others is damaged too"
        elif self._put_plan(plan := plan_of_rows(rows, splits)):
            return plan
        try:
            source, made = self._opened(open_source), manifest.fingerprint
            plan = build_plan(source, manifest.layout, made.views, made.latent)
            if self._put_plan(plan):
                # With the shapes as recorded: the form of the index parts is one of the cache.
                return Plan(plan.tables, dict(splits))
            reason += ", and the source now lists other images"
        except SourceError as error:
            reason += f", and the source cannot be listed: {error}"
        raise ManifestError(
            f"{PLAN} is damaged and cannot be put together again: {reason}; no shard was changed",
            hint="encode into a new folder; what is intact in this one can still be read",
        )

    def _put_plan(self, plan: Plan) -> bool:
        """Writes a plan if it is the one that was lost, by its digest in the manifest."""
        data = plan.to_bytes()
        if hashlib.sha256(data).hexdigest() != self.manifest.plan.sha256:
            return False
        self.repaired.add(self.staging.put(self.manifest.plan.path, data).path)
        return True

    @cached_property
    def _commits(self) -> dict[tuple[str, int], CommitRecord]:
        """The intact commit records by (split, shard), and those of repaired shards."""
        found = {}
        for name, split in self.cache.items():
            for shard in split.committed():
                with suppress(ManifestError):
                    commit = read_commit(self.root, name, shard)
                    if commit is not None and commit_path(name, shard) not in self.paths:
                        found[name, shard] = commit
        return found

    def _intact_index(self, split: str, shard: int) -> pa.Table | None:
        """Reads an index part if a witness vouches for its bytes."""
        path = index_path(split, shard)
        commit = self._commits.get((split, shard))
        listed = {file.path: file.sha256 for file in commit.files} if commit else self.digests
        if path in self.paths or path not in listed:
            return None
        with suppress(OSError, IntegrityError):
            if sha256_file(self.root / path) == listed[path]:
                return read_index(self.root, split, shard)
        return None

    def _damaged_shards(self, plan: Plan) -> list[_DamagedShard]:
        """Returns the shards to encode again, in the plan's order, with what is known of them."""
        damaged = {
            (item.split, shard)
            for item in self.wanted
            if item.shard is not None
            for shard in range(item.shard, (item.last_shard or item.shard) + 1)
        }
        for name, shard in self._commits:
            if f"{array_path(name, 'labels')}/c.0" in self.paths:
                # Either of them may be wrong; the plan shows if it is the index.
                table = self._intact_index(name, shard)
                planned = list(plan.shard(name, shard).samples)
                if table is not None and _samples_of(table) != planned:
                    damaged.add((name, shard))
        # A neighbour was most likely encoded in the same way; the digests show if it was not.
        neighbour = next(iter(self._commits.values()), None)
        found = []
        for split, shard in plan.shard_numbers():
            if (split, shard) not in damaged:
                continue
            commit = self._commits.get((split, shard))
            paths = shard_files(self.manifest.layout, split, shard)
            digests = {path: self.digests[path] for path in paths if path in self.digests}
            digests |= {file.path: file.sha256 for file in commit.files} if commit else {}
            known, index = commit or neighbour, self._intact_index(split, shard)
            columns = [] if index is None else [index["path_bytes"], index["source_sha256"]]
            found.append(
                _DamagedShard(
                    plan=plan.shard(split, shard),
                    numerics={} if known is None else known.numerics,
                    digests=digests,
                    sources=dict(zip(*(column.to_pylist() for column in columns), strict=True)),
                )
            )
        return found

    def _mend_shards(self, damaged: list[_DamagedShard]) -> list[str]:
        """Encodes damaged shards again; returns the names of source images that have changed."""
        saved = self.manifest.encoder.path
        if saved not in self.paths:
            spec = self.manifest.fingerprint.encoder
            self.encoder = load_recorded_encoder(self.root / saved, spec)
        if self.encoder is None:
            lost = [item.path for item in self.wanted if item.shard is not None]
            self.reasons |= dict.fromkeys(lost, "it cannot be encoded again without the encoder")
            return []
        refuse_other_decoder(self.manifest.fingerprint)
        images = self._opened(open_reader)
        changes = {shard.shard_id: _changed_sources(images, shard) for shard in damaged}
        # Those first whose source is known to be as it was.
        shards = sorted(
            (shard for shard in damaged if not changes[shard.shard_id]),
            key=lambda shard: not shard.sources,
        )
        self._encode(shards, images, self.encoder)
        return [name for names in changes.values() for name in names]

    def _encode(
        self, shards: Sequence[_DamagedShard], images: ImageReader, encoder: FrozenEncoder
    ) -> None:
        """Puts shards back one by one, encoded with the numerics that their records hold."""
        groups: dict[tuple[str, int], list[_DamagedShard]] = {}
        for shard in sorted(shards, key=lambda shard: shard.setting):
            groups.setdefault(shard.setting, []).append(shard)
        for (device, _), group in groups.items():
            if device == "cuda" and not torch.cuda.is_available():
                raise RefusedError(
                    f"{group[0]} was encoded on cuda; this machine has none, and a CPU gives "
                    "slightly other values. No shard was changed",
                    hint="run the same command on a machine with a CUDA device",
                )
        total = sum(len(shard.plan.samples) for shard in shards)
        meter = ProgressMeter(self.observer, total=total, done=0, bad=0)
        budget = ErrorBudget(self._allowed_bad(shards))
        try:
            for (device, batch_size), group in groups.items():
                replicas = make_replicas(encoder, device)
                options = EncodeOptions(batch_size=batch_size or None)
                settings = EncodeSettings.of(self.manifest, replicas, options)
                self._notice_other_numerics(
                    group, replica_numerics(replicas[0], settings.batch_size)
                )
                scratch = self.staging.scratch("replay")
                with (
                    StagingArea(scratch) as beside,
                    ShardEncoder(
                        images,
                        settings,
                        replicas,
                        beside,
                        budget=budget,
                        on_image=lambda good: meter.count(good, pipeline.busy_seconds),
                    ) as pipeline,
                ):
                    made = pipeline.encode(shard.plan for shard in group)
                    for shard, record in zip(group, made, strict=True):
                        self._put_in_place(shard, record, beside)
                remove_path(scratch)
        except TooManyBadImagesError as error:
            raise SourceError(
                f"the source no longer gives what the cache was made from: {error}",
                hint="put the images back as they were, then run the same command",
            ) from error
        meter.report()

    def _allowed_bad(self, shards: Sequence[_DamagedShard]) -> int:
        """Counts the bad images that the shards held when they were first committed, at most."""
        bad = {shard_id: each.rows - each.valid_rows for shard_id, each in self._commits.items()}
        if not self.manifest.is_complete:
            return sum(bad.get(shard.shard_id, len(shard.plan.samples)) for shard in shards)
        splits = self.manifest.splits.values()
        total = sum(record.rows - (record.valid_rows or 0) for record in splits)
        return total - sum(bad[each] for each in set(bad) - {shard.shard_id for shard in shards})

    def _notice_other_numerics(
        self, group: Sequence[_DamagedShard], here: Mapping[str, str | int]
    ) -> None:
        then = next((shard.numerics for shard in group if shard.numerics), here)
        changes = [
            f"{name} {before} then, {value} now"
            for name, (before, value) in changed_numerics(then, here).items()
        ]
        if changes:
            self.observer.notice(
                "repaired shards may differ slightly from those first committed: "
                + "; ".join(changes)
            )

    def _put_in_place(
        self, shard: _DamagedShard, record: CommitRecord, beside: StagingArea
    ) -> None:
        """Moves an encoded shard into the cache if it is the one that was committed."""
        if not changed_numerics(shard.numerics, record.numerics):
            # Whoever computed the same bits first stays named: the record is as it was.
            record = dataclasses.replace(record, numerics=dict(shard.numerics))
            beside.commit(record)
        commit = commit_path(*shard.shard_id)
        digests = {file.path: file.sha256 for file in record.files}
        digests[commit] = sha256_file(beside.root / commit)
        differing = [path for path, made in shard.digests.items() if digests[path] != made]
        latents = data_paths(self.manifest.layout, *shard.shard_id)
        if set(latents) & set(differing) and shard.numerics == record.numerics:
            raise SourceError(
                f"{shard} encoded again gives other latents than those committed, on the "
                "same software and kind of device: its source images have changed. The shard was "
                "left as it is",
                hint="put the images back as they were, then run the same command",
            )
        for path in digests:
            self.staging.put(path, (beside.root / path).read_bytes())
            remove_path(beside.root / path)
        if differing:
            self.observer.notice(
                f"{shard} is whole again, but other software wrote it: {len(differing)} of "
                "its files differ in bytes from those first committed"
            )
        # What no witness knows may be other bytes.
        self.identical &= not differing and digests.keys() - {commit} <= shard.digests.keys()
        self._commits[shard.shard_id] = record
        self.encoded.append(record)
        self.repaired |= digests.keys()

    def _finalise(self, plan: Plan, whole: set[str]) -> None:
        """Writes the whole-cache files again; needs every commit record and index part."""
        shard_ids, lost = list(plan.shard_numbers()), self.paths - self.repaired
        if not all(each in self._commits and index_path(*each) not in lost for each in shard_ids):
            self.reasons |= dict.fromkeys(whole, "it is written anew once every shard is repaired")
            return
        ordered = [self._commits[each] for each in shard_ids]
        complete = finalise(self.root, self.manifest, plan, ordered, self.staging)
        self.repaired |= whole
        if complete != self.manifest:
            self.identical = False
            self.repaired |= {MANIFEST, *(file.path for file in complete.files)}


def _changed_sources(images: ImageReader, shard: _DamagedShard) -> list[str]:
    """Names the source images of a shard that are not what was encoded, as `path (reason)`."""
    found: list[str] = []
    for path, wanted in shard.sources.items():
        try:
            digest = hashlib.sha256(images.read(path)).hexdigest()
        except ImageDecodeError as error:
            reason = None if wanted is None else str(error)
        else:
            reason = None if digest == wanted else f"its sha256 is {digest[:12]}..."
            if wanted is None:
                reason = "it could not be read then, and can be now"
        if reason is not None:
            found.append(f"{path.decode('utf-8', 'backslashreplace')} ({reason})")
    return found


def _samples_of(index: pa.Table) -> list[Sample]:
    """Returns the planned samples that an index part speaks of, in row order."""
    columns = (index[name].to_pylist() for name in ("row", "key", "label", "path_bytes"))
    return [Sample(*values) for values in zip(*columns, strict=True)]


def _encoders_at_hand(spec: EncoderSpec, weights: Path | None) -> Iterator[FrozenEncoder]:
    """Yields the one in a weights file, or else the bundled and the downloaded official one.

    Nothing is downloaded.
    """
    load = partial(
        load_encoder,
        weights=weights,
        arch=spec.arch,
        quality=spec.quality,
        metric=spec.metric,
        precision=spec.precision,
    )
    if weights is not None:
        yield load("official")
        return
    if (spec.arch, spec.quality, spec.metric) == BUNDLED:
        yield load("bundled")
    try:
        name = official_url(spec.arch, spec.quality, spec.metric).rpartition("/")[2]
        if (weights_folder() / name).is_file():
            yield load("official")
    except CacheError:
        # No such weights are published, or those in the user's folder are damaged themselves.
        return
