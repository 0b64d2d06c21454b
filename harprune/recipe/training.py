# SPDX-License-Identifier: Apache-2.0
"""Where a recipe trains: device and processes, batches, optimiser."""

import atexit
import gc
import os

import torch
from lightning_fabric import Fabric

from harprune.recipe import schema
from harprune.recipe.schema import Recipe
from harprune.training.augmentation import augmentation
from harprune.training.batches import Batches
from harprune.training.splits import Split

_MOST_OF_A_CORE = 4
"""Threads of a core, beyond which they only stand in each other's way."""


def fabric(section: schema.Execution) -> Fabric:
    """The engine: device, precision, and data-parallel processes under `torchrun`."""
    cores = os.cpu_count() or 1
    if section.threads is not None and section.threads > _MOST_OF_A_CORE * cores:
        raise ValueError(
            f"execution.threads = {section.threads} exceeds {_MOST_OF_A_CORE} for each of the "
            f"{cores} cores here; lower it"
        )
    if section.threads is not None:
        torch.set_num_threads(section.threads)
    if section.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "execution.device = 'cuda', but torch sees no GPU; `harprune doctor` says why"
        )
    # Convolutions as exact as products: torch shortens their factors to 10 bits where it may.
    torch.backends.cudnn.allow_tf32 = False
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    engine = Fabric(
        accelerator=section.device,
        devices=local,
        num_nodes=processes() // local,
        strategy="ddp" if processes() > 1 else "auto",
        precision=section.precision,
    )
    engine.launch()
    if processes() > 1:
        atexit.register(_part)
    return engine


def processes() -> int:
    """How many processes work at one run, as `torchrun` tells each of them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _part() -> None:
    """Leave the group of processes, and end its threads: a live one may abort the process."""
    if torch.distributed.is_initialized():
        gc.collect()  # wrappers that hold the group lie in cycles
        torch.distributed.destroy_process_group()


def batches(
    split: Split,
    recipe: Recipe,
    section: schema.Training,
    engine: Fabric,
    seed: int,
    *,
    shared: bool = True,
) -> Batches:
    """The training batches of a stage, shared among the processes or whole for each of them."""
    return Batches(
        split,
        section.batch_size,
        seed=seed,
        augment=augmentation(recipe.data.augmentation, recipe.data.name, split.shape[-1]),
        device=engine.device,
        rank=engine.global_rank if shared else 0,
        world=engine.world_size if shared else 1,
    )


def optimiser(groups: list[dict], section: schema.Training) -> torch.optim.Optimizer:
    """The optimiser of a stage over parameter groups, which may set their own weight decay."""
    if section.optimiser == "adamw":
        return torch.optim.AdamW(
            groups, lr=section.learning_rate, weight_decay=section.weight_decay
        )
    return torch.optim.SGD(
        groups,
        lr=section.learning_rate,
        momentum=section.momentum,
        weight_decay=section.weight_decay,
    )
