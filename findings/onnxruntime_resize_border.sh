#!/usr/bin/env bash
# The border of an antialiased Resize in onnxruntime is not Pillow's, unless one asks for it.
#
# Expected: Resize with antialias=1 shrinks a picture as Pillow and torch do, to a level of 255 or so.
# Seen: inside it does. At the border the default, exclude_outside=0, gives pixels beyond the edge a
# share, Pillow and torch leave them out: up to 13 levels on noise shrunk to a third.
# exclude_outside=1 agrees everywhere. torch's exporter sets it since microsoft/onnxscript 2916.
#
# onnxruntime 1.32.0, onnx 1.23.2, Pillow 13.0.0, numpy 2.5.5, Python 3.12, Linux; 2026-11-30.
# Output seen, the largest difference in levels:
#   linear, exclude_outside=0: inside 1, border 13
#   linear, exclude_outside=1: inside 1, border 1
#   cubic, exclude_outside=0: inside 1, border 9
#   cubic, exclude_outside=1: inside 1, border 1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=${PYTHON:-python3.12}
cat > "$folder/resize.py" <<'RESIZE'
import numpy as np
import onnxruntime
from onnx import TensorProto, helper
from PIL import Image

noise = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
planes = noise.transpose(2, 0, 1)[None].astype(np.float32)
for mode, filter_, a in (
    ("linear", Image.Resampling.BILINEAR, -0.75),
    ("cubic", Image.Resampling.BICUBIC, -0.5),
):
    pillow = np.asarray(Image.fromarray(noise).resize((40, 30), filter_)).astype(float)
    for outside in (0, 1):
        node = helper.make_node(
            "Resize", ["x", "", "", "sizes"], ["y"], mode=mode, antialias=1, cubic_coeff_a=a,
            coordinate_transformation_mode="half_pixel", exclude_outside=outside,
        )
        graph = helper.make_graph(
            [node], "resize",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, planes.shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 3, 30, 40))],
            [helper.make_tensor("sizes", TensorProto.INT64, [4], [1, 3, 30, 40])],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        found = session.run(None, {"x": planes})[0][0].transpose(1, 2, 0)
        gap = np.abs(np.clip(np.round(found), 0, 255) - pillow).max(2)
        inside = gap[3:-3, 3:-3].max()
        print(f"{mode}, exclude_outside={outside}: inside {inside:.0f}, border {gap.max():.0f}")
RESIZE
"$python" -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet onnxruntime==1.32.0 onnx==1.23.2 pillow==13.0.0 numpy==2.5.5
"$folder/venv/bin/python" "$folder/resize.py" | tee "$folder/seen"
cat > "$folder/known" <<'KNOWN'
linear, exclude_outside=0: inside 1, border 13
linear, exclude_outside=1: inside 1, border 1
cubic, exclude_outside=0: inside 1, border 9
cubic, exclude_outside=1: inside 1, border 1
KNOWN
diff "$folder/known" "$folder/seen"
