# SPDX-License-Identifier: Apache-2.0
"""A finished run as the source of a network: for a file to export, an evaluation, a race."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harprune.recipe.networks import is_exported
from harprune.recipe.schema import Recipe
from harprune.recipe.text import make_recipe, settings


@dataclass(frozen=True)
class Source:
    """The recipe of a network, which names its weights, and what is known of its making."""

    recipe: Recipe
    metadata: Mapping[str, Any]


def find_source(given: str | Path, overrides: Sequence[str] = ()) -> Source:
    """The network of a finished run folder, or of one of its files; see `make_recipe`.

    Raises:
        ValueError: neither of them, or a run without its finetuned network.
    """
    given = Path(given)
    if is_exported(str(given)):
        raise ValueError(
            f"{given} is an exported network, not a run; `harprune evaluate --model {given} "
            "--data DATA` takes it, everything else the run that it came from"
        )
    weights = given / "finetuned.safetensors" if given.is_dir() else given
    record = weights.parent / "recipe.json"
    if not weights.is_file() and given.is_dir() and record.is_file():
        raise ValueError(
            f"{given} holds no finetuned network yet; finish it with `harprune run`, or name one "
            "of its files"
        )
    if not weights.is_file() or not record.is_file():
        raise ValueError(
            f"{given} is neither a run folder nor a file of one; for other weights give --model "
            "and --data too"
        )
    text = record.read_bytes()
    # What the run began with were other weights, and perhaps others' scores.
    overrides = settings({"model.weights": str(weights)}, overrides)
    try:
        content = json.loads(text)
        content["model"]["weights_density"] = None
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{record} is damaged; restore it") from None
    recipe = make_recipe(content, overrides, source=str(record))
    return Source(recipe, _origin(recipe, text, weights))


def _origin(recipe: Recipe, text: bytes, weights: Path) -> dict[str, Any]:
    """Which recipe, commit, seed and file a network comes from, as far as the run knows."""
    try:
        environment = json.loads((weights.parent / "environment.json").read_bytes())
        commit = [environment, *environment.get("continued", [])][-1].get("commit")
    except (OSError, ValueError, AttributeError):
        commit = None
    return {
        "recipe": recipe.name,
        "recipe_sha256": hashlib.sha256(text).hexdigest(),
        "commit": commit,
        "seed": recipe.seed,
        "weights": weights.name,
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
