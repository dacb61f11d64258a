"""The exported graph rounds as the cache does, also where a value is between two symbols."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import ci2p_cache as cc
from ci2p_cache.inference.export import graph_of, open_exported, write_exported
from tests.support.commands import needs
from tests.support.trained import make_run

pytestmark = needs("onnx", "onnxruntime", "onnxscript")

HALVES = torch.arange(-130, 131) + 0.5
"""From below the smallest int8 symbol to above the largest."""


def test_a_value_at_a_tie_falls_to_the_even_symbol_as_in_the_cache(tmp_path: Path) -> None:
    classifier = cc.load_classifier(make_run(tmp_path) / "runs" / "run", device="cpu")
    offset_M11 = torch.tensor(classifier.run.file.offset)[:, None, None]
    y_BMhw = (HALVES.view(3, 1, 3, 29) + offset_M11).contiguous()
    is_tie = y_BMhw - offset_M11 == HALVES.view(3, 1, 3, 29)
    assert is_tie.float().mean() > 0.5, "too few of them are exact ties"
    stored_BMhw = classifier.stored(y_BMhw)
    y_hat_BMhw = classifier.dequantise(stored_BMhw)

    # What comes before and behind the rounding is left out: y goes in, y_hat comes out.
    graph = graph_of(classifier, "full")
    graph.g_a = graph.model = nn.Identity()
    assert torch.equal(graph(y_BMhw), y_hat_BMhw)
    write_exported(graph, torch.zeros_like(y_BMhw[:2]), tmp_path / "a.onnx", "onnx", {})
    file = open_exported(tmp_path / "a.onnx", "onnx")
    assert torch.equal(file.logits(y_BMhw), y_hat_BMhw)
    found_BMhw = file.stored(y_BMhw)
    assert found_BMhw is not None
    assert torch.equal(found_BMhw.clamp(-127, 127), stored_BMhw.float())
