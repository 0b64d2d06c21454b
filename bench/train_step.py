# SPDX-License-Identifier: Apache-2.0
"""Time one pruning and one finetuning step against a literal, straightforward release.

    python bench/train_step.py --arch resnet18 --density 0.1 0.01 --json results/train_step.json

A step is PGD-10 and the outer forward and backward pass, then SGD: of HARP's scores and densities
with the hardware loss, or of all parameters under fixed masks. The literal release also runs the
clean forward, sorts all scores at each of its twelve forwards, in finetuning too, and computes
weight gradients in every attack step. Its work does not depend on the density, so it is timed once
a round. In a round every variant is built, takes one step that is not timed, with a short attack,
and one that is; each figure is a median over the rounds, each ratio the median of those to the
literal release in the same round.

The untimed steps are compared: where a variant's loss or gradients are not those of dense float32,
or these not the literal release's, or the kernels did not do what its name says, the run ends.
"""

import argparse
import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from math import log
from pathlib import Path

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from bench.measuring import (
    circumstances,
    kernel_calls,
    overlap,
    seconds,
    summary,
    table,
    write_rows,
)
from harprune.kernels import Backend, native
from harprune.methods.base import Budget
from harprune.methods.harp import HARP
from harprune.models import create_model
from harprune.recipe import training
from harprune.recipe.adversarial import OnTwin
from harprune.recipe.pruning import ALLOCATIONS
from harprune.recipe.schema import Finetune, Prune
from harprune.robustness.attacks import PGD
from harprune.robustness.objectives import PGDAT
from harprune.robustness.threat import Linf
from harprune.sparsity import masks
from harprune.sparsity.execution import training_twin, twin
from harprune.sparsity.layers import prunable_layers
from harprune.training.loop import fit, step_seed
from harprune.training.schedules import constant
from tests.oracles.literal_harp import literal_layers, literal_network, literal_penalty, literal_pgd

EPSILON, STEP, STEPS, GAMMA = 8 / 255, 2 / 255, 10, 0.01
CHECKED_STEPS = 1  # of a longer attack on a random network, rounding alone makes another
SECTIONS = {"prune": Prune(), "finetune": Finetune()}
COLUMNS = ("arch", "density", "variant", "seconds", "min", "max", "ratio")

LOSS_TOLERANCE = 0.05
"""Relative difference of two variants' losses that is still the same step."""
LEAST_OVERLAP = 0.95
"""Least `overlap` of the whole gradient with the reference's."""
LEAST_OVERLAP_OF_A_LAYER = 0.8
"""The same of each layer's: rounding turns the signs of some pixels; first layers feel it most."""
LEAST_OVERLAP_AFTER_BF16_ATTACK = 0.3
"""The same of the whole gradient, where rounding made another attack; a layer may differ more."""
NEGLIGIBLE = 1e-4
"""Norm of a layer's gradient, beside the largest, below which it holds nothing but rounding."""


@dataclass(frozen=True)
class Variant:
    """How harprune takes a step: of which stage, on what, and in which precision.

    `precision` is Fabric's. In bf16 the dense variant also attacks in bf16; the sparse one attacks
    in float32 and multiplies in bf16 only where gradients to all weights are computed.
    """

    stage: str
    execution: Backend
    precision: str

    @property
    def attack_dtype(self) -> torch.dtype | None:
        """The precision of the twin that is attacked."""
        low = self.precision == "bf16-mixed" and self.execution == "dense"
        return torch.bfloat16 if low else None

    @property
    def available(self) -> bool:
        """Whether this machine can run it."""
        kernels = native.best()
        if self.execution == "dense":
            return True
        return kernels is not None and (self.precision == "32-true" or kernels.has_bf16)


