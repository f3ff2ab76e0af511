"""The user's own functions, named `module:function` in the config: an encoder or a policy.

Modules in the working directory are found, also by Ray's workers, but installed modules come first. An error in the
user's code becomes a ConfigError that says where.
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
    "put the module into the folder where you start the command, or install it; on a cluster every node needs it: "
    "`ray job submit --working-dir .` sends the folder along"
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
        what: the owner of the function, for messages: "the policy".
        where: the setting.

    Raises:
        ConfigError: the function cannot be found, or its module cannot be imported.
    """
    module_name, _, function_name = name.partition(":")
    _search_working_directory()
    found = f"no module {module_name} in the Python path or in {os.getcwd()}"
    with own_code(f"{what}'s module cannot be imported", where):
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
                raise  # the module exists, but one that it imports does not
            raise ConfigError(f"{what}'s function cannot be found", found=found, where=where, remedy=_REMEDY) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        missing = f"no function {function_name} in {getattr(module, '__file__', module_name)}"
        raise ConfigError(f"{what}'s function cannot be found", found=missing, where=where)
    result: Callable[..., Any] = function
    return result


@contextmanager
def own_code(summary: str, where: str) -> Iterator[None]:
    """Run the user's code.

    Raises:
        ConfigError: the code raised an error or asked to exit; with the user's own lines.
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
            remedy="fix the function, and run the same command again",
        ) from error


def _own_lines(error: BaseException) -> str:
    """The user's own frames of a traceback, innermost first, without ours and those of installed packages."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not (frame.filename.startswith(_NOT_OWN) or "-packages" in frame.filename)]
    return ", from ".join(f"{frame.filename}, line {frame.lineno}" for frame in reversed(own or frames[-1:]))


def fingerprint(name: str) -> str | None:
    """The sha256 of the source file of a function's module, without its imports; None if there is no such file.

    The module is not executed.
    """
    _search_working_directory()
    try:
        spec = importlib.util.find_spec(name.partition(":")[0])
    except (ImportError, ValueError):
        return None  # loading the function gives the error
    if spec is None or not spec.has_location or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return objects.sha256(spec.origin)


def _search_working_directory() -> None:
    """Add the working directory at the end of the path, because a console script does not have it there."""
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.append(here)
    importlib.invalidate_caches()
