"""One shard held against its commit record, and against other witnesses where that is lost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from ci2p_cache.cache.commit import CommitRecord, FileRecord, sha256_file
from ci2p_cache.cache.finding import Finding, FindingKind, file_problem
from ci2p_cache.cache.paths import CHECKSUMS, MANIFEST, commit_path, shard_files
from ci2p_cache.cache.shard_content import shard_problems
from ci2p_cache.cache.split import Split
from ci2p_cache.errors import IntegrityError

__all__ = ["check_shard"]


def check_shard(
    split: Split, shard: int, digests: Mapping[str, str], *, quick: bool
) -> list[Finding]:
    """Returns what is wrong with a shard; nothing for one that a begun cache has not reached.

    Args:
        split: Its split.
        shard: Its number.
        digests: What `listed_digests` gives: path -> sha256.
        quick: Leave large files and the latents unread.
    """
    rows = split.record.rows_of(shard)
    record_path = commit_path(split.name, shard)

    def finding(path: str, kind: FindingKind, problem: str) -> Finding:
        return Finding(
            path=path,
            kind=kind,
            problem=problem,
            split=split.name,
            shard=shard,
            first_row=rows.start,
            last_row=rows.stop - 1,
        )

    try:
        commit = split.read_commit(shard)
    except IntegrityError as error:
        others = _unvouched(split, shard, digests, quick=quick)
        return [finding(record_path, "damaged", str(error)), *(finding(*each) for each in others)]
    if commit is None:
        if not split.cache.is_complete:
            return []
        others = _unvouched(split, shard, digests, quick=quick)
        lost = finding(record_path, "missing", "the shard has no commit record")
        return [lost, *(finding(*each) for each in others)]
    problem = _record_problem(split, commit, digests)
    if problem is not None:
        return [finding(record_path, "damaged", problem)]
    problems = [
        finding(file.path, *found)
        for file in commit.files
        if (found := file_problem(split.cache.path, file, quick=quick)) is not None
    ]
    if problems:
        return problems
    inside = shard_problems(split, commit, quick=quick)
    return [finding(path, "damaged", text) for path, text in inside]


def _record_problem(split: Split, commit: CommitRecord, digests: Mapping[str, str]) -> str | None:
    """Says why an intact commit record does not belong here, None where it does."""
    rows = split.record.rows_of(commit.shard)
    path = commit_path(split.name, commit.shard)
    if (commit.first_row, commit.rows) != (rows.start, len(rows)):
        return f"it speaks of {commit.rows} rows from {commit.first_row}"
    if commit.fingerprint != split.cache.fingerprint.digest:
        return f"it has another fingerprint than {MANIFEST}"
    wanted = set(shard_files(split.layout, split.name, commit.shard)) - {path}
    if {file.path for file in commit.files} != wanted:
        return f"it lists other files than {sorted(wanted)}"
    if path in digests and sha256_file(split.cache.path / path) != digests[path]:
        return f"it is intact, but not the one that {CHECKSUMS} lists"
    return None


def _unvouched(
    split: Split, shard: int, digests: Mapping[str, str], *, quick: bool
) -> Iterator[tuple[str, FindingKind, str]]:
    """Checks the files of a shard whose commit record is lost, as far as another witness goes."""
    for path in shard_files(split.layout, split.name, shard)[:-1]:
        file = split.cache.path / path
        size = file.stat().st_size if file.is_file() else 0
        record = FileRecord(path=path, bytes=size, sha256=digests.get(path, ""))
        found = file_problem(split.cache.path, record, quick=quick)
        if found is not None and (found[0] == "missing" or path in digests):
            yield path, *found
