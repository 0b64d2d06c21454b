# SPDX-License-Identifier: Apache-2.0
"""Differences of nested values, leaf by leaf."""

from harprune.nested import differences, in_words


def test_each_leaf_that_differs_is_found_with_its_key():
    first = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": None}
    second = {"a": 1, "b": {"c": 4, "d": {"e": 3}}, "f": {"g": 5}}
    assert list(differences(first, second)) == [("b.c", 2, 4), ("f", None, {"g": 5})]
    assert not list(differences(first, first))


def test_what_one_lacks_is_none_there_leaf_by_leaf():
    assert list(differences({}, {"a": {"b": 1, "c": None}, "d": 2})) == [
        ("a.b", None, 1),
        ("d", None, 2),
    ]
    assert list(differences({"a": {"b": 1}}, {})) == [("a.b", 1, None)]


def test_three_are_put_into_words():
    found = [(key, 1, "x") for key in "abcd"]
    assert in_words(found[:2]) == "a: 1 -> 'x'; b: 1 -> 'x'"
    assert in_words(found) == "a: 1 -> 'x'; b: 1 -> 'x'; c: 1 -> 'x'; ..."
