# SPDX-License-Identifier: Apache-2.0
"""The header of a saved network as JSON of which nothing is taken on trust."""

import json
from typing import Any

DEEPEST = 100
"""Objects and lists inside each other."""
LARGEST_ORDER = 308
"""Powers of ten that numbers stay below."""
_MISSING = object()


def parse(text: str) -> Any:
    """The header as JSON; ValueError where it holds what a reader of it need not understand."""
    found = json.loads(
        text,
        object_pairs_hook=_once,
        parse_constant=_refuse,
        parse_int=_whole,
        parse_float=_real,
    )
    level, depth = [found], 0
    while level := [v for v in level if isinstance(v, dict | list)]:
        depth += 1
        if depth > DEEPEST:
            raise ValueError(f"its header is nested deeper than {DEEPEST}")
        level = [v for held in level for v in (held.values() if isinstance(held, dict) else held)]
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a field stands twice in one object of its header")
    return found


def _refuse(word: str) -> None:
    raise ValueError(f"{word} in its header is no JSON")


def _whole(digits: str) -> int:
    if len(digits) > 20 or abs(int(digits)) >= 2**63:
        raise ValueError(f"a number of its header, {digits[:24]}, is too large")
    return int(digits)


def _real(digits: str) -> float:
    mantissa, _, exponent = digits.lower().partition("e")
    whole, _, _ = mantissa.lstrip("-").partition(".")
    figures = mantissa.replace("-", "").replace(".", "")
    first = len(figures) - len(figures.lstrip("0"))  # that is not zero
    power = int(exponent.lstrip("+-").lstrip("0")[:13] or 0)  # no header makes up for more
    order = len(whole) - 1 - first + (-power if exponent.startswith("-") else power)
    if first < len(figures) and order >= LARGEST_ORDER:
        raise ValueError(f"a number of its header, {digits[:24]}, is too large")
    return float(digits)


class Fields:
    """One object of the header: each field is read once, with its type and range."""

    def __init__(self, value: Any, what: str):
        if not isinstance(value, dict):
            raise ValueError(f"{what} is no JSON object")
        self._left, self.what = dict(value), what

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def take(self, name: str, kind: type, default: Any = _MISSING) -> Any:
        value = self._left.pop(name, default)
        if type(value) is not kind and (value is not default or default is _MISSING):
            raise ValueError(f"field {name!r} of {self.what} is missing or not of type {kind}")
        return value

    def integer(self, name: str, least: int, most: int, default: Any = _MISSING) -> int:
        return self._within(name, self.take(name, int, default), least, most)

    def integers(
        self, name: str, count: int | None, least: int, most: int, default: Any = _MISSING
    ) -> tuple[int, ...]:
        found = self.take(name, list, default)
        if count is not None and len(found) != count:
            raise ValueError(f"field {name!r} of {self.what} has {len(found)} numbers, not {count}")
        return tuple(self._within(name, number, least, most) for number in found)

    def pair(self, name: str, least: int, most: int, default: Any = _MISSING) -> tuple[int, int]:
        first, second = self.integers(name, 2, least, most, default)
        return first, second

    def section(self, name: str) -> tuple[int, int]:
        return self.pair(name, 0, 2**63 - 1)

    def section_of_halves(self, name: str, exponents: tuple[int, int]) -> tuple[tuple, int]:
        """Its place, and the exponent that stands behind it, between `exponents`."""
        found = self.integers(name, 3, -(2**63), 2**63 - 1)
        self._within(name, min(found[:2]), 0, 2**63 - 1)
        return found[:2], self._within(name, found[2], *exponents)

    def finish(self) -> None:
        if self._left:
            raise ValueError(f"unknown field {min(self._left)!r} in {self.what}")

    def _within(self, name: str, number: Any, least: int, most: int) -> int:
        if type(number) is not int or not least <= number <= most:
            raise ValueError(
                f"field {name!r} of {self.what} must be a whole number from {least} to {most}"
            )
        return number
