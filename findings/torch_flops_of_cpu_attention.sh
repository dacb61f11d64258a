#!/usr/bin/env bash
# torch's counter of FLOPs counts no attention on the CPU.
#
# Expected: FlopCounterMode gives the same number for a call on any device: 4 * heads * tokens^2 *
# width of a head for scaled_dot_product_attention, here 12,582,912.
# Seen: on the CPU the fused kernel has no formula, and counts as 0 without a word. On the meta device,
# and on the CPU with the plain kernel asked for, the number is right. So a ViT measured on a CPU looks
# cheaper than it is. Reported as pytorch/pytorch 195460.
#
# torch 2.15.0, Python 3.12, Linux; 2026-11-30. Output seen:
#   cpu 0
#   cpu, plain kernel 12582912
#   meta 12582912
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3.12}
cat > "$folder/count.py" <<'COUNT'
from contextlib import nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

plain = sdpa_kernel(SDPBackend.MATH)
for name, device, kernel in (
    ("cpu", "cpu", nullcontext()),
    ("cpu, plain kernel", "cpu", plain),
    ("meta", "meta", nullcontext()),
):
    tokens = torch.zeros(1, 12, 64, 64, device=device)
    with kernel, FlopCounterMode(display=False) as counter:
        torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
    print(name, counter.get_total_flops())
COUNT
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet numpy torch==2.15.0
"$folder/venv/bin/python" "$folder/count.py" | tee "$folder/seen"
cat > "$folder/known" <<'KNOWN'
cpu 0
cpu, plain kernel 12582912
meta 12582912
KNOWN
diff "$folder/known" "$folder/seen"
