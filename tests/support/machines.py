"""Machines made of namespaces: each with a name, an address, processes and mounts of its own.

All of them are inside one more set of namespaces, whose first process is the script: when that
ends, however it ends, the kernel ends every process of every machine and takes the network down.
Needs root and, of Debian, iproute2 and util-linux.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Machine", "machines", "run_apart"]

_INSIDE = "CI2P_INSIDE_NAMESPACES"
_UNSHARE = (
    *("unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
)
# As its first process, a shell that waits also takes up the orphans that end.
_INIT = "hostname {name} && ip link set lo up && while :; do sleep 3600 & wait $!; done"


def run_apart(needs: Sequence[str]) -> None:
    """Runs the calling script in namespaces of its own, and returns there.

    Args:
        needs: Commands that it calls; it ends with 1 where one is missing.
    """
    if os.environ.pop(_INSIDE, None):
        _run("hostname", "head")
        _run("ip", "link", "set", "lo", "up")
        return
    missing = [name for name in ("ip", "unshare", "nsenter", *needs) if not shutil.which(name)]
    if os.geteuid() or missing:
        print(f"it needs root and the commands {', '.join(missing) or 'that it has'}")
        sys.exit(1)
    # Whatever ends this process then ends all.
    command = ["setpriv", "--pdeathsig", "KILL", *_UNSHARE, sys.executable, *sys.argv]
    sys.exit(subprocess.run(command, env=os.environ | {_INSIDE: "1"}, check=False).returncode)


class Machine:
    """One machine on the network of `machines`; it runs until it is lost or the script ends."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self._unshare = subprocess.Popen(
            [*_UNSHARE, "sh", "-c", _INIT.format(name=name)], stderr=subprocess.DEVNULL
        )
        children = Path(f"/proc/{self._unshare.pid}/task/{self._unshare.pid}/children")
        while not (found := children.read_text().split()):
            pass
        self._pid = found[0]
        _run("ip", "link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", self._pid)
        _run("ip", "link", "set", name, "master", "bridge", "up")
        self.run("ip", "address", "add", f"{address}/24", "dev", "eth0")
        self.run("ip", "link", "set", "eth0", "up")

    def command(self, *words: object) -> list[str]:
        """Returns the command that runs another on this machine, in the same folder."""
        enter = ["nsenter", "--target", self._pid, "--net", "--uts", "--mount", "--pid"]
        return [*enter, f"--wd={Path.cwd()}", *map(str, words)]

    def run(self, *words: object) -> None:
        """Runs a command on this machine; one that fails is an error."""
        _run(*self.command(*words))

    def lose(self) -> None:
        """Ends the machine as a power cut does, but for its disk."""
        os.kill(int(self._pid), signal.SIGKILL)
        self._unshare.wait()
        # The kernel takes it down a while after its other end.
        subprocess.run(["ip", "link", "delete", self.name], stderr=subprocess.DEVNULL, check=False)

    def cut(self) -> None:
        """Pulls the network cable; everything keeps running."""
        _run("ip", "link", "set", self.name, "down")

    def mend(self) -> None:
        """Puts the cable back."""
        _run("ip", "link", "set", self.name, "up")


def machines(folder: Path, count: int) -> list[Machine]:
    """Starts machines node1, node2, ... beside this one, which is `head`; all know all by name.

    Args:
        folder: Where their table of names is kept.
        count: How many.
    """
    addresses = {"head": "10.77.0.1"} | {
        f"node{n}": f"10.77.0.{10 + n}" for n in range(1, count + 1)
    }
    hosts = folder / "hosts"
    lines = ["127.0.0.1 localhost", *(f"{address} {name}" for name, address in addresses.items())]
    hosts.write_text("\n".join(lines) + "\n")
    _run("mount", "--bind", hosts, "/etc/hosts")
    _run("ip", "link", "add", "bridge", "type", "bridge")
    _run("ip", "address", "add", f"{addresses.pop('head')}/24", "dev", "bridge")
    _run("ip", "link", "set", "bridge", "up")
    return [Machine(name, address) for name, address in addresses.items()]


def _run(*words: object) -> None:
    subprocess.run([*map(str, words)], check=True)
