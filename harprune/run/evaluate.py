# SPDX-License-Identifier: Apache-2.0
"""A network before its judges: test images, attacks by name, and the twin that is searched on."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from harprune.arguments import require_whole
from harprune.kernels import Backend
from harprune.outcomes import Evaluation
from harprune.recipe import adversarial
from harprune.robustness import evaluation
from harprune.robustness.autoattack import SQUARE_QUERIES, AutoAttack
from harprune.robustness.images import subset
from harprune.robustness.threat import Threat
from harprune.run.console import Console
from harprune.sparsity import execution as executions
from harprune.training.splits import Floats, Split


def chosen(labels: Tensor, size: int | None, seed: int, console: Console) -> Tensor:
    """Positions of the test images to attack, as `subset` draws them.

    Says so where more are asked for than there are.
    """
    if size is not None:
        require_whole("size", size)
    if size is not None and size > len(labels):
        console.say(f"note: there are {len(labels)} test images, not {size}; all are taken")
    return subset(labels, size, seed)


def expected_passes(
    attacks: Sequence[str], threat: Threat, *, clean: float, robust: float
) -> float:
    """About how many forward + backward passes `attacks` spend on a test image, in the mean.

    An attack goes against images that are right before it; AutoAttack's parts go against those
    that still stand, and after the first of them these are about the ones that PGD leaves.

    Args:
        attacks: as `adversarial.attack` knows them.
        clean, robust: share of images that are right before an attack, and under PGD.
    """
    passes = 0.0
    for attack in (adversarial.attack(name, threat) for name in attacks):
        if isinstance(attack, AutoAttack):  # a forward pass alone is a third of both
            passes += robust * (attack.passes + SQUARE_QUERIES / 3)
        else:
            passes += clean * attack.passes
    return passes


def judge(
    model: nn.Module,
    test: Split,
    *,
    attacks: Sequence[str],
    threat: Threat,
    index: Tensor,
    seed: int,
    batch_size: int,
    folder: str | Path | None,
    execution: Backend,
    twin: bool,
    console: Console,
    name: str,
    num_classes: int | None = None,
) -> Evaluation:
    """Evaluate `model` where it is, on the images `index` of `test`, under a progress bar.

    Args:
        attacks: as `adversarial.attack` knows them.
        index: positions of the images, (m,).
        twin: whether attacks search on the model's twin, on the kernels if `execution` has it so.

    The rest is as in `robustness.evaluation.evaluate`.
    """

    def told(reason: str) -> None:
        console.say(f"note: attacks search on the network itself, in torch: {reason}")

    found = executions.twin(model, execution=execution, told=told) if twin else None
    named = {a: adversarial.attack(a, threat, seed=seed, batch_size=batch_size) for a in attacks}
    doing = "attack" if attacks else "evaluate"
    with console.bar(f"{doing} {name}", len(index)) as bar:
        return evaluation.evaluate(
            model,
            Floats(test.images),
            test.labels,
            named,
            seed=seed,
            batch_size=batch_size,
            index=index,
            folder=folder,
            num_classes=num_classes,
            progress=bar.update_of,
            threat=threat,
            twin=None if found is None else found.current(),
            name=name,
        )
