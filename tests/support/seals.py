"""Makes a tampered cache vouch for itself again, as one who wants to deceive would."""

from __future__ import annotations

import hashlib
import json
import struct
from pathlib import Path
from typing import Any

from ci2p_cache.record import sealed_bytes


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Writes a record with its own digest made to fit, where it has one."""
    path.write_bytes(sealed_bytes(data) if "sha256" in data else json.dumps(data).encode())


def reseal(root: Path) -> bool:
    """Makes every size, digest and fingerprint that is recorded fit what is there."""

    def fit(entry: dict[str, Any]) -> None:
        path = root / entry["path"]
        if path.is_file():
            data = path.read_bytes()
            entry["bytes"], entry["sha256"] = len(data), digest(data)

    manifest = json.loads((root / "cache.json").read_text())
    for entry in [manifest["plan"], manifest["encoder"], *manifest["files"]]:
        fit(entry)
    write_json(root / "cache.json", manifest)
    text = json.dumps(manifest["fingerprint"], sort_keys=True, separators=(",", ":"))
    for path in (root / "commits").iterdir():
        commit = json.loads(path.read_text())
        for entry in commit["files"]:
            fit(entry)
        commit["fingerprint"] = digest(text.encode())
        shard = root / commit["files"][0]["path"]
        if shard.is_file() and shard.suffix != ".tar":
            commit["index_crc32c"] = struct.unpack("<I", shard.read_bytes()[-4:])[0]
        write_json(path, commit)
    return True
