# SPDX-License-Identifier: Apache-2.0
"""What a run says before it begins: counts against the tensors, a note only where it is true."""

import pytest
import torch
from torch import nn

from harprune.kernels import native
from harprune.recipe.materials import Materials
from harprune.recipe.outlook import outlook
from harprune.recipe.text import make_recipe
from harprune.training.splits import from_arrays

IMAGES = from_arrays(torch.rand(4, 1, 8, 8), torch.arange(4) % 2)


class Recurrent(nn.Module):
    """Rows of an image, one after another."""

    def __init__(self):
        super().__init__()
        self.rows = nn.LSTM(8, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, x):
        return self.head(self.rows(x.squeeze(1))[0][:, -1])


def small() -> nn.Module:
    layers = (nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(108, 2))
    return nn.Sequential(*layers)


def lines(network, device: str = "cpu", **content) -> list[str]:
    materials = Materials(IMAGES, IMAGES, None, 2, network, trained=False, drawn=False)
    return list(outlook(make_recipe(content), materials, torch.device(device)))


def test_a_network_for_the_kernels_is_counted_and_no_more():
    assert lines(small) == ["network: 243 of 254 parameters to prune, in 2 layers"]
    left_out = lines(small, budget={"exclude": ["0"]})
    assert left_out == ["network: 216 of 254 parameters to prune, in one layer"]


def test_weights_that_are_not_pruned_unasked_are_named():
    said = lines(Recurrent)
    assert said[0] == "network: 10 of 312 parameters to prune, in one layer"
    assert said[1] == (
        "note: rows.weight_hh_l0 and 1 more, together 260 parameters, are of no kind that is "
        "pruned unasked; budget.include can name them"
    )
    asked = lines(Recurrent, budget={"include": ["rows.weight*", "head"]})
    assert asked[0] == "network: 270 of 312 parameters to prune, in 3 layers"
    assert not any("unasked" in line for line in asked)


def test_what_the_kernels_cannot_run_is_named():
    def with_sigmoid() -> nn.Module:
        return nn.Sequential(*small(), nn.Sigmoid())

    (_, note) = lines(with_sigmoid)
    assert note.startswith("note: the sparse kernels cannot run this network whole")
    assert "Sigmoid" in note


class Deciding(nn.Module):
    """Has a branch that values decide, in the modes named."""

    def __init__(self, modes):
        super().__init__()
        self.layers, self.modes = small(), modes

    def forward(self, x):
        logits = self.layers(x)
        return -logits if self.training in self.modes and logits.sum() > 0 else logits


def test_a_network_that_torch_has_to_run_is_said_with_the_reason():
    (_, note) = lines(lambda: Deciding([True, False]))
    assert note.startswith("note: torch alone runs this network, and it cannot become an .hpn file")
    assert f"in line 75 of {__file__}" in note
    (_, note) = lines(lambda: Deciding([True]))
    assert note.startswith("note: torch alone trains this network: the model cannot be traced")


class Shuffled(nn.Module):
    """Counts with the sizes that it meets."""

    def __init__(self):
        super().__init__()
        self.layer, self.head = nn.Conv2d(1, 2, 3), nn.Linear(72, 2)

    def forward(self, x):
        y = self.layer(x)
        count, channels, height, width = y.shape
        return self.head(y.reshape(count, channels * height * width * 1))


def test_arithmetic_with_sizes_is_no_fault():
    assert lines(Shuffled)[0] == "network: 162 of 166 parameters to prune, in 2 layers"


def test_missing_kernels_are_no_news_where_torch_was_asked_for(monkeypatch):
    monkeypatch.setattr(native, "best", lambda: None)
    assert any("kernels are not built" in line for line in lines(small))
    for elsewhere in (lines(small, "meta"), lines(small, execution={"backend": "dense"})):
        assert not any("kernels are not built" in line for line in elsewhere)


@pytest.mark.parametrize(
    ("method", "without"),
    [("harp", []), ("hydra", ["density_decay"]), ("mad", ["density_decay", "score_decay"])],
)
def test_parity_that_a_method_does_not_know_is_named(method, without):
    parity = {"density_decay": True, "score_decay": True, "epsilon": True}
    said = lines(small, method={"name": method}, parity=parity)
    named = [line.split()[1].removeprefix("parity.") for line in said if "parity" in line]
    assert sorted(named) == without


def test_an_allocation_that_a_method_does_not_use_is_named():
    note = "note: budget.allocation has no effect with method.name = 'snip'"
    given = {"method": {"name": "snip"}, "budget": {"allocation": "lamp"}}
    assert note in lines(small, **given)
    for other in ({"budget": {}}, {"method": {"name": "hydra"}}):
        assert not any("allocation" in line for line in lines(small, **(given | other)))


@pytest.mark.parametrize(
    ("method", "note"),
    [
        ("admm", "method.updates = 10 exceeds 5 epochs; there is one after each"),
        ("flying-bird", "method.updates = 75 exceeds 10 steps; there is one after each"),
        ("robust-bird", "method.window = 6 exceeds 5 epochs; the ticket is drawn after them, "),
    ],
)
def test_options_beyond_the_stage_are_named(method, note):
    def notes(epochs: int) -> list[str]:
        prune = {"epochs": epochs, "batch_size": 2}
        return lines(small, method={"name": method, **more}, prune=prune)[1:]

    more = {"window": 6} if method == "robust-bird" else {}
    (said,) = notes(5)
    assert said.startswith(f"note: {note}")
    assert notes(38) == notes(0) == []
