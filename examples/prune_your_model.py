# SPDX-License-Identifier: Apache-2.0
"""Prune a network of your own, on images of your own, and measure what it still withstands.

python examples/prune_your_model.py [EPOCHS]
"""

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset, random_split

import harprune
from harprune import Linf

# Any nn.Module from images in [0, 1] to logits will do.
model = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
    nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
    nn.Flatten(), nn.Linear(64 * 4 * 4, 10),
)  # fmt: skip

# Any images (N, C, H, W) will do, uint8 or float in [0, 1]: a pair (images, labels), or a torch
# Dataset, without random transforms.
digits = load_digits()
images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]
whole = TensorDataset(images, torch.tensor(digits.target))
generator = torch.Generator().manual_seed(0)
train, validation, test = random_split(whole, [0.7, 0.1, 0.2], generator)


def load():
    """The same for the command line: --data prune_your_model:load."""
    return train, test


if __name__ == "__main__":
    epochs = int(sys.argv[1]) if len(sys.argv) > 1 else 30
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

    result = harprune.evaluate(pruned.model, test, attacks=["pgd-20"], threat=Linf(0.1))
    print("\n".join(result.lines()))
