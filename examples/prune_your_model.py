# SPDX-License-Identifier: Apache-2.0
"""Prune a network of your own to 5 % of its weights, and measure what it still withstands.

python examples/prune_your_model.py [EPOCHS]
"""

import sys

from torch import nn

import harprune
from harprune import Linf

epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 30

# Any nn.Module from images in [0, 1] to logits will do, and any images: a pair (images, labels).
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
    nn.Flatten(), nn.Linear(64 * 4 * 4, 10),
)  # fmt: skip
digits = harprune.load_dataset("digits")
train, validation = harprune.split_validation(digits.train, 0.1, seed=0)

# `pretrain` makes the network robust first; leave it out when yours already is.
pruned = harprune.prune(
    model,
    train,
    validation,
    density=0.05,
    threat=Linf(0.1),
    pretrain_epochs=epochs,
    prune_epochs=epochs,
    finetune_epochs=epochs,
    options={"method": {"gamma": 0.1}, "finetune": {"learning_rate": 0.05}},
)
print(f"kept {pruned.audit.kept} of {pruned.audit.total} {pruned.audit.denominator}")

result = harprune.evaluate(pruned.model, digits.test, attacks=["pgd-20"], threat=Linf(0.1))
print("\n".join(result.lines()))
