"""tests/long/same_as.py tells every difference, and accepts only those that are listed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.long import same_as
from tests.long.sameness import caches, refusals
from tests.long.sameness.bench import Bench, Unit, first_lines, masked, types_of
from tests.long.sameness.compare import Difference, compared, read_intended, sorted_out
from tests.long.sameness.inputs import Inputs
from tests.long.sameness.tree import Tree

ENTRY = """
[[difference]]
group = "caches"
item = "folder/*.json"
reason = "a field was added"
since = "abc1234"
"""


def noted(root: Path) -> dict[str, object]:
    """What a unit notes of a folder."""
    tree = Tree(root, root)
    bench = Bench(tree, tree, root, Inputs(root))
    bench.files("shards", "shards")
    return bench.notes


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Two roots with the same two files."""
    for side in ("base", "this"):
        folder = tmp_path / side / "shards" / "index"
        folder.mkdir(parents=True)
        (folder / "a.parquet").write_bytes(b"some bytes")
        (folder.parent / "cache.json").write_bytes(b"{}")
    return tmp_path / "base", tmp_path / "this"


def told(base: Mapping[str, object], ours: Mapping[str, object]) -> list[str]:
    return [each.item for each in compared("caches", base, ours)]


def test_equal_folders_give_no_difference(folders: tuple[Path, Path]) -> None:
    base, ours = map(noted, folders)
    assert len(base) == 2
    assert told(base, ours) == []


def test_a_changed_byte_is_told(folders: tuple[Path, Path]) -> None:
    (folders[1] / "shards" / "index" / "a.parquet").write_bytes(b"some bytez")
    assert told(*map(noted, folders)) == ["shards/index/a.parquet"]


def test_a_missing_file_and_a_new_one_are_told(folders: tuple[Path, Path]) -> None:
    (folders[1] / "shards" / "cache.json").rename(folders[1] / "shards" / "cache.yaml")
    assert told(*map(noted, folders)) == ["shards/cache.json", "shards/cache.yaml"]


def test_a_changed_exit_code_and_message_are_told() -> None:
    base = {"size": {"code": 2} | first_lines("Usage: ...\n\nError: it is 65\ntry:   --help\n")}
    ours = {"size": {"code": 1} | first_lines("error: it is 66\n")}
    assert told(base, base) == []
    assert told(base, ours) == ["size#/code", "size#/first", "size#/try"]


def test_a_changed_field_is_told_and_a_clock_is_not() -> None:
    base, ours = (
        masked({"rows": [{"label": label, "seconds": s}]}, {"seconds"})
        for label, s in ((1, 2), (2, 3))
    )
    assert told({"x": base}, {"x": ours}) == ["x#/rows/0/label"]
    # A clock that is gone is told.
    assert told({"x": {"seconds": types_of(3.5)}}, {"x": {}}) == ["x#/seconds"]
    assert told({"x": 1}, {"x": 1.0}) == ["x"]
    assert told({"x": float("nan")}, {"x": float("nan")}) == []


def test_a_line_that_is_inserted_is_told_alone() -> None:
    (found,) = compared("caches", {"x": ["a", "b", "c"]}, {"x": ["a", "new", "b", "c"]})
    assert (found.item, found.base, found.ours) == ("x#/1", [], ["new"])


def test_a_listed_difference_is_accepted_and_another_is_not(tmp_path: Path) -> None:
    (tmp_path / "list.toml").write_text(ENTRY)
    intended = read_intended(tmp_path / "list.toml", same_as.GROUPS)
    listed = Difference("caches", "folder/shards/cache.json", "1", "2")
    others = [
        Difference("caches", "folder/shards/c.0", "1", "2"),
        Difference("growth", "folder/shards/cache.json", "1", "2"),
    ]
    assert sorted_out([listed, *others], intended) == (others, [1])
    assert sorted_out([], intended) == ([], [0])


def test_the_exit_code_is_1_only_for_what_is_not_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "list.toml").write_text(ENTRY)
    intended = read_intended(tmp_path / "list.toml", same_as.GROUPS)
    unit = Unit("caches", "folder", lambda bench: None)

    def ended(ours: dict[str, object], end: str = "to its end") -> int:
        base = same_as.Outcome({"a.json": 1, "b": 1}, "to its end", set())
        differences = same_as.held_together(unit, base, same_as.Outcome(ours, end, set()))
        tally = same_as.Tally(units=1, compared=2, differences=list(differences))
        return same_as.told({"caches": tally}, intended, [])

    assert ended({"a.json": 1, "b": 1}) == 0
    assert "stale: caches: folder/*.json" in capsys.readouterr().out
    assert ended({"a.json": 2, "b": 1}) == 0
    assert (
        "listed: caches: folder/*.json: 1 (a field was added; abc1234)" in capsys.readouterr().out
    )
    assert ended({"a.json": 2, "b": 2}) == 1
    assert "caches: folder/b" in capsys.readouterr().out
    assert ended({"a.json": 1}, "`encode` ended with 1") == 1
    assert "folder/(ended)" in capsys.readouterr().out
    # What fails in the commit, and a document that is compared nowhere, are no success either.
    failing = same_as.Tally(problems=["caches: folder: it ended with 1"])
    assert same_as.told({"caches": failing}, [], []) == 1
    assert same_as.told({}, [], ["status"]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ENTRY.replace('reason = "a field was added"\n', ""), "has no `reason`"),
        (ENTRY.replace("a field was added", "  "), "has no `reason`"),
        (ENTRY.replace('since = "abc1234"', ""), "has no `since`"),
        (ENTRY.replace("caches", "cashes"), "no such group"),
        (ENTRY + 'who = "me"\n', r"has \['who'\]"),
        ("[[intended]]\n", r"has \['intended'\]"),
    ],
)
def test_an_entry_without_a_reason_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "list.toml").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_intended(tmp_path / "list.toml", same_as.GROUPS)


def test_the_list_of_this_tree_can_be_read() -> None:
    read_intended(same_as.LIST, same_as.GROUPS)


def test_enough_is_compared() -> None:
    assert len(caches.COMBINATIONS) >= 20
    assert refusals.count() >= 60
    words = " ".join(each.words for each in caches.COMBINATIONS).split()
    values = {"int8", "int16", "float16", "float32", "zarr", "webdataset", "both", "zstd", "none"}
    assert values <= set(words)
    names = [f"{unit.group} {unit.name}" for unit in same_as.all_units()]
    assert len(names) == len(set(names))


def test_only_names_groups_and_units() -> None:
    assert {unit.group for unit in same_as.chosen_units("surface,growth")} == {"surface", "growth"}
    assert [unit.name for unit in same_as.chosen_units("growth/rep*")] == ["repair"]
    with pytest.raises(ValueError, match="names no unit"):
        same_as.chosen_units("nothing")
    left = {unit.group for unit in same_as.chosen_units(None)}
    assert {unit.group for unit in same_as.chosen_units(None, every=True)} - left == {"demo"}


def test_the_trees_take_turns_in_a_folder() -> None:
    units = [Unit("caches", str(number), lambda bench: None) for number in range(2)]
    schedule = same_as.Schedule(units)
    first = schedule.take("base")
    assert first is units[0]
    assert schedule.take("this") is units[1]
    schedule.give_back(first)
    assert schedule.take("this") is units[0]
    schedule.stop()
    assert schedule.take("base") is None
