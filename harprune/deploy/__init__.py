# SPDX-License-Identifier: Apache-2.0
"""What a pruned network becomes: one small file, shrunk and run without torch."""
