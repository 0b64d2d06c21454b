# SPDX-License-Identifier: Apache-2.0
"""Networks of the field in plain PyTorch, by name, and the checkpoints of others."""

from harprune.models.normalised import Normalised
from harprune.models.registry import create_model, list_models
from harprune.models.weights import WeightsReport, load_weights, read_checkpoint

__all__ = [
    "Normalised",
    "WeightsReport",
    "create_model",
    "list_models",
    "load_weights",
    "read_checkpoint",
]
