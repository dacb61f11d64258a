"""What people read: messages are short and in plain words, and a command in one works."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import ci2p_cache
from ci2p_cache.cli.app import command_tree
from tests.support.messages import FIELD, Message, messages

PACKAGE = Path(ci2p_cache.__file__).parent

# A list of differences has one line for each field; shell commands are as long as they are.
MAY_BE_LONG = re.compile("made with other|holds another experiment|started with other| && ")

BANNED = re.compile(r"\b(told|tells|lies|goes on|which is no|nobody)\b", re.IGNORECASE)

FOREIGN = {
    *("--array", "--force-reinstall", "--logdir", "--nproc-per-node", "--sort", "--wrap"),
    # Of pipelines/train_codec.py.
    "--start",
}
"""Options of other programs that messages name."""


@pytest.fixture(scope="module")
def shown() -> list[Message]:
    found = list(messages(PACKAGE))
    assert len(found) > 800
    return found


def commands(part: Any, *path: str) -> Iterator[tuple[str, Any]]:
    """Yields every command that takes options, under its full name."""
    for name, inner in getattr(part, "commands", {}).items():
        yield from commands(inner, *path, name)
    if not hasattr(part, "commands"):
        yield " ".join(path), part


COMMANDS = dict(commands(command_tree()))


def context(name: str, words: list[str], *, lenient: bool = False) -> Any:
    """Parses the words behind a command as the command line does; nothing is run."""
    root = command_tree().make_context("ci2p-cache", ["x"], resilient_parsing=True)
    return COMMANDS[name].make_context(name, words, root, resilient_parsing=lenient)


def test_no_message_takes_more_than_two_lines(shown: list[Message]) -> None:
    long = {}
    for each in shown:
        lines = sum(max(1, math.ceil(len(line) / 100)) for line in each.text.split("\n"))
        if lines > 2 and not MAY_BE_LONG.search(each.text):
            long[each.where] = each.text
    assert not long


def test_messages_are_in_plain_words() -> None:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        # A string that stands alone is a docstring, or describes a field.
        quiet = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
        found += [
            f"{path.name}:{node.lineno}: {node.value}"
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            if id(node) not in quiet and BANNED.search(node.value)
        ]
    found += [f"{name} --help" for name, each in COMMANDS.items() if BANNED.search(each.help)]
    assert not found


def parse(line: str) -> None:
    words = line.split()
    name = next(name for name in (" ".join(words[:2]), words[0]) if name in COMMANDS)
    if "--help" not in words:
        context(name, words[len(name.split()) :])


def test_every_command_in_a_message_is_one(shown: list[Message]) -> None:
    names = "|".join(COMMANDS)
    # In backquotes a command is only named.
    pattern = re.compile(rf"(?<!`)ci2p-cache ((?:{names})\b[\w ./:=+-]*)")
    lines = {line for each in shown for line in pattern.findall(each.text)}
    assert len(lines) > 15
    for line in sorted(lines):
        parse(line)


def test_every_example_in_a_help_is_a_command() -> None:
    pattern = re.compile(
        r"^ *(?:ci2p-cache|torchrun .* ci2p_cache) (.+?)(?:   *\S.*| > .*)?$", re.M
    )
    texts = [command_tree().help, *(each.help for each in COMMANDS.values())]
    lines = [line for text in texts for line in pattern.findall(text)]
    assert len(lines) > 50
    for line in lines:
        parse(line.replace("'", ""))


def test_every_option_in_a_message_is_one(shown: list[Message]) -> None:
    known = {flag for each in COMMANDS.values() for p in each.params for flag in p.opts}
    known |= {flag for each in COMMANDS.values() for p in each.params for flag in p.secondary_opts}
    wrong = {
        each.where: flag
        for each in shown
        for flag in re.findall(r"(?<![\w-])--[a-z][\w-]*", each.text)
        if flag not in known | FOREIGN and FIELD not in flag
    }
    assert not wrong


def test_every_help_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = [context(name, ["x"], lenient=True) for name in COMMANDS]
    helps = [each.get_help() for each in (shown[0].parent, *shown)]
    assert not [line for text in helps for line in text.split("\n") if len(line) > 80]
