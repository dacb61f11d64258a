"""Every message of the package, read out of its source: errors, hints, notices, printed lines."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ci2p_cache import errors

__all__ = ["FIELD", "Message", "messages"]

FIELD = "x" * 12
"""What stands for a value that is known only at run time."""

_NUMBER = "123456"
"""What stands for one that is formatted as a number."""

_ERRORS = {
    name for name in errors.__all__ if isinstance(getattr(errors, name), type)
}  # fmt: skip
_SHOWN = {"notice", "status", "notify", "line", "heading", "planned", "warn"}
_NAMED = {"hint", "advice", "note"}


@dataclass(frozen=True)
class Message:
    """One way that a message can read."""

    where: str
    """File and line."""
    text: str
    """With `FIELD` for each value."""


def messages(package: Path) -> Iterator[Message]:
    """Yields every message of a package; one that is put together out of sight is left out.

    Args:
        package: Its folder.
    """
    for path in sorted(package.rglob("*.py")):
        yield from _Reader(path.relative_to(package.parent).as_posix(), path.read_text("utf-8"))


class _Reader:
    """Reads the messages of one file."""

    def __init__(self, name: str, source: str) -> None:
        self._name, self._tree = name, ast.parse(source)
        functions = [n for n in ast.walk(self._tree) if isinstance(n, ast.FunctionDef)]
        # What a function of this file returns, and which of its parameters it raises or shows.
        self._returned = {
            each.name: [n.value for n in ast.walk(each) if isinstance(n, ast.Return) and n.value]
            for each in functions
        }
        self._passed: dict[str, tuple[int, str]] = {}
        for each in functions:
            parameters = [a.arg for a in each.args.args if a.arg not in ("self", "cls")]
            for call in (n for n in ast.walk(each) if isinstance(n, ast.Call)):
                first = call.args[0] if call.args else None
                name = first.id if isinstance(first, ast.Name) else ""
                if _called(call) in _ERRORS and name in parameters:
                    self._passed[each.name] = (parameters.index(name), name)

    def __iter__(self) -> Iterator[Message]:
        yield from self._within(self._tree, _assigned(self._tree.body))

    def _within(self, node: ast.AST, names: dict[str, list[ast.expr]]) -> Iterator[Message]:
        for inner in ast.iter_child_nodes(node):
            known = names
            if isinstance(inner, ast.FunctionDef):
                known = names | _assigned(ast.walk(inner))
            if isinstance(inner, ast.Call):
                for shown in self._shown(inner):
                    for text in self._texts(shown, known):
                        yield Message(f"{self._name}:{inner.lineno}", text)
            yield from self._within(inner, known)

    def _shown(self, call: ast.Call) -> Iterator[ast.expr]:
        name = _called(call)
        if name in _ERRORS | _SHOWN and call.args:
            yield call.args[0]
        elif name in self._passed:
            number, keyword = self._passed[name]
            given = [k.value for k in call.keywords if k.arg == keyword]
            yield from (call.args[number : number + 1] or given)
        yield from (each.value for each in call.keywords if each.arg in _NAMED)

    def _texts(self, node: ast.expr, names: dict[str, list[ast.expr]], depth: int = 0) -> list[str]:
        """Returns the ways in which an expression can read; none where that is not seen here."""
        if depth > 12:
            return []

        def texts(inner: ast.expr) -> list[str]:
            return self._texts(inner, names, depth + 1)

        def together(parts: list[ast.expr], between: str = "") -> list[str]:
            ways = itertools.product(*(texts(part) or [FIELD] for part in parts))
            return [between.join(way) for way in itertools.islice(ways, 64)]

        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return together(parts)
            case ast.FormattedValue(value=value, format_spec=form):
                return texts(value) if form is None else [_NUMBER]
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                return together([left, right])
            case ast.BinOp(op=ast.Mult(), left=ast.Constant(value=str(text))):
                return ["", text]
            case ast.IfExp(body=body, orelse=orelse):
                return texts(body) + texts(orelse)
            case ast.BoolOp(values=values):
                return [text for value in values for text in texts(value)]
            case ast.Name(id=name) if name in names:
                return [text for value in names[name] for text in texts(value)]
            case ast.Call(func=ast.Name(id="command"), args=words, keywords=keywords):
                notes = [f"   ({t})" for each in keywords for t in texts(each.value)] or [""]
                lines = together([ast.Constant("ci2p-cache"), *words], " ")
                return [line + note for line in lines for note in notes]
            case ast.Call() if _called(node) in self._returned:
                return [t for value in self._returned[_called(node)] for t in texts(value)]
            case ast.Attribute(value=ast.Name(id="self"), attr=name) if name in self._returned:
                return [text for value in self._returned[name] for text in texts(value)]
        return []


def _called(call: ast.Call) -> str:
    function = call.func
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")


def _assigned(nodes: Iterator[ast.AST] | list[ast.stmt]) -> dict[str, list[ast.expr]]:
    """Returns what is assigned to each name."""
    found: dict[str, list[ast.expr]] = {}
    for node in nodes:
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            for left, right in pairs:
                if isinstance(left, ast.Name):
                    found.setdefault(left.id, []).append(right)
    return found
