# SPDX-License-Identifier: Apache-2.0
"""A network before its judges: test images, attacks by name, and the twin that is searched on."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor, nn

from harprune.kernels import Backend
from harprune.pipeline import hardening
from harprune.pipeline.console import Console
from harprune.robustness import evaluation
from harprune.robustness.images import subset
from harprune.robustness.record import Evaluation
from harprune.robustness.threat import Threat
from harprune.sparsity import execution as executions
from harprune.training.splits import Floats, Split


def chosen(labels: Tensor, size: int | None, seed: int, console: Console) -> Tensor:
    """Positions of the test images to attack, as `subset` draws them.

    Says so where more are asked for than there are.
    """
    if not isinstance(size, int | None):
        raise ValueError(f"size = {size!r} must be a whole number, or None for all images")
    if size is not None and size > len(labels):
        console.say(f"note: there are {len(labels)} test images, not {size}; all are taken")
    return subset(labels, size, seed)


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
        attacks: as `hardening.attack` knows them.
        index: positions of the images, (m,).
        twin: whether attacks search on the model's twin, on the kernels if `execution` has it so.

    The rest is as in `robustness.evaluation.evaluate`.
    """

    def told(reason: str) -> None:
        console.say(f"note: attacks search on the network itself, in torch: {reason}")

    found = executions.twin(model, execution=execution, told=told) if twin else None
    named = {a: hardening.attack(a, threat, seed=seed, batch_size=batch_size) for a in attacks}
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
