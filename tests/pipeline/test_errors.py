"""Errors that reach a user: what they say, which exit code they give, and that they survive a process border."""

from __future__ import annotations

import inspect
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from pipeline import errors
from pipeline.errors import FastfillError

EVERY = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, FastfillError)]
EXIT_CODES = {
    "FastfillError": 1,
    "ConfigError": 2,
    "DataError": 2,
    "TransientError": 1,
    "Refused": 3,
    "IncompatibleRun": 3,
    "SnapshotConflict": 3,
    "GateRefused": 3,
    "Removed": 3,
}


def an_error(kind: type[FastfillError]) -> FastfillError:
    return kind("it broke", expected=3, found=[1, 2], where="a/file", remedy="mend it")


def fail(kind: type[FastfillError]) -> None:
    raise an_error(kind)


def test_every_error_has_the_exit_code_that_the_design_gives_it() -> None:
    assert {kind.__name__: kind.exit_code for kind in EVERY} == EXIT_CODES


@pytest.mark.parametrize("kind", EVERY)
def test_a_message_says_what_was_expected_found_where_and_what_to_do(kind: type[FastfillError]) -> None:
    assert str(an_error(kind)).splitlines() == [
        "it broke",
        "  expected: 3",
        "  found: [1, 2]",
        "  where: a/file",
        "  what to do: mend it",
    ]


def test_message_leaves_out_parts_that_are_none_and_shows_false_and_zero() -> None:
    assert str(FastfillError("it broke")) == "it broke"
    assert str(FastfillError("it broke", expected=False, found=0)) == "it broke\n  expected: False\n  found: 0"


def test_message_of_several_files_lists_them() -> None:
    error = FastfillError("it broke", where=("a.parquet", "b.parquet"))
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == "it broke\n  where: a.parquet, b.parquet"  # noqa: S301 - our own bytes


@pytest.mark.parametrize("kind", EVERY)
def test_every_error_survives_pickling(kind: type[FastfillError]) -> None:
    again = pickle.loads(pickle.dumps(an_error(kind)))  # noqa: S301 - our own bytes
    assert type(again) is kind
    assert (str(again), again.summary, again.exit_code) == (str(an_error(kind)), "it broke", kind.exit_code)


def test_an_error_survives_pickling_twice_and_inside_another() -> None:
    inner = pickle.loads(pickle.dumps(an_error(errors.DataError)))  # noqa: S301 - our own bytes
    outer = pickle.loads(pickle.dumps(ValueError("around", inner)))  # noqa: S301 - our own bytes
    assert str(outer.args[1]) == str(an_error(errors.DataError))


def test_details_that_cannot_be_pickled_travel_as_their_text() -> None:
    class Local:
        """A class that no other process can find."""

    error = errors.ConfigError("it broke", expected="a module", found=Local, where=ValueError("somewhere"))
    assert str(pickle.loads(pickle.dumps(error))) == str(error)  # noqa: S301 - our own bytes


def test_an_error_crosses_to_another_process_as_it_was_raised() -> None:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool, pytest.raises(errors.GateRefused) as caught:
        pool.submit(fail, errors.GateRefused).result()
    assert str(caught.value) == str(an_error(errors.GateRefused))
