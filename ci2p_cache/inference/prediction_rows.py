"""What a model said of each image of a split, one row per image, beside its evaluation.

Shape suffixes: B batch, K classes, k the first few of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from torch import Tensor
from torch.nn.functional import cross_entropy

from ci2p_cache.cache.split import Split
from ci2p_cache.loader.batch import Batch

__all__ = ["PredictionRows", "keys_of"]

_TOP = 5

_SCHEMA = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("label", pa.int32(), nullable=False),
        pa.field("predicted", pa.int32(), nullable=False),
        pa.field("confidence", pa.float32(), nullable=False),
        pa.field("correct", pa.bool_(), nullable=False),
        pa.field("loss", pa.float32(), nullable=False),
        pa.field("top5", pa.list_(pa.int32()), nullable=False),
    ]
)


class PredictionRows:
    """The rows, collected batch by batch.

    Args:
        total: Images that will come.
        on_progress: Called after each batch.
    """

    def __init__(self, total: int, on_progress: Callable[[int, int], None] | None) -> None:
        self._total = total
        self._on_progress = on_progress
        self._done = 0
        self._parts: dict[str, list[npt.NDArray[Any]]] = {}

    def add(self, batch: Batch, logits_BK: Tensor) -> None:
        """Takes a batch and its logits, float32 (B, K); neither is kept."""
        labels_B = batch.labels
        # As training counts: the first of topk, not argmax, which may differ where two are equal.
        top_Bk = logits_BK.topk(min(_TOP, logits_BK.shape[1]), dim=1).indices
        shares_BK = logits_BK.softmax(dim=1)
        columns = {
            "row": batch.rows,
            "label": labels_B,
            "predicted": top_Bk[:, 0],
            "confidence": shares_BK.gather(1, top_Bk[:, :1])[:, 0],
            "loss": cross_entropy(logits_BK, labels_B, reduction="none"),
            "top5": top_Bk,
        }
        for name, values in columns.items():
            self._parts.setdefault(name, []).append(values.cpu().numpy().copy())
        self._done += len(labels_B)
        if self._on_progress is not None:
            self._on_progress(self._done, self._total)

    def column(self, name: str) -> npt.NDArray[Any]:
        """Returns one column of all rows so far, (N,), in the order in which they came."""
        return np.concatenate(self._parts[name])

    def table(self, split: Split) -> pa.Table:
        """Returns the content of the parquet file.

        Args:
            split: What the rows are of; its index has their keys.

        Raises:
            ShardError: a part of the index is damaged.
        """
        keys = keys_of(split)
        label, predicted = self.column("label"), self.column("predicted")
        columns = {
            "row": self.column("row"),
            "key": [keys[row] for row in self.column("row").tolist()],
            "label": label,
            "predicted": predicted,
            "confidence": self.column("confidence"),
            "correct": label == predicted,
            "loss": self.column("loss"),
            "top5": list(self.column("top5")),
        }
        return pa.table(
            {
                name: pa.array(columns[name], type=_SCHEMA.field(name).type)
                for name in _SCHEMA.names
            },
            schema=_SCHEMA,
        )


def keys_of(split: Split) -> dict[int, str]:
    """Returns the key of each valid row of a split.

    Raises:
        ShardError: a part of the index is damaged.
    """
    keys: dict[int, str] = {}
    wanted = set(split.valid_rows.tolist())
    for shard in np.unique(split.valid_rows // split.record.shard_rows).tolist():
        table = split.read_index(shard, ["row", "key"])
        pairs = zip(table["row"].to_pylist(), table["key"].to_pylist(), strict=True)
        keys |= {row: key for row, key in pairs if row in wanted}
    return keys
