"""Two hosts on this machine: network namespaces with an address each, and a cable between them.

It takes the right to make namespaces, which root has outside most containers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DELAY = "2ms"  # of a packet, one way, where the kernel can


def why_not() -> str | None:
    """Return why there can be no two hosts here; None where there can."""
    if sys.platform != "linux" or shutil.which("ip") is None:
        return "network namespaces need Linux and iproute2"
    name = f"fastserve-{os.getpid()}-try"
    made = subprocess.run(("ip", "netns", "add", name), capture_output=True, check=False)
    if made.returncode:
        return f"network namespaces are not permitted: {made.stderr.decode().strip()}"
    _ip("netns", "del", name)
    return None


class TwoHosts:
    """Hosts 0 and 1, which reach each other at `addresses` and nobody else."""

    addresses = ("10.77.0.1", "10.77.0.2")

    def __init__(self) -> None:
        self.names = tuple(f"fastserve-{os.getpid()}-{host}" for host in range(2))
        self.has_delay = False

    def __enter__(self) -> TwoHosts:
        """Make them."""
        first, second = self.names
        for name in self.names:
            _ip("netns", "add", name)
        _ip(*f"link add cable netns {first} type veth peer name cable netns {second}".split())
        for name, address in zip(self.names, self.addresses, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                _ip("-n", name, "link", "set", link, "up")
        delay = f"tc qdisc add dev cable root netem delay {DELAY}".split()
        self.has_delay = not any(
            subprocess.run(self.on(host, delay), capture_output=True, check=False).returncode
            for host in range(2)
        )
        return self

    def __exit__(self, *_: object) -> None:
        """Take them down; processes on them go on without a cable."""
        for name in self.names:
            _ip("netns", "del", name)

    def on(self, host: int, command: Sequence[str]) -> tuple[str, ...]:
        """Return the command line that runs `command` on a host."""
        return ("ip", "netns", "exec", self.names[host], *command)

    def start(
        self, host: int, command: Sequence[str], environment: Mapping[str, str], log: Path
    ) -> subprocess.Popen[bytes]:
        """Start a command on a host; what it says goes to a file."""
        with log.open("ab") as file:
            return subprocess.Popen(
                self.on(host, command),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
                cwd=log.parent,
            )

    def run(self, host: int, command: Sequence[str]) -> str:
        """Run a command on a host to its end, and return what it says."""
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        made = subprocess.run(
            self.on(host, command), capture_output=True, text=True, env=environment, check=False
        )
        assert made.returncode == 0, made.stderr
        return made.stdout

    def cut(self) -> None:
        """Take the cable out."""
        _ip("-n", self.names[1], "link", "set", "cable", "down")

    def mend(self) -> None:
        """Put it in again."""
        _ip("-n", self.names[1], "link", "set", "cable", "up")


def _ip(*words: str) -> None:
    subprocess.run(("ip", *words), check=True, capture_output=True)