VARIANTS = {
    "prune-dense-fp32": Variant("prune", "dense", "32-true"),
    "prune-dense-bf16": Variant("prune", "dense", "bf16-mixed"),
    "prune-sparse-fp32": Variant("prune", "sparse", "32-true"),
    "prune-sparse-bf16": Variant("prune", "sparse", "bf16-mixed"),
    "finetune-dense-fp32": Variant("finetune", "dense", "32-true"),
    "finetune-dense-bf16": Variant("finetune", "dense", "bf16-mixed"),
    "finetune-sparse-fp32": Variant("finetune", "sparse", "32-true"),
}


@dataclass(frozen=True)
class Subject:
    """What is trained, and how much of it is kept."""

    arch: str
    width: int | None
    density: float
    allocation: str

    def network(self) -> nn.Module:
        torch.manual_seed(0)
        return create_model(self.arch, 10, width=self.width)

    def masked(self) -> tuple[nn.Module, HARP]:
        """A network under HARP's masks, at its target from the start."""
        model, method = self.network(), HARP(gamma=GAMMA, start_factor=1.0)
        method.attach(model, Budget(self.density, allocation=ALLOCATIONS[self.allocation]))
        return model, method


@dataclass(frozen=True)
class Step:
    """A training step that can be taken again and again, with so many attack steps.

    `compared` are parameters by their weight's names.
    """

    take: Callable[[int], float]
    optimiser: torch.optim.Optimizer
    compared: dict[str, nn.Parameter]

    def first(self) -> "Taken":
        """Take it with a short attack, and keep the loss and the gradients that it found."""
        gradients: dict[str, Tensor] = {}

        def keep(*_) -> None:
            gradients.update({n: p.grad.flatten().clone() for n, p in self.compared.items()})

        hook = self.optimiser.register_step_pre_hook(keep)
        with kernel_calls() as ran:
            loss = self.take(CHECKED_STEPS)
        hook.remove()
        return Taken(loss, gradients, ran)


@dataclass(frozen=True)
class Taken:
    """What a step found, and what it had the kernels do."""

    loss: float
    gradients: dict[str, Tensor]
    ran: set

    def require_run_as(self, variant: Variant, name: str) -> None:
        """Raise ValueError where the step did not run on what the variant's name says."""
        sparse, low = variant.execution == "sparse", variant.precision == "bf16-mixed"
        if ("run" in self.ran) != sparse or (native.ALL_BF16 in self.ran) != (sparse and low):
            raise ValueError(
                f"{name}: the kernels ran {self.ran or 'nothing'}; the step fell back to another "
                "execution and its times mean nothing"
            )

    def require_near(self, reference: "Taken", name: str, *, same_attack: bool = True) -> None:
        """Raise ValueError where this cannot be the same step as `reference`.

        Without `same_attack` the attack ran in another precision.
        """
        if abs(self.loss - reference.loss) > LOSS_TOLERANCE * abs(reference.loss):
            raise ValueError(
                f"{name}: the first loss is {self.loss:.4f}, the reference's {reference.loss:.4f}; "
                "the variant is wrong and its times mean nothing"
            )
        largest = max(g.norm() for g in reference.gradients.values())
        names = [n for n, g in reference.gradients.items() if g.norm() >= NEGLIGIBLE * largest]
        least = LEAST_OVERLAP if same_attack else LEAST_OVERLAP_AFTER_BF16_ATTACK
        parts = [("all layers", names, least)]
        if same_attack:
            parts += [(n, [n], LEAST_OVERLAP_OF_A_LAYER) for n in names]
        for part, layers, least in parts:
            a, b = (torch.cat([t.gradients[n] for n in layers]) for t in (self, reference))
            if not overlap(a, b) >= least:
                raise ValueError(
                    f"{name}: the first gradient to {part} overlaps the reference's by "
                    f"{overlap(a, b):.3f}, less than {least}; the variant is wrong and its times "
                    "mean nothing"
                )


class OneBatch:
    """A source of one batch."""

    def __init__(self, x: Tensor, y: Tensor):
        self.batch = (x, y)

    def __len__(self) -> int:
        return 1

    def epoch(self, number: int, start: int = 0):
        return [self.batch]


