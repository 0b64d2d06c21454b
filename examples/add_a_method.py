# SPDX-License-Identifier: Apache-2.0
"""A pruning method of your own: keep the weights that robust training made larger.

python examples/add_a_method.py [EPOCHS]
"""

import sys
from dataclasses import dataclass

from torch import nn

import harprune
from harprune import Linf
from harprune.methods.base import Budget, Method, parameter_group, settle_ranking


@dataclass(eq=False)
class MagnitudeIncrease(Method):
    """|w| at the end minus `recall` times |w| at the start (Zhou et al. 2019), over all layers."""

    uses_allocation = False  # one ranking of all layers decides
    recall: float = 1.0

    def attach(self, model: nn.Module, budget: Budget) -> None:
        self.budget, layers = budget, budget.layers(model)
        self.start = {n: layer.parameter.detach().clone() for n, layer in layers.items()}

    def trainable(self, model: nn.Module) -> list[dict]:
        return [parameter_group(list(model.parameters()), decay=True)]

    def settle(self, model: nn.Module) -> None:
        grain, scores = self.budget.granularity, {}
        for name, layer in self.budget.layers(model).items():
            growth = layer.parameter.detach().abs() - self.recall * self.start[name].abs()
            scores[name] = grain.total(layer, growth)
        settle_ranking(model, self.budget, scores)


if __name__ == "__main__":
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    digits = harprune.load_dataset("digits")
    train, validation = harprune.split_validation(digits.train, 0.1, seed=0)
    pruned = harprune.prune(
        harprune.create_model("small_cnn", 10, in_channels=1, width=16),
        train,
        validation,
        density=0.1,
        threat=Linf(0.1),
        method=f"{__name__}:MagnitudeIncrease",
        prune_epochs=epochs,
        finetune_epochs=epochs,
        options={"method": {"recall": 0.5}},
    )
    print(f"kept {pruned.audit.kept} of {pruned.audit.total} {pruned.audit.denominator}")
