"""Names that would like to be more than names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.hostile.attacks import MAX_GROWTH, attacked, commands, set_manifest
from tests.support.tiers import thinned
from tests.support.warm import WarmParent

NAMES = {
    "html": "<script>alert(1)</script>",
    "escape": "\x1b]0;owned\x07\x1b[2J",
    "c1 escape": "\x9b31mred",
    "markup": "[bold red]x[/bold red][/]",
    "newline": "a\nerror: all is well\r",
    "direction": "\u202egpj.exe\u2066",
    "long": "x" * 10**6,
}


@pytest.mark.parametrize("kind", thinned(NAMES, step=5))
def test_class_names_reach_the_terminal_as_plain_text(
    warm: WarmParent, place: Path, kind: str
) -> None:
    name = NAMES[kind]
    set_manifest(classes__0=name, class_titles__0=name, source=name, software=name)(
        place / "shards"
    )
    for argv in (commands(place, "inspect"), commands(place, "verify"), commands(place, "sample")):
        ran = attacked(warm, *argv)
        assert ran.code == 0, ran.err[-2000:]
        text = (ran.out + ran.err).replace("\n", "")
        assert text.isprintable(), ascii(text[:3000])
        assert len(text) < 50_000
        assert ran.grown_bytes < MAX_GROWTH
    plain = attacked(warm, *commands(place, "inspect")).out
    assert "error: all is well" not in plain.splitlines()
    if kind in ("html", "markup"):
        assert name in plain
    assert (
        json.loads(attacked(warm, *commands(place, "inspect"), "--json").out)["classes"][0] == name
    )
