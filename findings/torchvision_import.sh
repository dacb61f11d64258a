#!/usr/bin/env bash
# `import torchvision` imports torch's compiler, sympy and triton, which `import torch` leaves out.
#
# Expected: datasets, transforms and decoders of images need torch; what torch itself imports only
# when something is compiled stays out.
# Seen: torch.library, which torchvision registers its operators with, brings torch._dynamo, and that
# brings torch._inductor, sympy and triton: a thousand modules more. The import took as long again as
# that of torch, in every process that decodes images.
#
# torch 2.15.0, torchvision 0.29.2, Python 3.12, Linux; 2026-11-30. Output seen:
#   import torch
#   import torchvision: torch._dynamo torch._inductor sympy triton
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3.12}
cat > "$folder/look.py" <<'LOOK'
import sys
import time

heavy = ("torch._dynamo", "torch._inductor", "sympy", "triton")
for name in ("torch", "torchvision"):
    started, before = time.perf_counter(), set(sys.modules)
    __import__(name)
    new = set(sys.modules) - before
    print(f"import {name}: {' '.join(each for each in heavy if each in new)}".rstrip(": "))
    print(f"{len(new)} modules, {time.perf_counter() - started:.1f} s", file=sys.stderr)
LOOK
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy torch==2.15.0 torchvision==0.29.2
"$folder/venv/bin/python" "$folder/look.py" | tee "$folder/seen"
cat > "$folder/known" <<'KNOWN'
import torch
import torchvision: torch._dynamo torch._inductor sympy triton
KNOWN
diff "$folder/known" "$folder/seen"
