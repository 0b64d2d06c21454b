# SPDX-License-Identifier: Apache-2.0
"""Sparse weights times dense activations on a CPU: plain C behind a C interface, no torch."""

from typing import Literal

Backend = Literal["auto", "sparse", "dense"]
"""What runs masked networks on a CPU: these kernels where they are built and fit ("auto"), these
and no less ("sparse"), or torch alone ("dense")."""
