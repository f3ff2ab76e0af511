"""Two hosts on this machine: network namespaces with addresses of their own, on a switch that the store is on as well.

    head 10.213.N.2 ----\
                         switch 10.213.N.1 (here: the store's proxy)
    worker 10.213.N.3 --/

Each host has its own interfaces, routes and ports; files, memory and process ids are this machine's.
"""

from __future__ import annotations

import os
import random
import subprocess
from dataclasses import dataclass, field
from typing import Self


@dataclass
class Hosts:
    """The namespaces and the switch between them; names are drawn, so that two tests do not meet."""

    number: int = field(default_factory=lambda: random.SystemRandom().randrange(1, 255))

    def __enter__(self) -> Self:
        try:
            self._build()
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self.remove()

    @property
    def switch(self) -> str:
        """The address on the switch of what runs outside of both hosts."""
        return f"10.213.{self.number}.1"

    @property
    def head(self) -> str:
        return f"10.213.{self.number}.2"

    @property
    def worker(self) -> str:
        return f"10.213.{self.number}.3"

    def on(self, host: str) -> list[str]:
        """What to put before a command to run it on the host with this address."""
        return ["ip", "netns", "exec", self._namespace(host)]

    def cut(self, host: str) -> None:
        """Pull the host's cable out of the switch."""
        _ip("link", "set", self._port(host), "down")

    def mend(self, host: str) -> None:
        """Put it back."""
        _ip("link", "set", self._port(host), "up")

    def remove(self) -> None:
        """Take everything down, whatever is there of it."""
        for host in (self.head, self.worker):
            _ip("link", "del", self._port(host), check=False)
            _ip("netns", "del", self._namespace(host), check=False)
        _ip("link", "del", self._bridge, check=False)

    def _build(self) -> None:
        _ip("link", "add", self._bridge, "type", "bridge")
        _ip("addr", "add", f"{self.switch}/24", "dev", self._bridge)
        _ip("link", "set", self._bridge, "up")
        for host in (self.head, self.worker):
            namespace, port = self._namespace(host), self._port(host)
            _ip("netns", "add", namespace)
            _ip("link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", namespace)
            _ip("link", "set", port, "master", self._bridge)
            _ip("link", "set", port, "up")
            _ip("-n", namespace, "addr", "add", f"{host}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", namespace, "link", "set", "eth0", "up")

    @property
    def _bridge(self) -> str:
        return f"ff{self.number}"

    def _namespace(self, host: str) -> str:
        return f"ff{self.number}-{host.rpartition('.')[2]}"

    def _port(self, host: str) -> str:
        return f"ff{self.number}p{host.rpartition('.')[2]}"


def refusal() -> str | None:
    """Why this machine lets us make no hosts, or None if it does."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    try:
        with Hosts() as hosts:
            done = subprocess.run(
                [*hosts.on(hosts.head), "ip", "route", "get", hosts.worker], capture_output=True, text=True, check=False
            )
        return done.stderr.strip() or None
    except (OSError, subprocess.CalledProcessError) as error:
        return f"network namespaces are not permitted here: {getattr(error, 'stderr', '') or error}"


def _ip(*words: str, check: bool = True) -> None:
    subprocess.run(["ip", *words], capture_output=True, text=True, check=check)
