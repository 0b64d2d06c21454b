# SPDX-License-Identifier: Apache-2.0
"""An open run: what all its stages work with, and how it is checked and opened."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning_fabric import Fabric
from torch import nn

from harprune.recipe import checks, networks, training
from harprune.recipe.materials import Materials, gather
from harprune.recipe.rehearsal import rehearse
from harprune.recipe.schema import Recipe
from harprune.reporting.records import STAGES
from harprune.run.console import Console
from harprune.run.folder import RunFolder, begun_in


@dataclass(frozen=True)
class Run:
    """What every stage works with: its folder, images and network, device and voice."""

    folder: RunFolder
    materials: Materials
    engine: Fabric
    console: Console

    @property
    def recipe(self) -> Recipe:
        return self.folder.recipe

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
        self.folder.warn(stage, text)


def check(
    recipe: Recipe,
    folder: str | Path,
    overrides: Sequence[str] = (),
    *,
    weights_follow: bool = False,
) -> None:
    """`checks.check`, and `checks.require_effect` but for a run that has begun in `folder`."""
    checks.check(recipe, weights_follow=weights_follow)
    if not begun_in(folder):
        checks.require_effect(recipe, overrides)


@contextmanager
def open_run(
    recipe: Recipe,
    folder: str | Path,
    materials: Materials | None = None,
    *,
    overrides: Sequence[str] = (),
    source: str = "",
    command: str = "",
    quiet: bool = False,
) -> Iterator[Run]:
    """A run, opened: recipe checked, device chosen, data loaded, fit rehearsed, then its folder.

    In this order, so that where one of them fails no folder is made.

    Args:
        folder, source, command: as of `RunFolder`.
        materials: those of the recipe when absent.
        overrides: what of the recipe came from the command line.
        quiet: say nothing on the screen; the log has it all the same.

    Raises:
        ValueError: what a recipe is refused for; data, weights or network that are missing or do
            not fit each other; and what `RunFolder` refuses.
    """
    check(recipe, folder, overrides)
    engine = training.fabric(recipe.execution)
    materials = gather(recipe) if materials is None else materials
    rehearse(recipe, materials)
    with RunFolder(folder, recipe, source=source, command=command) as held:
        held.require_same(materials.digests())
        log = held.path / "log.txt" if held.leader else None
        yield Run(held, materials, engine, Console(log, quiet=quiet or not held.leader))


def load_network(run: Run, stage: str) -> nn.Module:
    """The plain network that `stage` left, strictly loaded."""
    model = run.materials.network()
    networks.load_strictly(model, run.folder.network(stage))
    return model.to(run.engine.device)
