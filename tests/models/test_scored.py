# SPDX-License-Identifier: Apache-2.0
"""Checkpoints with scores, against the layers that released code runs, written naively."""

import math
import re

import pytest
import torch

from harprune.models import create_model, load_weights
from harprune.recipe import networks
from harprune.recipe.checks import check
from harprune.recipe.text import make_recipe

LAYERS = ("conv1", "linear", "layer2.0.shortcut.0")


def narrow(seed=0):
    torch.manual_seed(seed)
    return create_model("resnet18", 10, width=4)


def checkpoint(rates: bool) -> dict:
    """A state dict of the form, every prunable layer with scores, and rates for HARP."""
    model = narrow(seed=1)
    state = {f"module.{name}": t for name, t in model.state_dict().items()}
    for name, tensor in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and tensor.dim() > 1:
            state[f"module.{layer}.popup_scores"] = torch.randn_like(tensor)
            if rates:
                state[f"module.{layer}.k_score"] = 2 * torch.randn(())
    return {"state_dict": state, "epoch": 99}


def kept(scores: torch.Tensor, share: float) -> torch.Tensor:
    """The mask as the releases write it: sorted scores, of which the first become zero."""
    out = scores.abs().clone()
    _, order = out.flatten().sort()
    flat = out.flatten()
    flat[order[: int((1 - share) * scores.numel())]] = 0
    flat[order[int((1 - share) * scores.numel()) :]] = 1
    return flat.view_as(scores)


@pytest.mark.parametrize("rates", [False, True])
@pytest.mark.parametrize("density", [0.3, 0.01, 1.0])
def test_masks_are_those_of_the_released_layers(rates, density, tmp_path):
    content = checkpoint(rates)
    torch.save(content, tmp_path / "theirs.pth.tar")
    report = load_weights(model := narrow(), tmp_path / "theirs.pth.tar", density=density)
    assert report.complete
    state = content["state_dict"]
    for name, mine in model.state_dict().items():
        theirs = state[f"module.{name}"]
        scores = state.get(f"module.{name.removesuffix('.weight')}.popup_scores")
        if scores is not None and density < 1.0:
            rate = state.get(f"module.{name.removesuffix('.weight')}.k_score")
            least = 0.1 * density
            share = density if rate is None else torch.sigmoid(rate) * (1 - least) + least
            theirs = theirs * kept(scores, share)
        assert torch.equal(mine, theirs), name


def test_the_counts_of_hydra_are_exact(tmp_path):
    torch.save(checkpoint(rates=False), tmp_path / "hydra.pt")
    load_weights(model := narrow(), tmp_path / "hydra.pt", density=0.1)
    for layer in LAYERS:
        weight = model.get_submodule(layer).weight
        assert int((weight != 0).sum()) == math.ceil(0.1 * weight.numel() - 1e-9)


def test_scores_need_a_density_and_a_density_scores(tmp_path):
    torch.save(checkpoint(rates=True), tmp_path / "harp.pt")
    torch.save(narrow().state_dict(), tmp_path / "plain.pt")
    model = narrow(seed=3)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"holds scores beside weights.*model.weights_density"):
        load_weights(model, tmp_path / "harp.pt")
    with pytest.raises(ValueError, match=r"holds no scores that density 0.1 could apply to"):
        load_weights(model, tmp_path / "plain.pt", density=0.1)
    with pytest.raises(ValueError, match=re.escape("density 1.5 must lie in (0, 1]")):
        load_weights(model, tmp_path / "harp.pt", density=1.5)
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_scores_of_channels_are_refused(tmp_path):
    content = checkpoint(rates=True)
    content["state_dict"]["module.conv1.popup_scores"] = torch.randn(1, 3, 1, 1)
    torch.save(content, tmp_path / "channels.pt")
    with pytest.raises(ValueError, match=r"\[1, 3, 1, 1\] beside a weight of \[4, 3, 3, 3\]"):
        load_weights(narrow(), tmp_path / "channels.pt", density=0.1)


def test_a_recipe_names_the_density(tmp_path):
    torch.save(checkpoint(rates=False), tmp_path / "hydra.pt")
    weights = str(tmp_path / "hydra.pt")
    section = {"name": "resnet18", "width": 4, "weights": weights, "weights_density": 0.1}
    content = {"name": "theirs", "data": {"name": "digits"}, "model": section}
    recipe = make_recipe(content, [], source="test")
    check(recipe)
    load_weights(wanted := narrow(), weights, density=0.1)
    networks.load_network_weights(model := narrow(), weights, recipe.model.weights_density)
    assert all(torch.equal(t, wanted.state_dict()[n]) for n, t in model.state_dict().items())
    del content["model"]["weights"]
    with pytest.raises(ValueError, match=r"model\.weights_density = 0\.1 is about the scores"):
        check(make_recipe(content, [], source="test"))
