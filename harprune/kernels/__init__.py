# SPDX-License-Identifier: Apache-2.0
"""Sparse weights times dense activations on a CPU: plain C behind a C interface, no torch."""
