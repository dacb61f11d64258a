"""Shell completion: what a shell is told after `ci2p-cache ... <TAB>`, in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ci2p_cache as cc
from ci2p_cache.cli import choices
from ci2p_cache.encoder.zoo import ZOO

# What completes is the program of that name, not `python -m`.
START = """
import sys
sys.argv[0] = "ci2p-cache"
from ci2p_cache.cli.start import main
try:
    main()
finally:
    heavy = {"torch", "timm", "compressai", "numpy", "rich.console"} & set(sys.modules)
    if heavy:
        sys.exit(f"loaded: {heavy}")
"""


LINES = {
    "ci2p-cache enc": ["encode"],
    "ci2p-cache bench l": ["loader"],
    "ci2p-cache encode --qual": ["--quality"],
    "ci2p-cache encode --dtype ": ["int8", "int16", "float16", "float32"],
    "ci2p-cache encode --arch mbt": ["mbt2018-mean", "mbt2018"],
    "ci2p-cache encode --views ": ["none", "flip", "crops:"],
    "ci2p-cache encode --device c": ["cpu", "cuda"],
    "ci2p-cache train shards/ --model vitds": ["vitds", "vitds_small", "vitds_tiny"],
    "ci2p-cache complexity --model ci2p": ["ci2p+timm:"],
    "ci2p-cache bench train shards/ --model vit_b": ["vit_b16"],
    "ci2p-cache evaluate runs/a --checkpoint ": ["best", "last"],
    # Nothing: the shell completes the path itself.
    "ci2p-cache verify sh": [],
}
EACH = f"""
import json
import os
for line in {list(LINES)!r}:
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = line, str(len(line.split(" ")) - 1)
    try:
        exec({START!r})
    except SystemExit as ended:
        print("ended", json.dumps(ended.code))
"""


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    """What bash gets for the last word of each line; one process, in which nothing is heavy."""
    done = subprocess.run(
        [sys.executable, "-c", EACH],
        # Buffered, as a shell has it: the command takes over what was printed before it.
        env=os.environ | {"_CI2P_CACHE_COMPLETE": "complete_bash", "PYTHONUNBUFFERED": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    *parts, rest = done.stdout.split("ended 0\n")
    assert rest == ""
    return dict(zip(LINES, parts, strict=True))


@pytest.mark.parametrize(("line", "wanted"), LINES.items())
def test_words_complete_without_loading_anything_heavy(
    told: dict[str, str], line: str, wanted: list[str]
) -> None:
    assert told[line].split() == wanted


def test_what_completes_is_what_there_is() -> None:
    own = {name for name in choices.models("") if not name.endswith(":")}
    assert own == set(cc.list_models())
    assert choices.archs("") == list(ZOO)
    for name in choices.views(""):
        assert cc.EncodeOptions(views=name + "4" if name.endswith(":") else name)


INSTALL = """
%s
source ~/.bashrc
COMP_WORDS=(ci2p-cache train shards/ --model vitds_)
COMP_CWORD=4
$(complete -p ci2p-cache | grep -o -- '-F [^ ]*' | cut -c 4-) ci2p-cache
echo "${COMPREPLY[@]}"
"""


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
@pytest.mark.parametrize(
    "install", ["ci2p-cache --install-completion >&2", "ci2p-cache --show-completion > ~/.bashrc"]
)
def test_bash_completes_after_installing_and_with_what_is_shown(
    tmp_path: Path, install: str
) -> None:
    program = tmp_path / "bin" / "ci2p-cache"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{START}")
    program.chmod(0o755)
    path = f"{program.parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", INSTALL % install],
        env={**os.environ, "HOME": str(tmp_path), "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["vitds_small", "vitds_tiny"], done.stderr
