#!/usr/bin/env bash
# Up to torch 2.14, its counter of FLOPs counts no attention on the CPU.
#
# Expected: FlopCounterMode gives the same number for a call on any device: 4 * heads * tokens^2 *
# width of a head for scaled_dot_product_attention, here 12,582,912.
# Seen: with 2.14.1 the fused kernel of the CPU has no formula, and counts as 0 without a word. On the
# meta device, and on the CPU with the plain kernel asked for, the number is right. So a ViT measured on
# a CPU looks cheaper than it is. 2.15.0 counts it. Reported as pytorch/pytorch 195460.
#
# torch 2.14.1 and 2.15.0, Python 3.12, Linux; 2026-11-30. Output seen:
#   torch 2.14.1: cpu 0, plain kernel 12582912, meta 12582912
#   torch 2.15.0: cpu 12582912, plain kernel 12582912, meta 12582912
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3.12}
cat > "$folder/count.py" <<'COUNT'
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

counts = []
for name, device, kernel in (
    ("cpu", "cpu", nullcontext()),
    ("plain kernel", "cpu", sdpa_kernel(SDPBackend.MATH)),
    ("meta", "meta", nullcontext()),
):
    tokens = torch.zeros(1, 12, 64, 64, device=device)
    with kernel, FlopCounterMode(display=False) as counter:
        torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
    counts.append(f"{name} {counter.get_total_flops()}")
print(f"torch {torch.__version__.partition('+')[0]}: {', '.join(counts)}")
COUNT
for version in 2.14.1 2.15.0; do
    "$python" -m venv "$folder/venv"
    "$folder/venv/bin/pip" install --quiet numpy "torch==$version"
    "$folder/venv/bin/python" "$folder/count.py"
    # 5 GB each.
    rm -r "$folder/venv"
done | tee "$folder/seen"
cat > "$folder/known" <<'KNOWN'
torch 2.14.1: cpu 0, plain kernel 12582912, meta 12582912
torch 2.15.0: cpu 12582912, plain kernel 12582912, meta 12582912
KNOWN
diff "$folder/known" "$folder/seen"
