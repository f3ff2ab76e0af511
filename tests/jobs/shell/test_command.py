"""Commands print data without markup, and leave out Ray's warning about its worker processes."""

from __future__ import annotations

import io
import subprocess
import sys

from rich.table import Table

from jobs.shell.command import console

TEXT = "img [/2019] x.png [a] :smile: [bold]"


def test_console_prints_brackets_of_data_as_they_are() -> None:
    out = console()
    out.file, out.width = io.StringIO(), 200
    table = Table(TEXT, title=TEXT)
    table.add_row(TEXT)
    out.print(TEXT)
    out.print(table)
    out.log(TEXT)
    assert out.file.getvalue().count(TEXT) == 5


_COMMAND = """
import click
from jobs.shell.command import with_errors

@click.command()
@with_errors
def command():
    import ray
    from ray._private.worker import print_to_stdstream
    for line in (
        "WARNING: 12 PYTHON worker processes have been started on node: c0 with address: 192.0.2.2, which is 6x ...",
        "a node has died",
    ):
        print_to_stdstream({"lines": [line], "pid": "raylet", "is_err": False}, ignore_prefix=False)

command()
"""


def test_command_hides_ray_s_warning_about_worker_processes_and_no_other_line() -> None:
    found = subprocess.run([sys.executable, "-c", _COMMAND], capture_output=True, text=True, check=True)
    assert "worker processes" not in found.stdout + found.stderr
    assert "a node has died" in found.stderr
