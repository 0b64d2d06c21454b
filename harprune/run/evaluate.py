# SPDX-License-Identifier: Apache-2.0
"""`evaluate`: any network before its judges, on test images, under attacks that have names."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from harprune.arguments import require_text, require_whole
from harprune.files import make_folder
from harprune.kernels import Backend
from harprune.models.registry import require_module
from harprune.outcomes import Evaluation, load_evaluation
from harprune.recipe import adversarial, networks, training
from harprune.recipe.checks import check
from harprune.recipe.materials import load_data
from harprune.recipe.rehearsal import require_logits, require_pixels
from harprune.recipe.schema import Recipe
from harprune.robustness import evaluation
from harprune.robustness.autoattack import SQUARE_QUERIES, AutoAttack
from harprune.robustness.evaluation import device_of
from harprune.robustness.images import subset
from harprune.robustness.threat import Linf, Threat, require_threat
from harprune.run.console import Console
from harprune.run.folder import remove_litter
from harprune.run.lock import lock
from harprune.sparsity import execution as executions
from harprune.training.splits import Floats, Images, Split, as_split, require_labels, to_float


def evaluate(
    model: nn.Module,
    test: Images,
    *,
    attacks: Sequence[str] = ("autoattack",),
    threat: Threat | None = None,
    size: int | None = None,
    seed: int = 0,
    batch_size: int = 250,
    out: str | Path | None = None,
    name: str = "model",
    execution: Backend = "auto",
    twin: bool = True,
    quiet: bool = False,
) -> Evaluation:
    """Clean accuracy and accuracy under each attack, with intervals, checks and flags.

    Args:
        test: images as `prune` takes them.
        attacks: fgsm, pgd-STEPS, cw-STEPS, apgd-ce, apgd-dlr, autoattack.
        threat: Linf(8/255) if absent.
        size: number of images, drawn by `seed`; all if absent.
        out: a folder for per-image outcomes, from which an interrupted evaluation goes on; refused
            while another process works in it.
        execution: what runs the attacks on a CPU, as a recipe's execution.backend; verdicts are
            always the model's own.
        twin: whether attacks run on an equivalent of the model, batch norm folded and masks
            multiplied out, on the kernels if `execution` has it so; else on the plain model, in
            torch.

    Raises:
        ValueError: an unknown attack, values of another kind, images or a network that do not fit,
            execution "sparse" without the twin.
    """
    require_module(model)
    require_place(out)
    require_whole("seed", seed)
    require_whole("batch_size", batch_size, 1)
    require_text("name", name, "model")
    if execution == "sparse" and not twin:
        raise ValueError(
            "execution = 'sparse' runs the twin, and twin = False leaves it out; give execution = "
            "'auto', or leave out twin = False"
        )
    executions.require_backend(execution)
    threat = given_threat(threat)
    attacks = (attacks,) if isinstance(attacks, str) else attacks
    if not isinstance(attacks, Sequence):
        raise ValueError(f"attacks = {attacks!r} must be names in a list, as ['autoattack']")
    for each in attacks:
        adversarial.attack(each, threat)
    split = as_split(test)
    require_labels(split.labels, None, "test")
    require_pixels(split, "test")
    example = to_float(split.images[torch.tensor([0])])
    example = example.to(device_of(model))
    require_logits(model, example, int(split.labels.max()) + 1)
    console = Console(quiet=quiet)
    index = chosen(split.labels, size, seed, console)
    with _kept_in(out):
        return judge(
            model,
            split,
            attacks=attacks,
            threat=threat,
            index=index,
            seed=seed,
            batch_size=batch_size,
            folder=out,
            execution=execution,
            twin=twin,
            console=console,
            name=name,
        )


def evaluate_recipe(
    recipe: Recipe, out: str | Path | None = None, *, against: str | Path | None = None
) -> Evaluation:
    """Evaluate the network of a recipe, with the weights it names, as its attack section says.

    The model may be a file that `harprune export` made.

    Args:
        against: the folder of an earlier evaluation, to which the caller will compare this one.

    Raises:
        ValueError: whatever the recipe, the data or the weights refuse; a model without weights,
            or for other images; an evaluation of which `against` is no repetition.
    """
    check(recipe)
    networks.require_no_folder(recipe.model.name)
    held = networks.exported(recipe.model) if networks.is_exported(recipe.model.name) else None
    if recipe.model.weights is None and held is None:
        raise ValueError(
            f"model.weights is missing: name the weights of {recipe.model.name}, or give as the "
            "model a file that `harprune export` made"
        )
    engine = training.fabric(recipe.execution)
    dataset = load_data(recipe.data)
    if against is not None:
        _require_comparable(against, recipe, dataset.test.labels)
    if held is None:
        model = networks.build(recipe.model, dataset, recipe.seed)
    else:
        model = networks.in_torch(held, recipe.model.name, dataset)
    example = to_float(dataset.test.images[torch.tensor([0])])
    require_logits(model, example, dataset.num_classes)
    model, section = model.to(engine.device), recipe.attack
    return evaluate(
        model,
        dataset.test,
        attacks=section.attacks,
        threat=adversarial.threat(recipe),
        size=section.size,
        seed=section.seed,
        batch_size=section.batch_size,
        out=out,
        execution=recipe.execution.backend,
        twin=recipe.execution.twin,
        name=recipe.name,
    )


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


def _require_comparable(folder: str | Path, recipe: Recipe, labels: Tensor) -> None:
    """Refuse, before anything is attacked, an evaluation that is not comparable to an earlier one.

    Args:
        folder: where the earlier one was kept.
        labels: of all test images of `recipe`.

    Raises:
        ValueError: the two differ in attacks, threat, seed or images.
    """
    before, section = load_evaluation(folder), recipe.attack
    if set(before.attacks) != set(section.attacks):
        raise ValueError(
            f"{folder} holds outcomes under {', '.join(before.attacks) or 'no attack'}, not under "
            f"{', '.join(section.attacks) or 'none'}; evaluate under the same attacks"
        )
    bound = repr(adversarial.threat(recipe))
    # On clean images alone neither the threat nor the start of an attack matters.
    if section.attacks and before.threat != bound:
        raise ValueError(
            f"{folder} holds outcomes under {before.threat or 'no stated threat'}, not under "
            f"{bound}; give both the same norm and epsilon"
        )
    if section.attacks and before.seed != section.seed:
        raise ValueError(
            f"{folder} holds outcomes with seed {before.seed}, not {section.seed}; evaluate with "
            "the same seed"
        )
    index = subset(labels, section.size, section.seed)
    for what, wanted in (("index", index), ("labels", labels[index])):
        if not np.array_equal(before.outcomes[what], wanted.numpy()):
            raise ValueError(
                f"{folder} ({before.size} images) and this evaluation ({len(index)} images) differ "
                f"in {what}; evaluate both on the same subset of the same data"
            )


def require_place(out: str | Path | None) -> None:
    """Raises ValueError for empty text, which `Path` takes for the current folder."""
    if out == "":
        raise ValueError("out = '' names no folder; give one, as 'runs/mine', or None")


def given_threat(threat: Threat | None) -> Threat:
    if threat is None:
        return Linf(8 / 255)
    require_threat(threat)
    return threat


def _kept_in(out: str | Path | None) -> AbstractContextManager:
    if out is None:
        return nullcontext()
    make_folder(out)
    held = lock(Path(out))
    remove_litter(Path(out))
    return held
