"""Tell Ray that this spot machine is about to be taken away, so that its work moves before it goes.

EC2 announces it two minutes ahead, in the machine's metadata; nothing in Ray looks there. Run it on each worker
beside `ray start`, it ends once the nodes of this machine are draining:

    nohup python infra/spot_notice.py >> /tmp/spot_notice.log 2>&1 &

It needs Python 3.11 and `ray` on the PATH, nothing else: not this project's packages. It finds the node's id and the
cluster's address in the raylet's command line. On Kubernetes it is not needed: a node that is drained ends its pods
by SIGTERM, and `ray start --block` drains itself then.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

TOKEN_SECONDS = 21_600
REQUEST_SECONDS = 2.0
MARGIN_SECONDS = 10  # of the two minutes, for Ray to act on its deadline before the machine is gone


@dataclass(frozen=True)
class Notice:
    """What is going to happen to this machine, and when."""

    action: str
    time: datetime

    def remaining_seconds(self, now: datetime) -> int:
        """Time that Ray may count on."""
        return max(0, int((self.time - now).total_seconds()) - MARGIN_SECONDS)


@dataclass(frozen=True)
class Node:
    """A raylet of this machine."""

    node_id: str
    address: str


class Metadata:
    """EC2's instance metadata, version 2: each request carries a token."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._token = ""

    def notice(self) -> Notice | None:
        """The notice, if there is one.

        Raises:
            OSError: the service does not answer, or refuses.
        """
        if not self._token:
            self._token = self._ask("PUT", "api/token", {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_SECONDS)})
        try:
            found = json.loads(
                self._ask("GET", "meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": self._token})
            )
        except urllib.error.HTTPError as error:
            if error.code == 404:  # the usual answer: nothing is going to happen
                return None
            self._token = ""  # 401: it has run out
            raise
        return Notice(found["action"], datetime.fromisoformat(found["time"]))

    def _ask(self, method: str, path: str, headers: dict[str, str]) -> str:
        request = urllib.request.Request(f"{self._url}/latest/{path}", method=method, headers=headers)
        with urllib.request.urlopen(request, timeout=REQUEST_SECONDS) as answer:
            text: str = answer.read().decode()
        return text


def local_nodes() -> list[Node]:
    """The raylets that run on this machine."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            words = (folder / "cmdline").read_text(errors="replace").split("\0") if folder.name.isdecimal() else [""]
        except OSError:
            continue  # it has just ended
        if Path(words[0]).name == "raylet":
            options = dict(word.lstrip("-").split("=", 1) for word in words[1:] if "=" in word)
            found.append(Node(options["node_id"], options["gcs-address"]))
    return found


def drain(node: Node, notice: Notice) -> bool:
    """Have Ray drain the node; False with a line in the log where it did not take the request."""
    seconds = notice.remaining_seconds(datetime.now(UTC))
    command = ["ray", "drain-node", "--address", node.address, "--node-id", node.node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", f"spot: {notice.action}"]
    done = subprocess.run(
        [*command, "--deadline-remaining-seconds", str(seconds)], capture_output=True, text=True, check=False
    )
    _say(f"node {node.node_id}: {'draining' if done.returncode == 0 else done.stderr.strip()}, {seconds} s left")
    return done.returncode == 0


def watch(metadata: Metadata, poll_seconds: float) -> None:
    """Return once a notice has come and all nodes of this machine drain, or its time is up."""
    silent = False
    while True:
        try:
            notice = metadata.notice()
            if silent:
                _say("the metadata service answers again")
            silent = False
        except OSError as error:
            notice = None
            if not silent:
                _say(f"the metadata service does not answer, trying on: {error}")
            silent = True
        if notice is not None:
            _say(f"{notice.action} at {notice.time.isoformat()}")
            break
        time.sleep(poll_seconds)
    nodes = local_nodes()
    while nodes and datetime.now(UTC) < notice.time:
        nodes = [node for node in nodes if not drain(node, notice)]
        if nodes:
            time.sleep(1.0)


def _say(text: str) -> None:
    print(f"{datetime.now(UTC).isoformat(timespec='seconds')} {text}", flush=True)


def main() -> None:
    """Watch until the notice comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--metadata", default="http://169.254.169.254", help="the metadata service's address")
    parser.add_argument("--poll-seconds", type=float, default=5.0, help="time between two looks")
    arguments = parser.parse_args()
    watch(Metadata(arguments.metadata), arguments.poll_seconds)


if __name__ == "__main__":
    main()
