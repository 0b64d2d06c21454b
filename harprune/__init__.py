# SPDX-License-Identifier: Apache-2.0
"""Prune adversarially robust networks to 1 % of their weights, and prove that they stay robust.

The names below are the public face; each is imported from its wing on first use, so that
`import harprune` (and `harprune --help`) need not wait for torch, and `harprune.deploy` can do
without it.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "prune": "harprune.run.prune",
    "evaluate": "harprune.run.evaluate",
    "export": "harprune.delivery.export",
    "Format": "harprune.delivery.export",
    "Values": "harprune.deploy.artifact",
    "Pruned": "harprune.run.prune",
    "read_recipe": "harprune.recipe.text",
    "create_model": "harprune.models",
    "list_models": "harprune.models",
    "load_weights": "harprune.models",
    "load_dataset": "harprune.training.data",
    "split_validation": "harprune.training.splits",
    "Dataset": "harprune.training.splits",
    "Split": "harprune.training.splits",
    "Linf": "harprune.robustness.threat",
    "L2": "harprune.robustness.threat",
    "paired": "harprune.outcomes",
}

# Made of the table, which a type checker does not read.
__all__ = sorted([*_HOMES, "deploy"])  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "deploy":
        return import_module("harprune.deploy")
    if name == "__version__":
        return import_module("importlib.metadata").version("harprune")
    if name not in _HOMES:
        raise AttributeError(f"module 'harprune' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
