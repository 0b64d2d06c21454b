# SPDX-License-Identifier: Apache-2.0
"""Channels innermost, as on an accelerator: every method does there what it does here."""

import json

import pytest
import torch

from harprune.pipeline import machinery
from harprune.pipeline.pruning import METHODS
from harprune.pipeline.recipe_text import read_recipe
from harprune.pipeline.run import Run
from harprune.pipeline.stages import open_workshop, run_until
from harprune.training import checkpoint

SHORT = (
    "execution.backend=dense", "execution.threads=1", "pretrain.epochs=1", "prune.epochs=1",
    "finetune.epochs=1",
)  # fmt: skip


def innermost(model, engine):
    return model.to(engine.device, memory_format=torch.channels_last)


def finetuned(folder, recipe):
    with Run(folder, recipe, command="test") as run:
        run_until(open_workshop(run), "finetune")
    return checkpoint.load(folder / "finetuned.safetensors")[0]


@pytest.mark.parametrize(
    ("name", "granularity"),
    [(name, "weight") for name in (*METHODS, "harp+s2ap")]
    + [(name, "filter") for name in ("harp", "hydra", "magnitude", "random", "flying-bird")],
)
def test_the_layout_decides_nothing(name, granularity, here, monkeypatch):
    density = 0.2 if granularity == "weight" else 0.6
    settings = (
        *SHORT, f"method.name={name}", f"budget.granularity={granularity}",
        f"budget.density={density}",
    )  # fmt: skip
    recipe = read_recipe("tiny.toml", settings)
    usual = finetuned(here / "usual", recipe)
    monkeypatch.setattr(machinery, "placed", innermost)
    turned = finetuned(here / "turned", recipe)
    assert usual.keys() == turned.keys()
    for key, tensor in usual.items():
        torch.testing.assert_close(turned[key], tensor, rtol=1e-3, atol=1e-4, msg=key)
    kept, again = (json.loads((here / n / "audit.json").read_text()) for n in ("usual", "turned"))
    assert kept == again
