# SPDX-License-Identifier: Apache-2.0
"""What to prune: one file per paper, on the interface in `base`."""