@cache
def engine(precision: str) -> Fabric:
    """Fabric on the CPU."""
    return Fabric(accelerator="cpu", devices=1, precision=precision)


def ours(
    subject: Subject, variant: Variant, x: Tensor, y: Tensor, *, clean_forward: bool = False
) -> Step:
    """One step of the product's own loop."""
    model, method = subject.masked()
    if variant.stage == "prune":
        groups, penalty = method.trainable(model), method.penalty
        compared = {n: m.scores for n, (_, m) in masks.installed(model).items()}
    else:
        method.settle(model)
        groups, penalty = [{"params": list(model.parameters())}], lambda model: 0.0
        compared = {n: layer.parameter for n, layer in prunable_layers(model).items()}
    function = twin(model, dtype=variant.attack_dtype, execution=variant.execution)
    trained = training_twin(model, execution=variant.execution) or model
    optimiser = training.optimiser(groups, SECTIONS[variant.stage])

    def take(steps: int) -> float:
        losses, attack = [], OnTwin(PGD(Linf(EPSILON), steps, STEP), function)
        objective = PGDAT(attack, clean_forward=clean_forward)
        fit(
            model,
            OneBatch(x, y),
            loss=lambda model, x, y: objective(trained, x, y) + penalty(model),
            optimiser=optimiser,
            schedule=constant,
            epochs=1,
            fabric=engine(variant.precision),
            seed=0,
            after_step=lambda step, loss: losses.append(float(loss)),
        )
        return losses[0]

    return Step(take, optimiser, compared)


def literal(subject: Subject, stage: str, x: Tensor, y: Tensor) -> Step:
    """One step as a straightforward release takes it."""
    masked, method = subject.masked()
    scores = {n: m.scores.detach().clone() for n, (_, m) in masks.installed(masked).items()}
    if stage == "finetune":
        method.settle(masked)
    logits = {}
    for name, (_, mask) in masks.installed(masked).items():
        # Half a weight less, so that rounding down after the literal's sort keeps as many.
        share = (float(mask.mask().detach().sum()) - 0.5) / scores[name].numel()
        logits[name] = torch.tensor(log(share / (1.0 - share)))
    model = literal_network(subject.network(), scores, logits, 0.0)
    layers = literal_layers(model)
    for layer in layers.values():
        layer.layer.weight.requires_grad_(stage == "finetune")
        layer.scores.requires_grad_(stage == "prune")
        layer.logit.requires_grad_(stage == "prune")
    if stage == "prune":
        learned = [p for layer in layers.values() for p in (layer.scores, layer.logit)]
        groups = [{"params": learned, "weight_decay": 0.0}]
        compared = {n: layer.scores for n, layer in layers.items()}
    else:
        groups = [{"params": [p for p in model.parameters() if p.requires_grad]}]
        compared = {n: layer.layer.weight for n, layer in layers.items()}
    optimiser = training.optimiser(groups, SECTIONS[stage])

    def take(steps: int) -> float:
        torch.manual_seed(step_seed(0, 0))
        noise = (2 * torch.rand_like(x) - 1) * EPSILON
        model.train()
        model(x)
        x_adv = literal_pgd(model, x, y, epsilon=EPSILON, step=STEP, steps=steps, noise=noise)
        loss = F.cross_entropy(model(x_adv), y)
        if stage == "prune":
            loss = loss + literal_penalty(model, subject.density, GAMMA, 0)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        return float(loss.detach())

    return Step(take, optimiser, compared)


