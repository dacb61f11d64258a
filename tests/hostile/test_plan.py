"""Plans that deceive: `encode` reads them to continue, `verify --repair` to encode shards again."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ci2p_cache.parquet import parquet_bytes
from tests.hostile.attacks import MAX_GROWTH, SHARD, attacked, refused, replace, snapshot
from tests.support.seals import reseal
from tests.support.tiers import thinned
from tests.support.warm import WarmParent

PLAN = "plan.parquet"
ENCODE = ("--encoder", "bundled", "--size", "64", "--shard-samples", "8")


def column(name: str, values: Callable[[list[Any]], Any], kind: Any = None) -> Callable[..., Any]:
    """Gives a column other values, of another type where `kind` says so."""

    def change(table: pa.Table) -> pa.Table:
        number = table.column_names.index(name)
        field = table.schema.field(number)
        field = pa.field(name, kind or field.type, nullable=kind is not None)
        return table.set_column(
            number, field, pa.array(values(table[name].to_pylist()), field.type)
        )

    return change


def optional(name: str) -> Callable[[pa.Table], pa.Table]:
    """Makes a column one that may have nulls, and its first value one."""

    def change(table: pa.Table) -> pa.Table:
        number = table.column_names.index(name)
        kind = table.schema.field(number).type
        values = pa.array([None, *table[name].to_pylist()[1:]], kind)
        return table.set_column(number, pa.field(name, kind, nullable=True), values)

    return change


def first(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [value, *values[1:]]


def a_million_rows(table: pa.Table) -> pa.Table:
    return table.take(pa.array([0] * 10**6))


# Name of the case -> what becomes of an honest plan whose digest is then made to fit.
PLANS: dict[str, Callable[[pa.Table], pa.Table]] = {
    "other columns": lambda t: pa.table({"surprise": [1, 2, 3]}),
    "one column more": lambda t: t.append_column("more", pa.array([0] * t.num_rows)),
    "one column less": lambda t: t.drop_columns(["path"]),
    "another order of columns": lambda t: t.select(t.column_names[::-1]),
    "rows as text": column("row", lambda v: [str(x) for x in v], pa.string()),
    "rows as floats": column("row", lambda v: [float(x) for x in v], pa.float64()),
    "keys as numbers": column("key", lambda v: list(range(len(v))), pa.int64()),
    "keys as lists": column("key", lambda v: [[x] for x in v], pa.list_(pa.string())),
    "paths as text": column("path", lambda v: [x.decode() for x in v], pa.string()),
    "keys in a struct": column("key", lambda v: [{"a": {"b": x}} for x in v],
                               pa.struct([("a", pa.struct([("b", pa.string())]))])),
    "a null key": optional("key"),
    "a null row": optional("row"),
    "a null path": optional("path"),
    "a million rows": a_million_rows,
    "no rows": lambda t: t.slice(0, 0),
    "one row less": lambda t: t.slice(1),
    "one row twice": lambda t: t.take(pa.array([0, 0, *range(2, t.num_rows)])),
    "rows in another order": lambda t: t.take(pa.array(list(reversed(range(t.num_rows))))),
    "a negative row": column("row", first(-1)),
    "a huge row": column("row", first(2**62)),
    "another shard": column("shard", first(7)),
    "an unknown split": column("split", first("../x"), pa.dictionary(pa.int8(), pa.string())),
    "a label of 10**9": column("label", first(10**9)),
    "a label of -2": column("label", first(-2)),
    "two keys alike": column("key", lambda v: [v[1], *v[1:]]),
    "a key that leads out": column("key", first("a/../../x")),
    "an absolute key": column("key", first("/etc/passwd")),
    "a path that leads out": column("path", first(b"../outside/secret.json")),
    "a path that ends above": column("path", first(b"train/..")),
    "a path through the middle": column("path", first(b"train/../../../outside/secret.json")),
    "an absolute path": column("path", first(b"/etc/passwd")),
    "an empty path": column("path", first(b"")),
}  # fmt: skip


def encode(place: Path) -> tuple[Any, ...]:
    return ("encode", place / "src", "--out", place / "shards", *ENCODE)


@pytest.mark.parametrize("case", thinned(PLANS, step=8))
def test_a_plan_that_cannot_be_is_refused_by_name(warm: WarmParent, place: Path, case: str) -> None:
    path = place / "shards" / PLAN
    path.write_bytes(parquet_bytes(PLANS[case](pq.read_table(path))))
    reseal(place / "shards")
    (place / "shards" / SHARD).unlink()
    before, outside = snapshot(place / "shards"), snapshot(place.parent / "outside")
    refused(attacked(warm, *encode(place)), {5}, PLAN)
    refused(attacked(warm, "verify", place / "shards", "--repair"), {5}, PLAN)
    assert snapshot(place / "shards") == before
    assert snapshot(place.parent / "outside") == outside


def folder_in_place_of(path: Path) -> None:
    path.unlink()
    path.mkdir()


BYTES: dict[str, Callable[[Path], Any]] = {
    "empty": lambda p: p.write_bytes(b""),
    "noise": lambda p: p.write_bytes(b"PAR1" + bytes(900) + b"PAR1"),
    "half": lambda p: p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    "text": lambda p: p.write_text("split,row\n"),
    "a pipe": lambda p: replace(p, "pipe"),
    "a device": lambda p: replace(p, "device"),
    "a folder": lambda p: folder_in_place_of(p),
}


@pytest.mark.parametrize("case", BYTES)
def test_what_is_no_plan_at_all_is_refused_by_name(
    warm: WarmParent, place: Path, case: str
) -> None:
    BYTES[case](place / "shards" / PLAN)
    reseal(place / "shards")
    started = time.monotonic()
    refused(attacked(warm, *encode(place)), {5}, PLAN)
    assert time.monotonic() - started < 60


def test_the_honest_plan_is_read(warm: WarmParent, place: Path) -> None:
    reseal(place / "shards")
    ran = attacked(warm, *encode(place))
    assert (ran.code, ran.grown_bytes < MAX_GROWTH) == (0, True), ran.err[-2000:]
