# SPDX-License-Identifier: Apache-2.0
"""Time one HARP pruning step against its literal twin, which does a straightforward release's work.

    python bench/train_step.py --arch resnet18 --rounds 3 --json results/train_step.json

A step is PGD-10 and the outer forward and backward pass with the hardware loss, then SGD; the twin
also runs the clean forward, sorts all scores at each of its twelve forwards and computes weight
gradients in every attack step. Variants are interleaved round by round in one process, and every
figure is a ratio of medians within this run.
"""

import argparse
import copy
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from harprune.methods.base import Budget
from harprune.methods.harp import HARP
from harprune.models import create_model
from harprune.pipeline.build import OnTwin
from harprune.robustness.attacks import PGD
from harprune.robustness.objectives import PGDAT
from harprune.robustness.threat import Linf
from harprune.sparsity import masks
from harprune.sparsity.allocation import uniform
from harprune.sparsity.execution import twin
from harprune.training.loop import fit
from harprune.training.schedules import constant
from tests.oracles.literal_harp import literal_layers, literal_network, literal_penalty, literal_pgd

EPSILON, STEP, STEPS, GAMMA = 8 / 255, 2 / 255, 10, 0.01


class OneBatch:
    """A source of one batch."""

    def __init__(self, x: Tensor, y: Tensor):
        self.batch = (x, y)

    def __len__(self) -> int:
        return 1

    def epoch(self, number: int, start: int = 0):
        return [self.batch]


def ours(arch: str, density: float, x: Tensor, y: Tensor, *, low: bool):
    """One step of the product's own loop, in float32 or with bf16 passes."""
    model, method = network(arch), HARP(gamma=GAMMA, start_density=density)
    method.attach(model, Budget(density, allocation=uniform))
    attack = OnTwin(
        PGD(Linf(EPSILON), STEPS, STEP), twin(model, dtype=torch.bfloat16 if low else None)
    )
    objective = PGDAT(attack)
    optimiser = torch.optim.SGD(method.trainable(model), lr=0.1, momentum=0.9)
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed" if low else "32-true")

    def step() -> None:
        fit(
            model,
            OneBatch(x, y),
            loss=lambda m, x, y: objective(m, x, y) + method.penalty(m),
            optimiser=optimiser,
            schedule=constant,
            epochs=1,
            fabric=fabric,
            seed=0,
        )

    return step


def literal(arch: str, density: float, x: Tensor, y: Tensor):
    """One step as a straightforward release takes it."""
    plain, method = network(arch), HARP(gamma=GAMMA, start_density=density)
    masked = copy.deepcopy(plain)
    method.attach(masked, Budget(density, allocation=uniform))
    parts = masks.installed(masked)
    scores = {n: m.scores.detach() for n, (_, m) in parts.items()}
    logits = {n: m.density.logit.detach() for n, (_, m) in parts.items()}
    model = literal_network(plain, scores, logits, 0.1 * density)
    layers = literal_layers(model).values()
    learned = [p for layer in layers for p in (layer.scores, layer.logit)]
    optimiser = torch.optim.SGD(learned, lr=0.1, momentum=0.9)
    for layer in layers:
        layer.layer.weight.requires_grad_(False)

    def step() -> None:
        model.train()
        model(x)
        noise = (2 * torch.rand_like(x) - 1) * EPSILON
        x_adv = literal_pgd(model, x, y, epsilon=EPSILON, step=STEP, steps=STEPS, noise=noise)
        loss = F.cross_entropy(model(x_adv), y) + literal_penalty(model, density, GAMMA, 0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    return step


def network(arch: str) -> nn.Module:
    torch.manual_seed(0)
    return create_model(arch, 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet18", help="resnet18 or vgg16_bn")
    parser.add_argument("--density", type=float, default=0.1, help="uniform density")
    parser.add_argument("--batch", type=int, default=128, help="images in a step")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds after a warm-up")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x, y = torch.rand(options.batch, 3, 32, 32), torch.randint(10, (options.batch,))
    variants = {
        "literal": literal(options.arch, options.density, x, y),
        "fp32": ours(options.arch, options.density, x, y, low=False),
        "bf16": ours(options.arch, options.density, x, y, low=True),
    }
    seconds = {name: [] for name in variants}
    for round_ in range(options.rounds + 1):
        for name, step in variants.items():
            started = time.perf_counter()
            step()
            if round_:
                seconds[name].append(time.perf_counter() - started)
    rows = []
    print(f"{'variant':<10}{'median s':>10}{'min':>8}{'max':>8}{'ratio':>8}")
    for name, values in seconds.items():
        median = statistics.median(values)
        ratio = statistics.median(a / b for a, b in zip(seconds["literal"], values))
        print(f"{name:<10}{median:>10.2f}{min(values):>8.2f}{max(values):>8.2f}{ratio:>8.2f}")
        rows.append(
            {
                "arch": options.arch,
                "density": options.density,
                "variant": name,
                "threads": options.threads,
                "batch": options.batch,
                "rounds": options.rounds,
                "seconds": median,
                "ratio": ratio,
            }
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
