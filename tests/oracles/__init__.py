# SPDX-License-Identifier: Apache-2.0
"""Slow literal twins of the papers' formulas."""
