#!/usr/bin/env bash
# The same table, written with the same options, is other bytes with pyarrow 21 and 22.
#
# Expected: the file depends on the table and the options; of the version only the text `created_by`
# in the footer, which names it, differs. So a digest that leaves that text out would do.
# Seen: from 22 to 26 that holds. 21 writes other data pages and another footer, 8 bytes less here.
# No argument of write_table sets `created_by`, so digests of whole files differ with every version.
#
# pyarrow 21.0.0, 22.0.0 and 26.0.1, Python 3.12, Linux; 2026-11-30. Output seen:
#   pyarrow 21.0.0: 1265 bytes, pages f2bb799d990e, without the version 2172a3766887
#   pyarrow 22.0.0: 1273 bytes, pages a0c407836c70, without the version e8bbdd35c540
#   pyarrow 26.0.1: 1273 bytes, pages a0c407836c70, without the version e8bbdd35c540
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3.12}
cat > "$folder/write.py" <<'WRITE'
import hashlib
import io

import pyarrow as pa
import pyarrow.parquet as pq

keys = [f"class/{number}.jpg" for number in range(100)]
sink = io.BytesIO()
table = pa.table({"row": pa.array(range(100), pa.int64()), "key": keys})
pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
data = sink.getvalue()
footer = int.from_bytes(data[-8:-4], "little")
pages = hashlib.sha256(data[: -8 - footer]).hexdigest()[:12]
rest = hashlib.sha256(data.replace(pa.__version__.encode(), b"")).hexdigest()[:12]
print(f"pyarrow {pa.__version__}: {len(data)} bytes, pages {pages}, without the version {rest}")
WRITE
for version in 21.0.0 22.0.0 26.0.1; do
    "$python" -m venv "$folder/$version"
    "$folder/$version/bin/pip" install --quiet "pyarrow==$version"
    "$folder/$version/bin/python" "$folder/write.py"
done | tee "$folder/seen"
cat > "$folder/known" <<'KNOWN'
pyarrow 21.0.0: 1265 bytes, pages f2bb799d990e, without the version 2172a3766887
pyarrow 22.0.0: 1273 bytes, pages a0c407836c70, without the version e8bbdd35c540
pyarrow 26.0.1: 1273 bytes, pages a0c407836c70, without the version e8bbdd35c540
KNOWN
diff "$folder/known" "$folder/seen"
