# SPDX-License-Identifier: Apache-2.0
"""A recipe's network, and the networks that runs, exports and others leave behind."""

import copy
from pathlib import Path

import torch
from torch import nn

from harprune.deploy import artifact
from harprune.deploy.module import Module
from harprune.deploy.network import Network
from harprune.models.registry import create_model, list_models
from harprune.models.weights import load_weights
from harprune.randomness import seeded
from harprune.recipe import schema
from harprune.training import checkpoint
from harprune.training.splits import Dataset


def build(section: schema.Model, dataset: Dataset, seed: int) -> nn.Module:
    """The plain network of a recipe, its initial weights a function of the seed."""
    if is_exported(section.name):
        raise ValueError(
            f"model.name = {section.name!r} is an exported network, pruned for good; "
            "`harprune evaluate` takes it, everything else its run"
        )
    require_no_folder(section.name)
    channels = dataset.train.images[torch.tensor([0])].shape[1]
    with seeded(seed, torch.device("cpu")):
        model = create_model(
            section.name,
            dataset.num_classes,
            in_channels=channels,
            width=section.width,
            mean=section.mean,
            std=section.std,
        )
    if section.weights is not None:
        load_network_weights(model, section.weights, section.weights_density)
    return model


def plain_copy(model: nn.Module) -> nn.Module:
    """The network of a caller, apart from it and in main memory.

    Raises:
        ValueError: it cannot be copied.
    """
    try:
        return copy.deepcopy(model).cpu()
    except RuntimeError as error:
        raise ValueError(
            f"the network cannot be copied ({error}); remove weight_norm or whatever else computes "
            "its weights from other tensors"
        ) from None


def require_no_folder(name: str) -> None:
    """Raises ValueError where a model's name is that of a folder, as a run has one."""
    if name not in list_models() and Path(name).is_dir():
        raise ValueError(
            f"model.name = {name!r} is a folder; give a run to `harprune evaluate` or `harprune "
            "export` by itself, without --model and --data"
        )


def is_exported(name: str) -> bool:
    """Whether a model's name is that of a file that `harprune export` made, or looks like one."""
    return Path(name).suffix.lower() == ".hpn" or artifact.recognised(name)


def exported(section: schema.Model) -> Network:
    """The network of an exported file, with weights and normalisation of its own.

    Raises:
        ValueError: the file is none, or the recipe says what the file says.
    """
    for name in ("width", "mean", "std", "weights"):
        if getattr(section, name) is not None:
            raise ValueError(
                f"model.{name} is given, but {section.name} holds a whole network; leave it out"
            )
    return artifact.load(section.name)


def in_torch(made: Network, name: str, dataset: Dataset) -> nn.Module:
    """An exported network, of the file `name`, for the images of `dataset`.

    Raises:
        ValueError: it takes other images, or names too few classes.
    """
    channels, height, width = dataset.test.images[torch.tensor([0])].shape[1:]
    if made.input_shape[0] != channels or made.output_shape[0] < dataset.num_classes:
        raise ValueError(
            f"{name} makes {made.output_shape[0]} logits of {made.input_shape[0]} channels, but "
            f"the data have {dataset.num_classes} classes and {channels} channels; "
            "name the data it was trained for"
        )
    try:
        return Module(made.resized(height, width)).eval()
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def load_network_weights(model: nn.Module, path: str, density: float | None = None) -> None:
    """Weights into a plain network: from a run's own file, or a checkpoint of others.

    Args:
        density: what a checkpoint that holds others' scores was pruned for.
    """
    if density is None and checkpoint.is_checkpoint(path):
        load_strictly(model, path)
    else:
        load_weights(model, path, density=density)


def load_strictly(model: nn.Module, path: str | Path) -> None:
    """The network in a run's own file into `model`, strictly.

    Raises:
        ValueError: a damaged file, or another network's.
    """
    state = checkpoint.unpack("model", checkpoint.load(path)[0])
    there = {name: tuple(t.shape) for name, t in state.items()}
    here = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    differing = sorted(n for n in there.keys() | here.keys() if there.get(n) != here.get(n))
    if differing:
        first = differing[0]
        raise ValueError(
            f"{path} does not fit the model in {len(differing)} tensors: {first} is "
            f"{there.get(first, 'absent')} in the file and {here.get(first, 'absent')} in the "
            "model; name the network, width, normalisation and data set it was trained with"
        )
    model.load_state_dict(state)
