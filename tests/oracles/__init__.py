# SPDX-License-Identifier: Apache-2.0
"""Slow literal implementations of the papers' formulas."""
