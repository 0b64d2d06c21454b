# SPDX-License-Identifier: Apache-2.0
"""Tests of the reporting wing, on run folders made up for them."""
