"""`checksums.sha256`: every file of a finished cache but the manifest, for `sha256sum -c`.

It is the second witness: it knows a shard's files where the commit record is lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ci2p_cache.cache.commit import CommitRecord, FileRecord, sha256_file
from ci2p_cache.cache.finding import file_problem
from ci2p_cache.cache.folder import CacheFolder
from ci2p_cache.cache.manifest import Manifest
from ci2p_cache.cache.paths import CHECKSUMS, commit_path

__all__ = ["checksums_bytes", "listed_digests"]


def listed_digests(cache: CacheFolder) -> dict[str, str]:
    """Returns path -> sha256 of what is listed; empty where it is damaged or not there yet."""
    record = next((file for file in cache.manifest.files if file.path == CHECKSUMS), None)
    if record is None or file_problem(cache.path, record, quick=False) is not None:
        return {}
    lines = (cache.path / CHECKSUMS).read_text("utf-8").splitlines()
    return {path: digest for digest, _, path in (line.partition("  ") for line in lines)}


def checksums_bytes(
    root: Path,
    manifest: Manifest,
    commits: Sequence[CommitRecord],
    written: Sequence[FileRecord],
) -> bytes:
    """Lists every file but `cache.json` and itself in the form that `sha256sum -c` reads."""
    lines = {
        file.path: file.sha256
        for file in (
            manifest.plan,
            manifest.encoder,
            *(file for commit in commits for file in commit.files),
            *written,
        )
    }
    for commit in commits:
        path = commit_path(commit.split, commit.shard)
        lines[path] = sha256_file(root / path)
    return "".join(f"{digest}  {path}\n" for path, digest in sorted(lines.items())).encode()
