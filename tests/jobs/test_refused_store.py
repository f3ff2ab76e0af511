"""A store that cannot be used is refused with one message and exit code 2, before any input is read."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from jobs import backfill, export
from jobs.cli import main
from jobs.shell.progress_bars import Bars
from jobs.steps.prepare import open_run
from pipeline.config.load import load_config
from pipeline.errors import DataError
from pipeline.run import Run
from pipeline.serving.export import export as write_export
from pipeline.storage import objects
from pipeline.storage.s3_client import S3Client
from tests.support.galleries import write_config
from tests.support.seaweed import READONLY, SeaweedFS, s3_client
from tests.support.whole_run import WholeRun

CONFIG = str(Path(__file__).resolve().parents[2] / "jobs" / "configs" / "cifar100.yaml")
ENVIRONMENT = {
    "wrong secret": {"AWS_SECRET_ACCESS_KEY": "wrong"},
    "no credentials": {"AWS_SECRET_ACCESS_KEY": "", "AWS_ACCESS_KEY_ID": ""},
}


@pytest.fixture
def run_uri(
    request: pytest.FixtureRequest, seaweed: SeaweedFS, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """A run in a store of which something is wrong, named by the parameter."""
    case = request.param
    for name, value in (seaweed.environment(READONLY) if case == "read-only" else ENVIRONMENT.get(case, {})).items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name)
    monkeypatch.setenv("FASTFILL_STORAGE", "")
    objects._store.cache_clear()
    names = {"missing": f"s3://missing-{uuid.uuid4().hex}/run", "read-only": f"s3://{READONLY}/run"}
    yield names.get(case, f"{bucket}/run")
    objects._store.cache_clear()


@pytest.mark.parametrize("run_uri", ["wrong secret", "no credentials", "missing", "read-only"], indirect=True)
def test_open_run_in_a_refused_or_missing_bucket_is_a_data_error_with_the_uri(run_uri: str) -> None:
    config = load_config(CONFIG, (f"run={run_uri}", "data_root=/nowhere"))
    with pytest.raises(DataError, match=r"these credentials|bucket does not exist") as caught:
        open_run(config, Bars(Console(quiet=True)))
    assert caught.value.exit_code == 2
    assert run_uri in str(caught.value)


@pytest.mark.parametrize("command", ["status", "backfill"])
@pytest.mark.parametrize("run_uri", ["wrong secret", "no credentials"], indirect=True)
def test_command_on_a_run_with_refused_credentials_exits_2_with_the_uri(run_uri: str, command: str) -> None:
    result = CliRunner().invoke(main, [command, "--config", CONFIG, "--set", f"run={run_uri}"])
    assert result.exit_code == 2
    assert result.output.startswith("error: access is refused\n")
    assert run_uri in result.output
    assert "Traceback" not in result.output


SAID = {
    "wrong secret": "access is refused",
    "no credentials": "access is refused",
    "missing": "the bucket does not exist",
    "read-only": "the store does not let these credentials write here",
    "no conditions": "this store cannot hold a run: it ignores conditional writes",
}


def errors_of(result: Result) -> list[str]:
    """The lines of the error, which is all that may follow where the run is to be and where its metrics are."""
    lines = [line for line in result.stderr.splitlines() if line.strip() and not line.startswith("run: ")]
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.stdout == ""
    return lines


def put_without_condition(client: S3Client, name: str, data: bytes, **_: object) -> str:
    """A store that ignores conditions: signatures cover their headers, so nothing on the way could take them off."""
    return PUT(client, name, data)


PUT = S3Client.put


@pytest.mark.parametrize("run_uri", list(SAID), indirect=True)
def test_backfill_into_a_store_that_refuses_exits_2_before_any_work(
    run_uri: str,
    seaweed: SeaweedFS,
    bucket: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    case = request.node.callspec.params["run_uri"]
    if case == "no conditions":
        monkeypatch.setattr(S3Client, "put", put_without_condition)
    monkeypatch.setattr(backfill, "start_ray", lambda: None)  # nothing comes so far that it would need it
    admin = s3_client(seaweed.environment())
    names = [READONLY, bucket.removeprefix("s3://")]

    def objects() -> dict[str, set[str]]:
        return {
            name: {item["Key"] for item in admin.list_objects_v2(Bucket=name).get("Contents", [])} for name in names
        }

    before = objects()  # other tests of this process have the same read-only bucket
    config = write_config(tmp_path, run=run_uri, telemetry__port=0)
    result = CliRunner().invoke(main, ["backfill", "--config", config, "--json"])
    assert result.exit_code == 2
    error, *details = errors_of(result)
    assert error == f"error: {SAID[case]}"
    assert len(details) <= 4
    assert any(run_uri in line for line in details)
    buckets = {item["Name"] for item in admin.list_buckets()["Buckets"]}
    assert run_uri.split("/")[2] in buckets or case == "missing"
    assert not any(name.startswith("missing-") for name in buckets)
    assert objects() == before


@pytest.mark.parametrize("run_uri", ["missing"], indirect=True)
@pytest.mark.parametrize("words", [["status"], ["gc"], ["audit"], ["rollback"], ["promote"]])
def test_command_on_a_run_in_a_missing_bucket_names_the_bucket(run_uri: str, words: list[str], tmp_path: Path) -> None:
    result = CliRunner().invoke(main, [*words, "--config", CONFIG, "--set", f"run={run_uri}"])
    assert result.exit_code == 2
    assert errors_of(result)[0] == "error: the bucket does not exist"
    assert "NoSuchBucket" in result.stderr


@pytest.mark.parametrize("command", ["status", "gc", "audit"])
def test_command_on_a_missing_run_in_an_existing_bucket_names_the_run(bucket: str, command: str) -> None:
    result = CliRunner().invoke(main, [command, "--config", CONFIG, "--set", f"run={bucket}/run"])
    assert result.exit_code == 2
    assert errors_of(result)[0] == "error: there is no run here"
    with pytest.raises(FileNotFoundError):
        objects.read_bytes(f"{bucket}/run/run.json")


@pytest.mark.parametrize("run_uri", ["missing", "read-only"], indirect=True)
def test_manifest_into_a_missing_or_read_only_bucket_exits_2(
    run_uri: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    case = request.node.callspec.params["run_uri"]
    (tmp_path / "image.png").write_bytes(b"not looked at")
    result = CliRunner().invoke(main, ["manifest", str(tmp_path), "--to", run_uri, "--no-ray"])
    assert result.exit_code == 2
    error, *details = errors_of(result)
    assert error == f"error: {SAID[case]}"
    assert len(details) <= 4


@pytest.mark.parametrize("run_uri", ["missing"], indirect=True)
def test_manifest_of_sources_in_a_missing_bucket_exits_2(run_uri: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["manifest", run_uri, "--to", str(tmp_path / "to"), "--no-ray"])
    assert result.exit_code == 2
    assert "error: the bucket does not exist" in errors_of(result)


@pytest.mark.parametrize("run_uri", ["missing", "read-only"], indirect=True)
def test_export_into_a_missing_or_read_only_bucket_exits_2(
    run_uri: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = WholeRun(Run(str(tmp_path / "run"))).write_inputs()
    whole.publish(0)
    monkeypatch.setattr(export, "load", lambda *_: SimpleNamespace(run=whole.run.uri))  # a whole config needs encoders
    words = ["export", "--config", "run.yaml", "--format", "faiss", "--commit", "0", run_uri]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2
    error, *details = errors_of(result)
    assert error == f"error: {SAID[request.node.callspec.params['run_uri']]}"
    assert len(details) <= 4


def test_export_into_a_folder_with_a_leftover_capability_check_succeeds(bucket: str, tmp_path: Path) -> None:
    whole = WholeRun(Run(str(tmp_path / "run"))).write_inputs()
    whole.publish(0)
    objects.put(f"{bucket}/out/probe/0123", b"third")
    assert write_export(whole.run.uri, f"{bucket}/out", "faiss", commit=0)["commit"] == 0
