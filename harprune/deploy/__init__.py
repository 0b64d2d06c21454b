# SPDX-License-Identifier: Apache-2.0
"""What a pruned network becomes: one small file, shrunk and run without torch."""

from harprune.deploy.runtime import Engine, load

__all__ = ["Engine", "load"]
