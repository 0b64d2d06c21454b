# SPDX-License-Identifier: Apache-2.0
"""A value of the wrong kind or range, as pydantic reports it, in words for people."""

from collections.abc import Mapping
from typing import Any

_KINDS = {
    "bool": "must be true or false",
    "dict": "must be a section of keys",
    "finite": "must be a finite number",
    "float": "must be a number",
    "int": "must be a whole number",
    "list": 'must be a list, as [1, 2] or ["a", "b"]',
    "missing": "must be given",
    "string": "must be text, in quotes",
    "too": "must not be empty",
    "tuple": 'must be a list, as [1, 2] or ["a", "b"]',
}
"""What each kind of fault breaks, by the first word of its type."""


def rule_of(fault: Mapping[str, Any]) -> str:
    """The rule that a fault breaks: "must be a whole number"."""
    kind = fault["type"].partition("_")[0]
    message = fault["msg"].removeprefix("Value error, ").replace("Input should", "must")
    return _KINDS.get(kind) or message[:1].lower() + message[1:]


def value_of(fault: Mapping[str, Any]) -> str:
    """` = value`, shortened; nothing where none was given."""
    text = repr(fault["input"])
    short = text if len(text) <= 60 else f"{text[:57]}..."
    return "" if fault["type"] == "missing" else f" = {short}"
