# SPDX-License-Identifier: Apache-2.0
"""A recipe's images, split and known by digests, and its network: what a run is made from."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from harprune.recipe import networks, schema
from harprune.recipe.schema import Recipe
from harprune.robustness.identity import model_digest
from harprune.training.data import load_dataset
from harprune.training.folders import ImageFiles
from harprune.training.splits import Dataset, Split, split_validation, to_float


@dataclass(frozen=True)
class Materials:
    """The images and the network of a run.

    `network()` gives a fresh plain network. It is the dense one where it is `trained`; its weights
    are `drawn` where the recipe's seed alone decides them.
    """

    train: Split
    validation: Split
    test: Split | None
    num_classes: int | None
    network: Callable[[], nn.Module]
    trained: bool
    drawn: bool

    def digests(self) -> dict[str, str]:
        """SHA-256 of what a run is made from: images and, where it is not drawn, the network.

        Of images that stay in files, labels and names count, and the content of the first.
        """
        found = {
            "set of training images": _digest(self.train),
            "set of validation images": self.validation_digest,
        }
        if isinstance(self.train.images, ImageFiles):
            found["list of training image files"] = self.train.images.digest()
        return found if self.drawn else {**found, "dense network": model_digest(self.network())}

    @cached_property
    def validation_digest(self) -> str:
        return _digest(self.validation)

    @cached_property
    def example(self) -> Tensor:
        """One training image as a batch, float in [0, 1]."""
        return to_float(self.train.images[torch.tensor([0])])


def _digest(split: Split) -> str:
    digest = hashlib.sha256(split.labels.numpy().tobytes())
    if isinstance(split.images, Tensor):
        digest.update(split.images.contiguous().numpy().data)
    return digest.hexdigest()


def gather(recipe: Recipe) -> Materials:
    """Load the data of `recipe` and prepare its network."""
    dataset = load_data(recipe.data)
    train, validation = split_validation(dataset.train, recipe.data.validation, recipe.seed)
    weights = recipe.model.weights
    return Materials(
        train=train,
        validation=validation,
        test=dataset.test,
        num_classes=dataset.num_classes,
        network=lambda: networks.build(recipe.model, dataset, recipe.seed),
        trained=weights is not None,
        drawn=weights is None,
    )


def load_data(section: schema.Data) -> Dataset:
    """The data set of a recipe."""
    return load_dataset(section.name, section.folder, image_size=section.image_size)