class Rounds:
    """All rounds of one architecture: the seconds by (density, variant), and the references."""

    def __init__(self, subjects: list[Subject], variants: list[str], x: Tensor, y: Tensor):
        self.subjects, self.variants, self.batch = subjects, variants, (x, y)
        self.seconds: dict[tuple[float, str], list[float]] = {}
        self._firsts: dict[tuple[float, str], Taken] = {}
        self._literals = {s: literal(subjects[0], s, x, y) for s in self.stages}

    @property
    def stages(self) -> list[str]:
        return [s for s in SECTIONS if any(VARIANTS[v].stage == s for v in self.variants)]

    def prepare(self) -> None:
        """The references, none of them timed.

        Raises:
            ValueError: the dense float32 step is not the literal release's.
        """
        for stage, step in self._literals.items():
            name = f"{stage}-dense-fp32"
            like = self._built(self.subjects[0], name, clean_forward=True)
            like.first().require_near(step.first(), name)
            for subject in self.subjects:
                self._firsts[subject.density, stage] = self._built(subject, name).first()

    def round(self) -> None:
        """Each literal step once, then each variant at each density.

        Raises:
            ValueError: a variant's untimed step is not the reference's.
        """
        for stage, step in self._literals.items():
            self._timed(self.subjects[0].density, f"{stage}-literal", step)
        for subject in self.subjects:
            for name in self.variants:
                variant, step = VARIANTS[name], self._built(subject, name)
                reference = self._firsts[subject.density, variant.stage]
                first = step.first()
                first.require_run_as(variant, name)
                same_attack = variant.attack_dtype is None
                first.require_near(reference, name, same_attack=same_attack)
                self._timed(subject.density, name, step)
                # Traced networks lie in cycles, and a step on the kernels holds a gigabyte.
                del step
                gc.collect()

    def _built(self, subject: Subject, name: str, **options) -> Step:
        return ours(subject, VARIANTS[name], *self.batch, **options)

    def _timed(self, density: float, name: str, step: Step) -> None:
        taken = seconds(lambda: step.take(STEPS))
        self.seconds.setdefault((density, name), []).append(taken)
        print(f"{self.subjects[0].arch} {density:g} {name}: {taken:.3f} s", file=sys.stderr)

    def rows(self) -> list[dict]:
        """One row a density and variant."""
        rows, first = [], self.subjects[0]
        for (density, name), own in self.seconds.items():
            reference = self.seconds[first.density, f"{name.split('-')[0]}-literal"]
            rows.append(
                {
                    "arch": first.arch,
                    "width": first.width,
                    "density": density,
                    "allocation": first.allocation,
                    "variant": name,
                    "batch": len(self.batch[0]),
                    **summary(own, reference),
                }
            )
        return rows


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    named, runnable = list(VARIANTS), [n for n, v in VARIANTS.items() if v.available]
    parser.add_argument("--arch", nargs="+", default=["resnet18", "vgg16_bn"], help="networks")
    parser.add_argument("--width", type=int, help="channels of the first stage; else the usual")
    parser.add_argument("--density", type=float, nargs="+", default=[0.1, 0.01], help="kept share")
    parser.add_argument("--allocation", default="erk", choices=["uniform", "erk", "lamp"])
    parser.add_argument("--variants", nargs="+", default=runnable, choices=named)
    parser.add_argument("--batch", type=int, default=128, help="images in a step")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--rounds", type=int, default=3, help="interleaved rounds")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    options = parser.parse_args()
    for name in options.variants:
        if name not in runnable:
            parser.error(
                f"--variants {name} needs compiled kernels, and with bf16 a processor that "
                "multiplies it (`harprune doctor` names both); leave it out"
            )
    return options


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    where, rows = circumstances(), []
    for arch in options.arch:
        torch.manual_seed(0)
        x, y = torch.rand(options.batch, 3, 32, 32), torch.randint(10, (options.batch,))
        subjects = [Subject(arch, options.width, d, options.allocation) for d in options.density]
        timed = Rounds(subjects, options.variants, x, y)
        timed.prepare()
        for _ in range(options.rounds):
            timed.round()
            write_rows(options.json, rows + [row | where for row in timed.rows()])
        rows += [row | where for row in timed.rows()]
        print(*table(timed.rows(), COLUMNS), sep="\n", end="\n\n")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"train_step: {error}")
