# SPDX-License-Identifier: Apache-2.0
"""Networks of the field in plain PyTorch, by name, and the checkpoints of others."""

from harprune.models.registry import create_model, list_models
from harprune.models.weights import load_weights

__all__ = ["create_model", "list_models", "load_weights"]
