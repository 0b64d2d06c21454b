# SPDX-License-Identifier: Apache-2.0
"""Kinds of values that callers mix up, refused by name where they enter."""

from numbers import Integral
from typing import Any


def require_whole(name: str, value: Any, least: int | None = None) -> None:
    """Raises ValueError where `value` is no whole number, or one below `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} = {value!r} must be a whole number")
    if least is not None and value < least:
        raise ValueError(f"{name} = {value!r} must be at least {least}")


def require_text(name: str, value: Any, example: str) -> None:
    """Raises ValueError where `value` is no text, as `example` is."""
    if not isinstance(value, str):
        raise ValueError(f"{name} = {value!r} must be text, as {example!r}")
