# SPDX-License-Identifier: Apache-2.0
"""What a user's code raises, in one line."""

import json

import pytest

from harprune.user_code import first_line, in_a_line, place_of


def test_codes_for_terminals_and_line_breaks_are_left_out():
    assert in_a_line(RuntimeError("\x1b[96mstep 1\x1b[0m\n  fails")) == "step 1 fails"
    assert in_a_line(AssertionError()) == "AssertionError"


def test_the_place_is_the_last_line_of_the_users():
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("{")
    assert "decoder.py" in place_of(caught.value)
    library = json.__file__.removesuffix("__init__.py")
    assert place_of(caught.value, beyond=(library,)) == f" in line 18 of {__file__}"
    assert place_of(ValueError()) == ""


def test_the_first_line_of_an_error_may_be_enough():
    assert first_line(RuntimeError("step 1\nfails")) == "step 1"
    assert first_line(AssertionError()) == "AssertionError"
    assert len(first_line(ValueError("x" * 1000))) == 160
