"""Run folders as training and evaluation leave them, written by hand: any size, at no cost."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

import ci2p_cache as cc

__all__ = ["write_evaluation", "write_run"]


def write_run(
    path: Path,
    *,
    cache: cc.Cache | None = None,
    epochs: int = 3,
    classes: tuple[str, ...] = ("ant", "bee", "cat"),
    seed: int = 0,
    **spec: Any,
) -> Path:
    """Writes args.yaml, model.json and summary.csv of a run that ended after `epochs`."""
    path.mkdir(parents=True)
    fingerprint = {} if cache is None else cache.fingerprint.to_dict()
    titles = classes if cache is None else cache.class_titles
    args = {
        "version": 1,
        "cache": "gone" if cache is None else str(cache.path),
        "numerics": {"device": "cpu", "torch": "2"},
        "settings": {
            "spec": {"model": "vitds_tiny", "seed": seed, "betas": [0.9, 0.999], **spec},
            "fingerprint": fingerprint,
            "data_sha256": "0" * 64,
            "loader": "LatentLoader",
        },
    }
    (path / "args.yaml").write_text(yaml.safe_dump(args, allow_unicode=True))
    (path / "model.json").write_text(json.dumps({"class_titles": list(titles)}))
    rng = np.random.default_rng(seed)
    lines = [
        "epoch,train_loss,train_top1,val_loss,val_top1,val_top5,lr,grad_norm,skipped_steps,images,"
        "images_per_second,wait_share,epoch_seconds"
    ]
    for epoch in range(1, epochs + 1):
        done = epoch / epochs
        top1 = 0.3 + 0.5 * done + rng.uniform(-0.02, 0.02)
        lines.append(
            f"{epoch},{2 - done},{top1 - 0.1},{2.1 - done},{top1},0.95,0.001,1.5,0,900,"
            f"{300 + rng.uniform(0, 20)},{rng.uniform(0, 0.05)},{4 + rng.uniform(0, 1)}"
        )
    (path / "summary.csv").write_text("\n".join(lines) + "\n")
    return path


def write_evaluation(
    run: Path,
    *,
    rows: Any,
    keys: list[str],
    labels: Any,
    predicted: Any,
    confidence: Any,
    split: str = "val",
    cache: str = "gone",
    checkpoint: str = "epoch-0003-step-000000",
    is_own: bool = True,
    is_old: bool = False,
) -> Path:
    """Writes an evaluation and its predictions that agree with each other; returns the first.

    The old ones are `evaluation.json` and `predictions.parquet`.
    """
    name = f"{split if split.isalnum() else 'odd'}-{checkpoint}" + "-cache-12345678" * (not is_own)
    path = run / "evaluation.json" if is_old else run / "evaluations" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    predictions = run / "predictions.parquet" if is_old else path.with_suffix(".parquet")
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    confidence = np.asarray(confidence, np.float32)
    correct = labels == predicted
    table = pa.table(
        {
            "row": pa.array(rows, pa.int64()),
            "key": pa.array(keys, pa.string()),
            "label": pa.array(labels, pa.int32()),
            "predicted": pa.array(predicted, pa.int32()),
            "confidence": pa.array(confidence, pa.float32()),
            "correct": pa.array(correct, pa.bool_()),
            "loss": pa.array(-np.log(np.maximum(confidence, 1e-6)), pa.float32()),
            "top5": pa.array([[int(p)] for p in predicted], pa.list_(pa.int32())),
        }
    )
    pq.write_table(table, predictions, write_page_checksum=True)
    place = np.minimum((confidence * 15).astype(int), 14)
    bins = [
        {
            "low": i / 15,
            "high": (i + 1) / 15,
            "samples": int((place == i).sum()),
            "confidence": float(confidence[place == i].mean()) if (place == i).any() else None,
            "accuracy": float(correct[place == i].mean()) if (place == i).any() else None,
        }
        for i in range(15)
    ]
    counts = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    evaluation = {
        "version": 1,
        "run": run.name,
        "model": "vitds_tiny",
        "checkpoint": checkpoint,
        "epoch": 3,
        "step": 0,
        "cache": cache,
        "split": split,
        "folds": 0,
        "fold": 0,
        "is_own_data": is_own,
        "source": "cache",
        "device": "cpu",
        "batch_size": 64,
        "samples": len(labels),
        "top1": float(correct.mean()),
        "top1_low": 0.0,
        "top1_high": 1.0,
        "top5": 0.99,
        "nll": 0.7,
        "ece": 0.05,
        "bins": bins,
        "per_class": [
            {
                "label": int(c),
                "name": str(c),
                "samples": int((labels == c).sum()),
                "correct": int(correct[labels == c].sum()),
            }
            for c in np.unique(labels)
        ],
        "confusion": [[a, b, n] for (a, b), n in sorted(counts.items())],
        "predictions": {
            "path": predictions.name,
            "bytes": predictions.stat().st_size,
            "sha256": hashlib.sha256(predictions.read_bytes()).hexdigest(),
        },
        "recorded_top1": float(correct.mean()),
        "recorded_nll": 0.7,
    }
    path.write_text(json.dumps(evaluation))
    return path
