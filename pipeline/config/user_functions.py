"""Functions of the user's own, named `module:function` in the config: an encoder, a policy.

Guarantee: a module in the working directory is found by every command and by Ray's workers, whatever started
them; what goes wrong in the user's code is a ConfigError that says where. Modules that are installed come
first: a file of the user's never hides one of ours. It does not know what the functions are for.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, FastfillError
from pipeline.storage import objects

if TYPE_CHECKING:
    from collections.abc import Iterator

_REMEDY = (
    "put the module into the folder that the command is started in, or install it; on a cluster every node needs it: "
    "`ray job submit --working-dir .` takes the folder along"
)
_OURS = str(Path(__file__).resolve().parents[2])
_NOT_OWN = (
    "<",
    os.path.join(sysconfig.get_path("stdlib"), ""),
    *(os.path.join(_OURS, package, "") for package in ("pipeline", "training", "jobs")),
)


def load_function(name: str, what: str, where: str) -> Callable[..., Any]:  # Any: the user's own
    """The function that `module:function` names.

    Args:
        name: as in the config.
        what: whose function it is, for messages: "the policy".
        where: the setting.

    Raises:
        ConfigError: it cannot be found, or its module cannot be imported.
    """
    module_name, _, function_name = name.partition(":")
    _search_working_directory()
    found = f"no module {module_name} in the Python path or in {os.getcwd()}"
    with own_code(f"{what}'s module cannot be imported", where):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the module is there, and one that it imports is not
            raise ConfigError(f"{what}'s function cannot be found", found=found, where=where, remedy=_REMEDY) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        missing = f"no function {function_name} in {getattr(module, '__file__', module_name)}"
        raise ConfigError(f"{what}'s function cannot be found", found=missing, where=where)
    result: Callable[..., Any] = function
    return result


@contextmanager
def own_code(summary: str, where: str) -> Iterator[None]:
    """Run the user's code: whatever it raises becomes a ConfigError that names the user's own lines.

    Raises:
        ConfigError: the code raised something, or asked to exit.
    """
    try:
        yield
    except FastfillError:
        raise
    except (Exception, SystemExit) as error:  # the user's code may raise anything
        raise ConfigError(
            summary,
            found=f"{type(error).__name__}: {error} ({_own_lines(error)})",
            where=where,
            remedy="mend the function, and run the same command again",
        ) from error


def _own_lines(error: BaseException) -> str:
    """Where the user's code was: its frames from the outermost on, without ours and those of installed packages."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not (frame.filename.startswith(_NOT_OWN) or "-packages" in frame.filename)]
    return ", from ".join(f"{frame.filename}, line {frame.lineno}" for frame in reversed(own or frames[-1:]))


def fingerprint(name: str) -> str | None:
    """A sha256 of the source file of a function's module; None where there is none that can be found.

    The module itself is not run. What it imports is not looked at.
    """
    _search_working_directory()
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except (ImportError, ValueError):
        return None  # loading the function says what is wrong
    if spec is None or not spec.has_location or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return objects.sha256(spec.origin)


def _search_working_directory() -> None:
    """Behind all else: a console script starts with its own folder in the path, and not the working directory."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
