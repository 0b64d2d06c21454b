# SPDX-License-Identifier: Apache-2.0
"""`module:function` of the user: found from the current directory, called with what it takes."""

import importlib
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def current_directory_importable() -> Iterator[None]:
    """The current directory comes first among the places modules are imported from."""
    here = os.getcwd()
    sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(here)


def user_function(name: str, what: str) -> Callable[..., Any]:
    """The function that "module:function" names; `what` it is for goes into the errors.

    Raises:
        ValueError: not of that form, no such module, or no such function in it.
    """
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name):
        raise ValueError(f"{what} {name!r} is not of the form module:function")
    if module_name.endswith(".py") or os.sep in module_name or module_name.startswith("."):
        stem = os.path.basename(module_name).removesuffix(".py")
        raise ValueError(
            f"{what} {name!r} names a file where a module belongs; go to its folder and write "
            f"{stem}:{function_name}"
        )
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"{what} {name!r}: cannot import {module_name!r} from {os.getcwd()} or the installed "
            f"packages ({error})"
        ) from error
    except Exception as error:  # whatever the user's module does when it is imported
        raise ValueError(
            f"{what} {name!r}: importing {module_name} fails{_in_short(error)}"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise ValueError(f"{what} {name!r}: {module_name} defines no function {function_name!r}")
    return function


def called(name: str, function: Callable[..., Any], arguments: Mapping[str, Any]) -> Any:
    """What a user's function, called `name`, makes of the arguments.

    Raises:
        ValueError: its own, or whatever else it raises, in one line with the place.
    """
    try:
        return function(**arguments)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"{name} fails{_in_short(error)}") from error


def _in_short(error: Exception) -> str:
    """Where an error was raised and what it says, in one line."""
    return f"{place_of(error)} ({type(error).__name__}: {in_a_line(error)})"


def place_of(error: Exception, beyond: tuple[str, ...] = ()) -> str:
    """Where an error was raised, as " in line N of FILE"; empty if in no file of the user's.

    Files whose paths begin with one of `beyond` are not the user's.
    """
    if isinstance(error, SyntaxError):
        return f" in line {error.lineno} of {error.filename}"
    calls = traceback.extract_tb(error.__traceback__)
    of_the_user = [call for call in calls if not call.filename.startswith(beyond)]
    return f" in line {of_the_user[-1].lineno} of {of_the_user[-1].filename}" if of_the_user else ""


def in_a_line(error: Exception | str) -> str:
    """What an error says, without line breaks and the codes that colour a terminal."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", str(error))
    return " ".join(text.split()) or type(error).__name__


def first_line(error: Exception) -> str:
    """The first line of what an error says, at most 160 characters, or its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0][:160]


def accepted(function: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the `offered` arguments that the function's signature takes."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(offered)
    return {key: value for key, value in offered.items() if key in parameters}
