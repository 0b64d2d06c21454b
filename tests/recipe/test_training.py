# SPDX-License-Identifier: Apache-2.0
"""What a recipe trains with: exact arithmetic, and no more threads than cores can bear."""

import pytest
import torch

from harprune.recipe import training
from harprune.recipe.text import make_recipe


def test_convolutions_on_an_accelerator_are_not_shortened(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    training.fabric(make_recipe({"execution": {"device": "cpu"}}).execution)
    assert not torch.backends.cudnn.allow_tf32


def test_threads_far_beyond_the_cores_are_refused():
    with pytest.raises(ValueError, match=r"execution\.threads = 100000 exceeds 4 for each of the"):
        training.fabric(make_recipe({"execution": {"threads": 100_000}}).execution)
