"""JSON files that vouch for themselves; what their fields mean is their owners' business.

The last field is the sha256 of the file with that field's digits as zeros.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ci2p_cache.record import MAX_JSON_BYTES, json_object, read_regular

__all__ = ["json_bytes", "read_sealed", "sealed_bytes"]

_SEAL = "sha256"
_BLANK = "0" * 64


def json_bytes(data: Mapping[str, Any]) -> bytes:
    """Serialises to UTF-8 JSON, the same bytes for the same data."""
    return (json.dumps(data, indent=1, ensure_ascii=False) + "\n").encode()


def sealed_bytes(data: Mapping[str, Any]) -> bytes:
    """Serialises to JSON that vouches for itself: its last field is the sha256 of the whole file.

    The digest is taken with the field's own 64 digits as zeros, so that a reader in any language
    can hold the file's bytes against it, and every flipped bit is noticed.
    """
    fields = {name: value for name, value in data.items() if name != _SEAL}
    head, blank, tail = json_bytes(fields | {_SEAL: _BLANK}).rpartition(_BLANK.encode())
    return head + hashlib.sha256(head + blank + tail).hexdigest().encode() + tail


def read_sealed(path: Path) -> tuple[dict[str, Any], bool]:
    """Reads what `sealed_bytes` made.

    Returns:
        Its fields without the digest, and whether the digest fits. The caller looks at the format
        version first: another version may be sealed in another way.

    Raises:
        OSError: it cannot be read; FileNotFoundError where there is none.
        ManifestError: it is a link, too large, no JSON, nested too deeply, or no object.
    """
    raw = read_regular(path, max_bytes=MAX_JSON_BYTES)
    data = json_object(raw, path)
    seal = data.pop(_SEAL, None)
    if not isinstance(seal, str) or not seal.isascii() or len(seal) != len(_BLANK):
        return data, False
    blank = _BLANK.encode().join(raw.rsplit(seal.encode(), 1))
    return data, hashlib.sha256(blank).hexdigest() == seal
