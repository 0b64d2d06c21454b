# SPDX-License-Identifier: Apache-2.0
"""What every stage of an open run works with: its folder, images, network, device and voice."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning_fabric import Fabric
from torch import nn

from harprune.recipe import checks, networks, training
from harprune.recipe.networks import Materials
from harprune.recipe.schema import Recipe
from harprune.reporting.records import STAGES
from harprune.run.console import Console
from harprune.run.folder import Run, begun_in


@dataclass(frozen=True)
class Workshop:
    """What every stage works with."""

    run: Run
    materials: Materials
    engine: Fabric
    console: Console

    @property
    def recipe(self) -> Recipe:
        return self.run.recipe

    @property
    def classes(self) -> int:
        """How many there are among the validation images."""
        return len(self.materials.validation.labels.unique())

    def seed(self, stage: str) -> int:
        """A seed of its own for each stage."""
        return self.recipe.seed * len(STAGES) + list(STAGES).index(stage)

    def warn(self, stage: str, text: str) -> None:
        """Say it, and keep it for the report."""
        self.console.say(f"warning: {text}")
        self.run.warn(stage, text)


def check(
    recipe: Recipe,
    folder: str | Path | None,
    overrides: Sequence[str] = (),
    *,
    weights_follow: bool = False,
) -> None:
    """Refuse what `checks` refuse; for a run that has begun in `folder` a value may be idle."""
    checks.check(recipe, weights_follow=weights_follow)
    if folder is None or not begun_in(folder):
        checks.require_effect(recipe, overrides)


@contextmanager
def open_workshop(
    recipe: Recipe, folder: str | Path, *, source: str = "", command: str = ""
) -> Iterator[Workshop]:
    """The workshop of a run: device chosen, processes joined, data loaded, then its folder opened.

    In this order, so that where one of them fails no folder is made. The arguments are `Run`'s.

    Raises:
        ValueError: data, weights or network that are missing or do not fit each other; and what
            `Run` refuses.
    """
    engine = training.fabric(recipe.execution)
    materials = networks.materials(recipe)
    checks.rehearse(recipe, materials)
    with Run(folder, recipe, source=source, command=command) as run:
        run.require_same(materials.digests())
        console = Console(run.folder / "log.txt" if run.leader else None, quiet=not run.leader)
        yield Workshop(run, materials, engine, console)


def load_network(shop: Workshop, stage: str) -> nn.Module:
    """The plain network that `stage` left, strictly loaded."""
    model = shop.materials.network()
    networks.load_strictly(model, shop.run.network(stage))
    return model.to(shop.engine.device)
