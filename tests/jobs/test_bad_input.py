"""Bad input over all commands: no traceback, the right exit code, and one clear message. No Ray, no encoder."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from click.testing import CliRunner, Result

from jobs.cli import main
from tests.support.synthetic_run import known, make_run

ROOT = Path(__file__).resolve().parents[2]
READING = {  # commands that read a run, with the arguments that each of them needs
    "status": (),
    "search": ("queries.npy",),
    "evaluate": (),
    "promote": (),
    "rollback": (),
    "audit": (),
    "export": ("out", "--format", "parquet"),
    "gc": (),
}
WITH_CONFIG = READING | {"fit": (), "plan": (), "backfill": ()}
CASES = [(name, arguments) for name, arguments in WITH_CONFIG.items()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run, with its config `run.yaml`."""
    folder = tmp_path_factory.mktemp("made")
    config, _ = make_run(folder / "run", known(120))
    (folder / "run.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    np.save(folder / "queries.npy", np.zeros((2, 16), np.float32))
    return folder


@pytest.fixture
def at_run(made: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, as the working directory."""
    monkeypatch.chdir(made)
    return made


def call(name: str, *arguments: str) -> Result:
    return CliRunner().invoke(main, [name, *arguments])


def check(result: Result, code: int, said: str = "") -> None:
    """One message, of some lines, and nothing on stdout."""
    assert isinstance(result.exception, SystemExit), result.exception
    assert "Traceback" not in result.stderr
    assert "this is a bug" not in result.stderr, result.stderr
    assert result.exit_code == code, result.stderr
    assert len(re.findall("^error: |^Error: ", result.stderr, re.MULTILINE)) == 1, result.stderr
    assert re.search(said, result.stderr), result.stderr
    assert result.stdout == ""


CONFIGS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a mapping"),
    "binary": (bytes(range(256)), "not valid YAML"),
    "utf-16 without a mark": ("run: x".encode("utf-16-le"), "not valid YAML"),
    "latin-1": ("run: /h\u00f6me".encode("latin-1"), "not valid YAML"),
    "a date that is none": (b"run: 2026-13-45", "not valid YAML"),
    "a date": (b"run: 2026-12-24", "run: Input should be a valid string"),
    "brackets": (b"run: " + b"[" * 5000, "too many levels"),
    "a huge number": (b"run: x\nseed: " + b"9" * 6000, "not valid YAML"),
    "an integer too large": (b"run: x\nseed: 18446744073709551616", "seed: "),
    "NaN": (b"run: x\nfit: {lr: .nan}", r"fit\.lr: "),
    "infinity": (b"run: x\nstorage: {retry_seconds: .inf}", r"storage\.retry_seconds: "),
    "an unknown key": (b"rum: x", "rum: unknown key; did you mean 'run'"),
    "a list": (b"[1, 2]", "not a mapping"),
    "a scalar": (b"run", "not a mapping"),
    "keys that are numbers": (b"1: 2", "problem"),
    "wrong types": (b"run: 1\nencoders: []\ngallery: {manifest: {}}\npairs: x", "problem"),
    "an object of Python": (b"!!python/object/apply:os.getcwd []", "not valid YAML"),
    "a key twice nested": (b"encoders: &a {new: *a}", "problem"),
    "a secret": (b"run: s3://USER:SECRET@bucket/x", "a URL must not hold a user or password"),
}


@pytest.mark.parametrize(
    ("name", "case"), [*((name, "binary") for name in WITH_CONFIG), *(("status", case) for case in CONFIGS)]
)
def test_each_command_with_a_config_that_cannot_be_used_exits_2(name: str, case: str, tmp_path: Path) -> None:
    (content, said), arguments = CONFIGS[case], WITH_CONFIG[name]
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    result = call(name, *arguments, "--config", str(path))
    check(result, 2, said)
    assert "SECRET" not in result.stderr


@pytest.mark.parametrize("place", ["missing.yaml", ".", "file/run.yaml", "n" * 300, "loop", "http://host/run.yaml"])
@pytest.mark.parametrize(("name", "arguments"), CASES, ids=WITH_CONFIG)
def test_each_command_with_a_config_that_cannot_be_read_exits_2(
    name: str, arguments: tuple[str, ...], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to("loop")
    check(call(name, *arguments, "--config", place), 2)


@pytest.mark.parametrize(
    "setting", ["x", "=1", "run.a=1", "seed=[", "seed=2026-13-45", "fit.lr=.nan", "a.b.c=1", "run="]
)
@pytest.mark.parametrize(("name", "arguments"), CASES, ids=WITH_CONFIG)
def test_each_command_with_an_override_that_cannot_be_used_exits_2(
    name: str, arguments: tuple[str, ...], setting: str, at_run: Path
) -> None:
    check(call(name, *arguments, "--config", "run.yaml", "--set", setting), 2)


RUNS: dict[str, Callable[[Path], object]] = {
    "missing": lambda place: None,
    "a file": lambda place: place.write_text("x"),
    "an empty folder": lambda place: place.mkdir(),
    "run.json is a folder": lambda place: (place / "run.json").mkdir(parents=True),
    "a link to itself": lambda place: place.symlink_to(place),
}


@pytest.mark.parametrize("case", RUNS)
@pytest.mark.parametrize(("name", "arguments"), READING.items(), ids=READING)
def test_each_reading_command_without_a_run_exits_2_and_names_it(
    name: str, arguments: tuple[str, ...], case: str, at_run: Path, tmp_path: Path
) -> None:
    place = tmp_path / "here"
    RUNS[case](place)
    check(call(name, *arguments, "--config", "run.yaml", "--set", f"run={place}"), 2, f"where: {place}")


@pytest.mark.parametrize(("name", "arguments"), READING.items(), ids=READING)
def test_each_reading_command_with_a_run_path_of_too_many_characters_exits_2(
    name: str, arguments: tuple[str, ...], at_run: Path
) -> None:
    check(call(name, *arguments, "--config", "run.yaml", "--set", f"run=/{'n' * 300}"), 2, "too long")


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        (2, "plan --measure nan"),
        (2, "plan --measure inf"),
        (2, "plan --measure -1"),
        (2, "plan --measure x"),
        (2, "gc --grace nan"),
        (2, "gc --grace inf"),
        (2, "gc --keep 0"),
        (2, f"gc --keep {'9' * 5000}"),
        (2, "search queries.npy -k 0"),
        (2, "search queries.npy -k 2.5"),
        (2, "search queries.npy --limit 0"),
        (2, "search queries.npy --tag ../../run"),
        (2, "search queries.npy --tag a/b"),
        (2, "search queries.npy --tag nosuch"),
        (2, "search queries.npy --commit 77"),
        (2, "search queries.npy --commit -1"),
        (2, f"search queries.npy --commit {10**30}"),
        (2, "search"),
        (2, "search a.npy b.npy"),
        (2, "export out --format xml"),
        (2, "export out --format faiss --tag ../../run"),
        (2, "export out --format faiss --commit 77"),
        (2, f"export out --format faiss --commit {10**30}"),
        (2, "export s3://USER:SECRET@bucket/out --format faiss"),
        (2, "export queries.npy --format faiss"),
        (2, "export queries.npy/below --format faiss"),
        (2, "evaluate --commit 77"),
        (2, f"evaluate --commit {10**30}"),
        (2, "promote --commit 77"),
        (2, "promote --commit -1"),
        (3, "rollback --to 77"),
        (2, "rollback --to x"),
        (2, "backfill --stop-when nonsense"),
        (2, "backfill --stop-when hours>=nan"),
        (2, "status --nosuch"),
    ],
)
def test_command_with_an_invalid_option_exits_with_its_code_and_shows_no_secret(
    code: int, arguments: str, at_run: Path
) -> None:
    result = call(*arguments.split(), "--config", "run.yaml")
    check(result, code)
    assert "SECRET" not in result.stderr


def test_promote_of_the_commit_that_prod_serves_says_so(at_run: Path) -> None:
    assert call("promote", "--config", "run.yaml", "--force").exit_code == 0
    result = call("promote", "--config", "run.yaml", "--force")
    assert result.exit_code == 0
    assert re.search(r"prod already serves commit \d+", result.stderr)


def array(value: Any, **options: Any) -> bytes:
    sink = io.BytesIO()
    np.save(sink, value, **options)
    return sink.getvalue()


def archive() -> bytes:
    sink = io.BytesIO()
    np.savez(sink, np.zeros((2, 16)))
    return sink.getvalue()


def table(**columns: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def twice() -> bytes:
    sink = io.BytesIO()
    vectors = pa.array([[0.0] * 16], pa.list_(pa.float32(), 16))
    pq.write_table(pa.Table.from_arrays([vectors, vectors], names=["v", "v"]), sink)
    return sink.getvalue()


HUGE = b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (9223372036854775807, 16), }"
LARGE = HUGE.replace(b"9223372036854775807", b"2000000000000")  # 116 TiB: more than memory has
QUERIES: dict[str, tuple[str, bytes]] = {
    "no dimension": ("q.npy", array(np.float32(3))),
    "one dimension": ("q.npy", array(np.zeros(16, np.float32))),
    "three dimensions": ("q.npy", array(np.zeros((1, 2, 16), np.float32))),
    "another width": ("q.npy", array(np.zeros((2, 5), np.float32))),
    "no width": ("q.npy", array(np.zeros((2, 0), np.float32))),
    "NaN": ("q.npy", array(np.full((2, 16), np.nan, np.float32))),
    "texts": ("q.npy", array(np.full((2, 16), "a"))),
    "complex": ("q.npy", array(np.zeros((2, 16), np.complex64))),
    "fields": ("q.npy", array(np.zeros((2, 16), [("a", "f4")]))),
    "objects": ("q.npy", array(np.array([[{}]]), allow_pickle=True)),
    "an archive of arrays": ("q.npy", archive()),
    "a huge shape": ("q.npy", HUGE.ljust(127) + b"\n"),
    "a shape that no memory holds": ("q.npy", LARGE.ljust(127) + b"\n"),
    "half": ("q.npy", array(np.zeros((2, 16), np.float32))[:150]),
    "empty": ("q.npy", b""),
    "text": ("q.npy", b"hello"),
    "a broken zip": ("q.npy", b"PK\x03\x04 and so on"),
    "empty Parquet": ("q.parquet", b""),
    "no Parquet": ("q.parquet", b"PAR1 hello PAR1"),
    "no such column": ("q.parquet", table(w=[1.0])),
    "numbers": ("q.parquet", table(v=[1.0])),
    "nulls": ("q.parquet", table(v=pa.array([None, [0.0] * 16], pa.list_(pa.float32(), 16)))),
    "ragged": ("q.parquet", table(v=[[1.0], [1.0, 2.0]])),
    "two columns of the name": ("q.parquet", twice()),
}


@pytest.mark.parametrize("case", QUERIES)
def test_search_with_files_that_are_no_queries_exits_2(case: str, at_run: Path, tmp_path: Path) -> None:
    name, content = QUERIES[case]
    (tmp_path / name).write_bytes(content)
    column = ["--column", "v"] if name.endswith("parquet") else []
    check(call("search", str(tmp_path / name), *column, "--config", "run.yaml"), 2)


@pytest.mark.parametrize("query", ["nowhere.npy", "nowhere.parquet", "nowhere.png", "folder.npy", "x" * 300 + ".npy"])
def test_search_with_queries_that_cannot_be_read_exits_2(query: str, at_run: Path, tmp_path: Path) -> None:
    (tmp_path / "folder.npy").mkdir()
    check(call("search", str(tmp_path / query), "--config", "run.yaml"), 2)


SOURCES: dict[str, tuple[str, bytes]] = {
    "empty tar": ("a.tar", b""),
    "no tar": ("a.tar", b"hello" * 1000),
    "no Parquet": ("a.parquet", b"PAR1 hello PAR1"),
    "no uri column": ("a.parquet", table(w=[1.0])),
    "uris that are numbers": ("a.parquet", table(uri=[1.0])),
    "a CSV in another encoding": ("a.csv", "uri\n/h\u00f6me/a.png\n".encode("utf-16")),
    "a binary CSV": ("a.csv", bytes(range(256))),
    "empty CSV": ("a.csv", b""),
    "two columns of one name": ("a.csv", b"uri,x,x\n/a.png,1,2\n"),
    "another kind": ("a.zip", b"PK"),
}


@pytest.mark.parametrize("case", SOURCES)
def test_manifest_of_a_source_that_cannot_be_used_exits_2(case: str, tmp_path: Path) -> None:
    name, content = SOURCES[case]
    (tmp_path / name).write_bytes(content)
    check(call("manifest", str(tmp_path / name), "--to", str(tmp_path / "to"), "--no-ray"), 2, re.escape(name))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere"),
        (["nowhere.tar"], "nowhere"),
        (["s3://USER:SECRET@bucket/a"], "user or password"),
        (["http://host/a.tar"], "http://"),
        (["empty"], "empty"),
        (["n" * 300], "n{300}"),
        ([".", "--to", "file"], "file"),
        ([".", "--to", "file/below"], "file"),
        ([".", "--json", "--print-config"], "both print on stdout"),
        ([".", "--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_manifest_with_arguments_that_cannot_be_used_exits_2(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    result = call("manifest", *arguments, *([] if "--to" in arguments else ["--to", "to"]), "--no-ray")
    check(result, 2, said)
    assert "SECRET" not in result.stderr


@pytest.mark.parametrize("place", ["file", "file/below", "n" * 300])
def test_demo_in_a_folder_that_cannot_be_made_exits_2(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("x")
    check(call("demo", "--folder", place), 2, place)


@pytest.mark.parametrize("name", ["status", "audit", "search"])
def test_a_command_whose_result_cannot_be_written_exits_1_with_one_message(name: str, at_run: Path) -> None:
    command = [sys.executable, "-m", "jobs.cli", name, *READING[name], "--config", "run.yaml", "--json"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            command, cwd=at_run, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert result.returncode == 1
    assert result.stderr.startswith("error: the result cannot be written\n")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["status", "search", "promote", "export", "gc"])
def test_the_same_commands_with_good_input_exit_0(name: str, at_run: Path) -> None:
    result = call(name, *READING[name], "--config", "run.yaml")
    assert result.exit_code == 0, result.stderr
