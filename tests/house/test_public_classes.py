"""Every public class keeps Python's contracts: what it takes is shown, its repr is short."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import pickle
import pydoc
from pathlib import Path
from typing import Any

import pytest

import ci2p_cache as cc
from ci2p_cache import errors
from ci2p_cache.cache.commit import FileRecord
from ci2p_cache.record import Record
from ci2p_cache.runs.evaluations import CalibrationBin, ClassScore
from ci2p_cache.runs.files import EpochRecord
from tests.support.caches import make_cache

CLASSES = {name: getattr(cc, name) for name in cc.__all__ if inspect.isclass(getattr(cc, name))} | {
    name: getattr(errors, name) for name in errors.__all__ if name[0].isupper()
}


def filled(kind: Any) -> Any:
    """Any value of a field's type."""
    text = str(kind)
    samples: dict[str, Any] = {
        "str": "a" * 400, "int": 2**40, "float": 1 / 3, "bool": True, "str | None": "b" * 400,
        "int | None": 7, "float | None": 0.1, "dict[str, int]": {f"split{n}": n for n in range(99)},
        "dict[str, float]": {f"stage{n}": 0.5 for n in range(99)},
        "tuple[str, ...]": ("c" * 400,) * 100,
    }  # fmt: skip
    return samples.get(text)


def records() -> dict[str, Record]:
    """One record of each public class that calls return, with as much in it as may be."""
    finding = cc.Finding(path="index/x.parquet", kind="damaged", problem="p" * 500)
    epoch = {field.name: filled(field.type) for field in dataclasses.fields(EpochRecord)}
    special: dict[str, Any] = {
        "found": (finding,) * 500, "remaining": (finding,) * 500, "findings": (finding,) * 500,
        "last": EpochRecord(**epoch), "best": EpochRecord(**epoch),
        "confusion": tuple((n, n, 1) for n in range(100_000)),
        "bins": (CalibrationBin(low=0, high=1, samples=1, confidence=1, accuracy=1),) * 15,
        "per_class": (ClassScore(label=0, name="n" * 99, samples=1, correct=1),) * 1000,
        "predictions": FileRecord(path="p", bytes=1, sha256="0" * 64), "version": 1,
        "encoded": None, "trained": None, "scores": None, "working": (), "source": "images",
        "bottleneck": "g_a", "format": "npy",
    }  # fmt: skip
    made: dict[str, Record] = {}
    for name in (
        "CacheStatus", "ConvertSummary", "DryRunReport", "EncodeSummary", "Evaluation",
        "ExperimentSummary", "ReencodeSummary", "RepairSummary", "SeedsSummary",
        "TrainSummary",
    ):  # fmt: skip
        kind = CLASSES[name]
        values = {
            field.name: special.get(field.name, filled(field.type))
            for field in dataclasses.fields(kind)
        }
        made[name] = kind(**values)
    made["Finding"] = finding
    made["EncodeOptions"] = cc.EncodeOptions(encoder="bundled", size=64)
    made["TrainSpec"] = cc.TrainSpec(epochs=3)
    made["Experiment"] = cc.Experiment(name="x", encode=cc.EncodeOptions(size=64))
    return made


RECORDS = records()


@pytest.mark.parametrize("name", CLASSES)
def test_the_signature_and_help_of_a_class_name_its_arguments(name: str) -> None:
    kind = CLASSES[name]
    parameters = inspect.signature(kind).parameters.values()
    loose = {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}
    assert not [each for each in parameters if each.kind in loose]
    told = pydoc.plain(pydoc.render_doc(kind))
    for each in parameters:
        assert each.name in told


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_is_shown_short_is_hashed_and_comes_back_from_a_pickle(name: str) -> None:
    record = RECORDS[name]
    assert repr(record).startswith(f"{name}(")
    assert len(repr(record)) < 1700
    assert "\n" not in repr(record)
    for found in (pickle.loads(pickle.dumps(record)), copy.deepcopy(record)):
        assert found == record
        assert hash(found) == hash(record)
    assert record != object()


def test_a_record_shows_what_is_not_the_default() -> None:
    assert repr(RECORDS["EncodeOptions"]) == "EncodeOptions(encoder='bundled', size=64)"
    assert repr(cc.TrainSpec()) == "TrainSpec()"
    assert repr(RECORDS["Experiment"]) == "Experiment(name='x', encode=EncodeOptions(size=64))"


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name[0].isupper()])
def test_an_error_comes_back_from_a_pickle(name: str) -> None:
    kind: Any = getattr(errors, name)
    more = {"signal_number": 2} if kind is errors.InterruptedRunError else {}
    error = kind("what is wrong", hint="do this", **more)
    found = pickle.loads(pickle.dumps(error))
    assert (type(found), str(found), found.hint) == (kind, "what is wrong", "do this")
    assert found.exit_code == error.exit_code


def test_an_encoder_and_what_holds_a_cache_are_shown_in_one_short_line(tmp_path: Path) -> None:
    cache = cc.open_cache(make_cache(tmp_path / "c", {"train": {"ant": 3, "bee": 3}}))
    with cc.LatentLoader(cache["train"], batch_size=2) as loader:
        for shown in (
            cache,
            cache["train"],
            loader,
            next(iter(loader)),
            cc.load_encoder("bundled"),
        ):
            assert len(repr(shown)) < 350 + 2 * len(str(tmp_path))
            assert "\n" not in repr(shown)
            assert " object at 0x" not in repr(shown)
