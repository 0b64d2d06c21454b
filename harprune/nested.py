# SPDX-License-Identifier: Apache-2.0
"""Nested values, as a recipe holds them, compared leaf by leaf."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

Difference = tuple[str, Any, Any]
"""A dotted key, and its values in the first and in the second of two nested values."""


def differences(
    first: Mapping[str, Any], second: Mapping[str, Any], prefix: str = ""
) -> Iterator[Difference]:
    """Each leaf in which the two differ; one that is absent counts as None."""
    for key in sorted({*first, *second}):
        a, b = first.get(key), second.get(key)
        a = {} if key not in first and isinstance(b, Mapping) else a
        b = {} if key not in second and isinstance(a, Mapping) else b
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b


def in_words(found: Iterable[Difference]) -> str:
    """`key: old -> new` of the first three differences, and whether there are more."""
    said = [f"{key}: {old!r} -> {new!r}" for key, old, new in found]
    return "; ".join([*said[:3], *(["..."] if len(said) > 3 else [])])
