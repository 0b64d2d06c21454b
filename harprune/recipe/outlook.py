# SPDX-License-Identifier: Apache-2.0
"""What a run says of its network before hours are spent on it."""

from collections.abc import Iterator

import torch

from harprune.kernels import native
from harprune.recipe import pruning
from harprune.recipe.materials import Materials
from harprune.recipe.schema import Recipe
from harprune.sparsity.extraction import require_extractable
from harprune.sparsity.layers import prunable_layers
from harprune.sparsity.tracing import Untraceable, traced


def outlook(recipe: Recipe, materials: Materials, device: torch.device) -> Iterator[str]:
    """How much can be pruned, what stays dense unasked, what torch must run: a line each."""
    model, example = materials.network(), materials.example
    layers = pruning.budget(recipe, example).layers(model)
    prunable = sum(layer.size for layer in layers.values())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    place = f"{len(layers)} layers" if len(layers) > 1 else "one layer"
    yield f"network: {prunable:,} of {parameters:,} parameters to prune, in {place}"
    if recipe.budget.include is None:
        chosen = prunable_layers(model)
        every = prunable_layers(model, include=("*",))
        left = [layer for name, layer in every.items() if name not in chosen]
        if left:
            more = f" and {len(left) - 1} more" if len(left) > 1 else ""
            yield (
                f"note: {left[0].name}{more}, together {sum(layer.size for layer in left):,} "
                "parameters, are of no kind that is pruned unasked; budget.include can name them"
            )
    for key in pruning.without_effect(recipe):
        yield f"note: {key} has no effect with method.name = {recipe.method.name!r}"
    if recipe.prune.epochs:
        steps = len(materials.train) // recipe.prune.batch_size
        method = pruning.method(recipe)
        for option, what in method.beyond(recipe.prune.epochs, steps).items():
            yield f"note: method.{option} = {getattr(method, option)} {what}"
    backend = recipe.execution.backend
    if device.type == "cpu" and backend != "dense" and native.best() is None:
        yield (
            "note: the sparse kernels are not built, so torch runs pruned networks, at the cost of "
            "dense ones; `harprune doctor` says more"
        )
    untraceable = ""
    try:
        require_extractable(model, example)
    except Untraceable as error:
        untraceable = str(error)
        yield f"note: torch alone runs this network, and it cannot become an .hpn file: {error}"
    except ValueError as error:
        yield (
            "note: the sparse kernels cannot run this network whole, and it cannot become an .hpn "
            f"file: {error}"
        )
    try:
        traced(model.train())
    except Untraceable as error:
        if str(error) != untraceable:
            yield f"note: torch alone trains this network: {error}"
