#!/usr/bin/env bash
# Where zarr 3 is installed, every run of pytest imports zarr, whatever it tests.
#
# Expected: a test that does not name zarr does not import it; zarr's test helpers (zarr.testing) are
# there for those who import them.
# Seen: the wheel registers zarr.testing under the entry point group pytest11. pytest imports every
# such module when it starts, and with it zarr, numpy, numcodecs and asyncio, in each worker of
# pytest-xdist again. `-p no:zarr` leaves it out.
#
# zarr 3.4.2 and 3.1.5, pytest 9.2.0, Python 3.12, Linux; 2026-11-29. Output seen:
#   zarr 3.1.5: zarr imported: True; with -p no:zarr: False
#   zarr 3.4.2: zarr imported: True; with -p no:zarr: False
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3.12}
cat > "$folder/test_nothing.py" <<'TEST'
import sys


def test_nothing():
    print("zarr imported:", "zarr" in sys.modules)
TEST
for version in 3.1.5 3.4.2; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "zarr==$version" pytest==9.2.0
    imported() {
        "$folder/$version/bin/python" -m pytest -q -s -p no:cacheprovider "$@" "$folder/test_nothing.py" |
            grep -oE 'zarr imported: (True|False)'
    }
    plain=$(imported)
    without=$(imported -p no:zarr)
    echo "zarr $version: $plain; with -p no:zarr: ${without#zarr imported: }"
    [ "$plain" = "zarr imported: True" ] && [ "$without" = "zarr imported: False" ]
done
