# SPDX-License-Identifier: Apache-2.0
"""Binds the wings: recipes, runs and their stages; the only folder that knows them all."""
